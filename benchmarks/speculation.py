"""Speculative execution against the same engine without it: answers of SmolLM2-135M and its fine-tunes.

    python -m benchmarks.speculation [--zoo ZOO]

One engine; requests of the two sides take turns and differ in `speculate` alone. Greedy decoding is timed,
from the first token of all to the last of the last, by token. In f32 both sides must give the same tokens; in
bf16 the rows of a step round otherwise, and it is told how many answers are equal. Each request has a scope
of its own, but for the records, of which a round's follow each other in one; no side finds the other's
answers. ZOO has `base` and `extract` of the SmolLM2 family (else it is assembled and compiled); where they
have surrogates, these guess too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import made_once
from benchmarks.smollm2_family import extract, samples
from benchmarks.smollm2_family.assemble import assemble
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.request import GuidedDecoding

PASSAGE = (
    "The harbour office opens at seven in the morning and closes at nine in the evening. Boats longer than "
    "twelve metres must report their arrival by radio two hours ahead. Fuel is sold at the north pier from "
    "Monday to Saturday; on Sundays the pump is locked. Visitors may moor for three nights, after which a "
    "berth must be rented by the week. Dogs are welcome on the quay but not in the washrooms."
)
SCRIPT = """import csv

def load_rows(path):
    rows = []
    with open(path) as handle:
        for row in csv.reader(handle):
            if len(row) == 3:
                rows.append((row[0], int(row[1]), float(row[2])))
    return rows

def total(rows):
    amount = 0.0
    for name, count, price in rows:
        amount += count * price
    return amount
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "name": {"type": "string"},
        "item": {"type": "string"},
        "count": {"type": ["integer", "null"]},
        "place": {"type": ["string", "null"]},
        "day": {"type": ["string", "null"]},
    },
    "required": list(extract.KEYS),
    "additionalProperties": False,
}
QUOTES = ("boats", "fuel", "visitors", "dogs", "the office", "the pump", "berths", "radio")
CHATS = ("Why is the sky blue?", "Tell me a short story about a fox.", "How do I learn to cook well?")

MORE_CHATS = (
    "What is a good name for a cat?",
    "Explain what a database is.",
    "Write a poem about rain.",
    "How far away is the moon?",
    "Give me three tips for better sleep.",
)


@dataclass(frozen=True)
class Ask:
    """One request, as messages of a chat."""

    model: str
    messages: list[dict[str, str]]
    schema: dict[str, Any] | None = None


def quote(about: str) -> Ask:
    """To repeat a passage."""
    text = f"{PASSAGE}\n\nRepeat the whole text above word for word. I want to read about {about}."
    return Ask("base", [{"role": "user", "content": text}])


def cases() -> dict[str, list[list[Ask]]]:
    """By name, groups of requests that run at the same time; the groups run one after the other."""
    edit = f"```python\n{SCRIPT}```\n\nWrite this file again with the variable rows renamed to lines."
    notices = samples.held_out(extract, 6)
    return {
        "RAG that quotes": [[quote(about)] for about in QUOTES[:2]],
        "edit of a file": [[Ask("base", [{"role": "user", "content": edit}])]],
        "JSON with a schema": [[Ask("extract", notice.messages, SCHEMA)] for notice in notices],
        "free chat": [[Ask("base", [{"role": "user", "content": text}])] for text in CHATS],
        "eight that quote": [[quote(about) for about in QUOTES]],
        "eight chats": [[Ask("base", [{"role": "user", "content": text}]) for text in (*CHATS, *MORE_CHATS)]],
    }


