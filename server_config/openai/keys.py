"""API keys: who may ask what, how much at once and per minute, and whose cached KV they share.

The file has a line for each key: a name, the SHA-256 of the key in hex, and perhaps settings:

    # printf %s "$KEY" | sha256sum
    alice 2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90
    bot   81b637d8fcd2c6da6359e6963113a1170de795e4b725b84d1e0b4cfd9ec58ce9 models=chat,legal requests=4

    models=a,b            may be asked (default: all)
    kv_scope=s            keys of one scope share cached KV (default: the key's name)
    requests=n            answers that are generated for it at once (default: no limit)
    tokens_per_minute=n   of prompts and answers (default: no limit)
    weight=w              how much more (or less) than 1 it gets where others want the engine too

The file is read again when it has changed; one that is wrong leaves the keys as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blockzoo.runtime.serve.config import LEAST_WEIGHT, MOST_WEIGHT
from blockzoo.server_config.openai.errors import ApiError, full, unknown_model
from blockzoo.server_config.schema import MAX_SCOPE_CHARS
from blockzoo.zoo.errors import ZooError

_LOOK_EVERY_S = 1.0
_MAX_FILE_BYTES = 4 << 20
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SETTINGS = ("models", "kv_scope", "requests", "tokens_per_minute", "weight")


class KeysError(ZooError):
    """A file of keys that cannot be read; the message names the line, and no key."""


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the file; None is no limit."""

    name: str
    digest: str
    models: frozenset[str] | None
    kv_scope: str
    requests: int | None
    tokens_per_minute: int | None
    weight: float = 1.0

    @property
    def tenant(self) -> str:
        """Whose share of the engine its requests take; no model has such a name."""
        return f"key:{self.name}"

    def check_model(self, name: str) -> None:
        """Raises ApiError where the model may not be asked: as if it were not there."""
        if self.models is not None and name not in self.models:
            raise unknown_model(name)


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises KeysError."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise KeysError(f"{path} has more than {_MAX_FILE_BYTES} bytes; expected a line for each key")
        text = path.read_text("utf-8")
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KeysError(f"{path} is not UTF-8") from None
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if words:
            keys.append(_read_line(words, f"{path}:{number}"))
            for other in keys[:-1]:
                if other.name == keys[-1].name or other.digest == keys[-1].digest:
                    raise KeysError(f"{path}:{number}: the name or the key is that of {other.name!r}")
    if not keys:
        raise KeysError(f"{path} holds no keys: nobody could ask anything")
    return tuple(keys)


def _read_line(words: list[str], where: str) -> Key:
    # what is wrong may be a key that was pasted in the clear: it is not shown
    if not _NAME.fullmatch(words[0]):
        raise KeysError(f"{where}: the first word is no name; expected 1 to 64 letters, digits, . _ @ -")
    if len(words) < 2 or not _DIGEST.fullmatch(words[1].lower()):
        raise KeysError(f'{where}: the second word is no SHA-256 in hex: printf %s "$KEY" | sha256sum')
    settings: dict[str, str] = {}
    for word in words[2:]:
        name, _, value = word.partition("=")
        if name not in _SETTINGS or not value or name in settings:
            raise KeysError(f"{where}: expected name=value, each once, of {', '.join(_SETTINGS)}")
        settings[name] = value
    scope = settings.get("kv_scope", words[0])
    if len(scope) > MAX_SCOPE_CHARS:
        raise KeysError(f"{where}: kv_scope has {len(scope)} characters; at most {MAX_SCOPE_CHARS}")
    models = settings.get("models")
    return Key(
        words[0],
        words[1].lower(),
        None if models is None else frozenset(filter(None, models.split(","))),
        scope,
        _count(settings, "requests", where),
        _count(settings, "tokens_per_minute", where),
        _weight(settings.get("weight", "1"), where),
    )


def _count(settings: dict[str, str], name: str, where: str) -> int | None:
    value = settings.get(name)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,12}", value) or int(value) < 1:
        raise KeysError(f"{where}: {name} is {value!r:.40}; expected a whole number above 0")
    return int(value)


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
        expected = f"a number from {LEAST_WEIGHT} to {MOST_WEIGHT}"
        raise KeysError(f"{where}: weight is {text!r:.40}; expected {expected}")
    return weight


class Keyring:
    """The keys of a file as it is now.

    Args:
        say: tells whoever runs the server.

    Raises:
        KeysError: the file cannot be read.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._stamp = _stamp(path)
        self._keys = read_keys(path)
        self._looked = time.monotonic()

    def find(self, authorization: str | None) -> Key:
        """The key of a request's header. Raises ApiError."""
        self._look()
        scheme, _, given = (authorization or "").partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given:
            raise ApiError(401, "No API key was sent; expected the header Authorization: Bearer KEY.")
        digest = hashlib.sha256(given.encode("latin-1")).hexdigest()
        found = None
        for key in self._keys:  # all of them: the time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise ApiError(401, "The API key is not known here.", None, "invalid_api_key")
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_EVERY_S:
            return
        self._looked = now
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except KeysError as error:
            self._say(f"the keys stay as they were: {error}")
        else:
            self._say(f"{len(self._keys)} keys read from {self._path}")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class Quotas:
    """What each key uses now. Of one event loop."""

    def __init__(self) -> None:
        self._uses: dict[str, _Use] = {}

    def enter(self, key: Key | None, answers: int, tokens: int) -> Lease:
        """Begin some answers of a key whose prompts have about as many tokens. Raises ApiError."""
        if key is None:
            return Lease(None, 0, 0)
        use = self._uses.setdefault(key.name, _Use())
        if key.requests is not None and use.answers + answers > key.requests:
            raise full(
                f"{use.answers} answers are being generated for this key, of the {key.requests} that it may "
                "have at once; send it again later."
            )
        wait = use.refill(key.tokens_per_minute)
        if wait > 0:
            raise full(
                f"This key has used its {key.tokens_per_minute} tokens a minute; send it again in {wait} s.",
                wait,
            )
        use.answers += answers
        use.spent += tokens
        return Lease(use, answers, tokens)


class _Use:
    """Of one key."""

    def __init__(self) -> None:
        self.answers = 0
        self.spent = 0.0  # tokens; it runs off at the rate that the key may have
        self._when = time.monotonic()

    def refill(self, per_minute: int | None) -> int:
        """Let time pass; the seconds until a token is free, 0 where one is."""
        now = time.monotonic()
        elapsed, self._when = now - self._when, now
        if per_minute is None:
            self.spent = 0.0
            return 0
        self.spent = max(0.0, self.spent - elapsed * per_minute / 60)
        over = self.spent - per_minute
        return 0 if over < 0 else max(1, math.ceil(over * 60 / per_minute))


class Lease:
    """Answers that are being generated for a key."""

    def __init__(self, use: _Use | None, answers: int, estimate: int) -> None:
        self._use, self._answers, self._estimate = use, answers, estimate

    def spend(self, generated: int, prompt: int) -> None:
        """Count tokens; those of prompts take the place of their estimate, which stands where a client goes
        away before they are known."""
        if self._use is not None:
            known = min(prompt, self._estimate)
            self._estimate -= known
            self._use.spent += generated + prompt - known

    def end(self) -> None:
        """All answers have ended."""
        if self._use is not None:
            self._use.answers -= self._answers
