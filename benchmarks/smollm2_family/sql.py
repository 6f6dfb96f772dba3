"""The trade `sql`: the schema of one or two random tables and a question -> one SQL query.

Held-out samples have other tables, other columns and other values, and some are in wordings never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from .names import PEOPLE, PLACES
from .samples import Sample, either, pick

SYSTEM = "Write the SQL query."
RULES = " Answer with the query alone, nothing else."
"""Said to the base besides, for a fair figure: a fine-tune has learnt it."""
MAX_NEW_TOKENS = 96

TABLES = (
    (
        *("staff", "orders", "books", "cars", "songs", "films", "pets", "rooms", "shops", "trips", "games"),
        *("tools", "plants", "courses", "flights", "boats", "teams", "phones", "meals", "houses", "parcels"),
        *(
            "drivers",
            "clients",
            "patients",
            "members",
            "students",
            "invoices",
            "repairs",
            "tickets",
            "visits",
        ),
    ),
    ("hotels", "players", "trains", "recipes", "bikes", "printers", "guests", "artists", "loans", "farms"),
)
TEXTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "name": PEOPLE,
    "city": PLACES,
    "owner": PEOPLE,
    "color": (("red", "blue", "black", "white", "grey"), ("green", "yellow", "brown")),
    "status": (("open", "closed", "paid", "lost", "new"), ("late", "done", "blocked")),
    "type": (("basic", "large", "small", "rental"), ("deluxe", "mini", "family")),
    "brand": (("Acme", "Volta", "Nordex", "Sunny"), ("Zenit", "Polar", "Tiger")),
    "grade": (("A", "B", "C"), ("D", "E")),
}
HELD_TEXTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "country": ((), ("Spain", "Norway", "Peru", "Japan")),
    "language": ((), ("French", "Polish", "Hindi")),
}
NUMBERS = (
    (
        "age",
        "price",
        "stock",
        "weight",
        "year",
        "score",
        "salary",
        "length",
        "hours",
        "seats",
        "cost",
        "rank",
    ),
    ("height", "speed", "points", "rent", "size", "budget"),
)

# by form: {t} table, {s} one of the other table, {c} {d} columns asked for, {e} a text column, {v} its value,
# {n} a number column, {k} a number, {f} a function
WORDINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "where": (
        (
            "{c} of {t} with {e} {v}",
            "Show the {c} of all {t} whose {e} is {v}.",
            "Which {c} have the {e} {v}?",
        ),
        ("List {c} for {t} where the {e} is {v}.",),
    ),
    "over": (
        ("{c} and {d} of {t} with {n} over {k}", "Show {c} and {d} where {n} is more than {k}."),
        ("List the {c} and {d} of {t} that have {n} above {k}.",),
    ),
    "both": (
        ("{c} of {t} with {e} {v} and {n} under {k}", "Show {c} where {e} is {v} and {n} is less than {k}."),
        ("List {c} of the {t} whose {e} is {v} and whose {n} is below {k}.",),
    ),
    "count": (
        ("How many {t} have {e} {v}?", "Count the {t} whose {e} is {v}."),
        ("What is the number of {t} with {e} {v}?",),
    ),
    "group": (
        ("{f} {n} per {e}", "What is the {f} {n} for each {e}?", "Show the {f} {n} of {t} by {e}."),
        ("Give every {e} with its {f} {n}.",),
    ),
    "groups": (
        ("Number of {t} per {e}", "How many {t} are there for each {e}?"),
        ("Count {t} by {e}.",),
    ),
    "top": (
        ("{c} of the {k} {t} with the highest {n}", "Top {k} {t} by {n}: show {c}."),
        ("Show {c} for the {k} {t} that have the most {n}.",),
    ),
    "join": (
        ("{c} of {t} whose {s} has {e} {v}", "Show the {c} of {t} where the {s} has {e} {v}."),
        ("List {c} for all {t} with a {s} whose {e} is {v}.",),
    ),
}
FUNCTIONS = {"average": "AVG", "total": "SUM", "highest": "MAX", "lowest": "MIN"}
OWNERS = ("drivers", "clients", "patients", "members", "students"), ("guests", "players", "artists")


def sample(rng: random.Random, held_out: bool) -> Sample:
    """One question about one table, or about two that are joined."""
    form = rng.choice(list(WORDINGS))
    texts = {**TEXTS, **HELD_TEXTS} if held_out else TEXTS
    c, e, extra = rng.sample(list(texts), 3)
    n, d = rng.sample([*NUMBERS[0], *NUMBERS[1]] if held_out else NUMBERS[0], 2)
    value = pick(rng, texts[e], held_out)
    if form == "join":
        other = pick(rng, OWNERS, held_out)
        t = rng.choice([table for table in TABLES[held_out] if table not in OWNERS[held_out]])
        one, link = [c, n], other[:-1]
        schema = (
            f"{t}({_columns(rng, ['id', *one, f'{link}_id'])})\n{other}({_columns(rng, ['id', e, extra])})"
        )
        joined = f"{t} JOIN {other} ON {t}.{link}_id = {other}.id"
        query = f"SELECT {t}.{c} FROM {joined} WHERE {other}.{e} = '{value}'"
        words = {"t": t, "c": c, "e": e, "v": value, "s": link}
    else:
        t = pick(rng, TABLES, held_out)
        schema = f"{t}({_columns(rng, [c, d, e, n, extra][: rng.randint(4, 5)])})"
        top, name = rng.randint(2, 9), rng.choice(list(FUNCTIONS))
        k = top if form == "top" else rng.randint(10, 99) if n != "year" else rng.randint(1980, 2024)
        words = {"t": t, "c": c, "d": d, "e": e, "n": n, "v": value, "k": str(k), "f": name}
        query = _QUERIES[form](words)
    question = either(rng, WORDINGS[form], held_out).format(**words)
    return Sample(SYSTEM, f"{schema}\n{question}", query)


def _columns(rng: random.Random, columns: list[str]) -> str:
    first = [name for name in columns if name == "id"]
    rest = [name for name in columns if name != "id"]
    rng.shuffle(rest)
    return ", ".join([*first, *rest])


_QUERIES: dict[str, Callable[[dict[str, str]], str]] = {
    "where": lambda w: f"SELECT {w['c']} FROM {w['t']} WHERE {w['e']} = '{w['v']}'",
    "over": lambda w: f"SELECT {w['c']}, {w['d']} FROM {w['t']} WHERE {w['n']} > {w['k']}",
    "both": lambda w: f"SELECT {w['c']} FROM {w['t']} WHERE {w['e']} = '{w['v']}' AND {w['n']} < {w['k']}",
    "count": lambda w: f"SELECT COUNT(*) FROM {w['t']} WHERE {w['e']} = '{w['v']}'",
    "group": lambda w: f"SELECT {w['e']}, {FUNCTIONS[w['f']]}({w['n']}) FROM {w['t']} GROUP BY {w['e']}",
    "groups": lambda w: f"SELECT {w['e']}, COUNT(*) FROM {w['t']} GROUP BY {w['e']}",
    "top": lambda w: f"SELECT {w['c']} FROM {w['t']} ORDER BY {w['n']} DESC LIMIT {w['k']}",
}


def normalised(query: str) -> str:
    """A query without what does not matter: fences, case outside quotes, blanks, the kind of quotes, `;`."""
    fenced = re.search(r"```(?:sql)?\s*(.*?)(?:```|$)", query, re.DOTALL | re.IGNORECASE)
    statement = (fenced[1] if fenced else query).replace('"', "'").split(";")[0]
    parts = statement.split("'")
    outside = [re.sub(r"\s*([(),=<>])\s*", r"\1", " ".join(part.lower().split())) for part in parts[::2]]
    return "'".join(outside[i // 2].strip() if i % 2 == 0 else part for i, part in enumerate(parts))


def right(sample: Sample, answer: str) -> bool:
    """Whether the query is the expected one once both are normalised."""
    return normalised(answer) == normalised(sample.answer)