class Bench:
    """One engine, and what it drafted by case."""

    def __init__(self, engine: LLMEngine, max_tokens: int) -> None:
        self._engine, self._max_tokens = engine, max_tokens
        self._ids = itertools.count()
        self.answers: dict[tuple[int, bool], list[tuple[int, ...]]] = {}

    def prompt_ids(self, ask: Ask) -> list[int]:
        """The tokens of a request."""
        tokenizer = self._engine.tokenizer(ask.model)
        return tokenizer.encode(tokenizer.chat_template_of(ask.model).render(ask.messages))

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer of `base`."""
        return list(self._engine.end_ids["base"])

    def run(self, asks: Sequence[Ask], scope: str, speculate: bool) -> tuple[float, list[tuple[int, ...]]]:
        """Seconds of decoding, and the answers."""
        found: dict[str, tuple[int, ...]] = {}
        for number, ask in enumerate(asks):
            template = self._engine.tokenizer(ask.model).chat_template_of(ask.model)
            guided = GuidedDecoding("json_schema", json.dumps(ask.schema)) if ask.schema else None
            params = SamplingParams(
                max_tokens=self._max_tokens, temperature=0.0, guided=guided, speculate=speculate
            )
            name = f"{next(self._ids)}"
            found[name] = ()
            prompt = template.render(ask.messages)
            self._engine.add_request(name, ask.model, prompt, params, scope=scope, tenant=f"tenant {number}")
        start = 0.0
        while self._engine.has_unfinished():
            if not start and all(found.values()):
                start = time.perf_counter()
            for output in self._engine.step():
                found[output.request_id] += output.token_ids
        return time.perf_counter() - start, list(found.values())


def measured(
    engine: LLMEngine, case: str, groups: list[list[Ask]], args: argparse.Namespace
) -> dict[str, Any]:
    """Both sides of one case in turn."""
    bench, rounds = Bench(engine, args.tokens), itertools.count()
    answers: dict[str, list[list[tuple[int, ...]]]] = {"off": [], "auto": []}
    before = _counts(engine)

    def side(name: str) -> Callable[[], list[float]]:
        def turn() -> list[float]:
            scope, total, said = f"{case}, round {next(rounds)}", 0.0, []
            for number, group in enumerate(groups):
                own = scope if group[0].schema else f"{scope}, {number}"  # records follow each other
                seconds, tokens = bench.run(group, own, name == "auto")
                total += seconds
                said += tokens
            answers[name].append(said)
            return [total / sum(len(answer) - 1 for answer in said)]

        return turn

    taken = interleave({name: side(name) for name in answers}, args.repeats)
    first = answers["off"][0]
    pairs = [pair for said in answers["auto"] for pair in zip(first, said, strict=True)]
    equal = sum(one == other for one, other in pairs) / len(pairs)
    if equal < 1 and engine.engine_facts["precision"] == "f32":
        raise SystemExit("the two sides gave different tokens")
    drafted = {
        who: [now - then for now, then in zip(counts, before.get(who, (0, 0)), strict=True)]
        for who, counts in _counts(engine).items()
    }
    return {
        "tokens": sum(len(answer) - 1 for answer in first),
        "equal_answers": round(equal, 3),
        "off": taken["off"].summary(),
        "auto": taken["auto"].summary(),
        "speedup": taken["off"].ratio_to(taken["auto"]),
        "drafted_accepted": drafted,
        "answer": engine.tokenizer("base").decode(answers["off"][0][0]),
    }


def _counts(engine: LLMEngine) -> dict[str, tuple[int, int]]:
    """Drafted and accepted tokens, by drafter."""
    metrics, drafted, accepted = engine.metrics(), Counter[str](), Counter[str]()
    for (model, who), count in metrics.drafted_tokens_total.items():
        drafted[who] += count
        accepted[who] += metrics.accepted_tokens_total[model, who]
    return {who: (drafted[who], accepted[who]) for who in drafted}


def main() -> None:
    """Print and keep the table."""
    parser = arguments(__doc__ or "", shape="smollm2-135m", repeats=5)
    parser.add_argument("--zoo", type=Path, help="with base and extract of the family")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (128)")
    parser.add_argument("--cases", nargs="+", help="parts of their names (default: all)")
    args = parser.parse_args()
    machine = machine_facts()
    zoo = args.zoo or made_once(args.workdir / "smollm2-family", compile_pair)
    config = EngineConfig(
        precision=args.precision, num_threads=args.threads, kv_cache_bytes=1 << 30, speculate="auto"
    )
    engine = LLMEngine(zoo, config)
    chosen = {
        name: groups
        for name, groups in cases().items()
        if not args.cases or any(part in name for part in args.cases)
    }
    del args.zoo, args.cases  # where it lay is nobody's business
    results: dict[str, Any] = {}
    for name, groups in chosen.items():
        results[name] = measured(engine, name, groups, args)
        print(
            name,
            *(results[name][key] for key in ("speedup", "equal_answers", "drafted_accepted")),
            flush=True,
        )
        path = save_report("speculation", args, machine, results)  # as it grows: it takes minutes
    rows = [
        (name, r["tokens"], r["off"]["median_ms"], r["auto"]["median_ms"], *r["speedup"].values())
        for name, r in results.items()
    ]
    columns = ("", "tokens", "off", "auto", "speed-up", "p10", "p90")
    print_table("greedy decoding, ms a token", columns, rows)
    print(path)


def compile_pair(folder: Path) -> None:
    """A zoo of `base` and `extract`."""
    models = assemble(folder.parent / "smollm2-family-models")
    wanted = {name: models[name] for name in ("base", "extract")}
    compile_models(wanted, folder, CompileOptions(verify=False, profile=False))


if __name__ == "__main__":
    main()
