"""What each replica is thought to hold of whose KV, and how much work it has: where a request is cheapest.

Knows nothing of Ray, tokenizers or engines. Prompts are followed as chunks of text (or of token ids), keyed
by all that comes before them in their *lane*: whose KV it is. A replica that was sent a prompt is thought to
hold its chunks, until as many came since as its pools hold. It may be wrong either way, which costs time and
nothing else: what is cached is found by the engine itself, token by token.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

Name = TypeVar("Name", bound=Hashable)

CHUNK_CHARS = 64
CHUNK_IDS = 16
"""Tokens of a chunk of token ids."""
CHARS_PER_TOKEN = CHUNK_CHARS / CHUNK_IDS
"""Where nothing is known of the text: that of English."""
MAX_CHUNKS = 2048
"""Of a prompt that are looked at: 128 Ki characters."""
MOST_CHUNKS = 1 << 16
"""Kept for a replica, whatever its pools hold."""
_ANSWER_TOKENS = 64.0  # what an answer under way counts for, in tokens of a prompt
_WAITING = 0.5  # of work that is under way there: what is computed twice takes time and room from all
_ADAPTER_TOKENS = 64.0  # the same of an adapter that is read first
_HASH_KEY = os.urandom(16)  # so that no client can look for collisions


class Lane(NamedTuple):
    """Layers whose KV some models share: what stands for them, and their share of a model's layers."""

    key: str
    share: float


@dataclass(slots=True)
class _Sent:
    """A request that was sent to a replica and has not ended."""

    replica: Hashable
    tokens: float  # of work


@dataclass(slots=True)
class _Held:
    """What a replica is thought to hold, the least recently used first."""

    chunks: OrderedDict[bytes, None] = field(default_factory=OrderedDict)
    warm: OrderedDict[str, None] = field(default_factory=OrderedDict)  # models sent there since it told
    most_chunks: int = MOST_CHUNKS
    tokens: float = 0.0  # of work under way


class Prompt:
    """A prompt as it is followed.

    Args:
        scope: who may see its KV.
        lanes: of its model; shares add up to 1.
        parts: texts, or one list of token ids, in order.
        chars_per_token: of the texts, about.
    """

    def __init__(
        self,
        scope: str | None,
        lanes: Sequence[Lane],
        parts: Sequence[str | list[int]],
        chars_per_token: float = CHARS_PER_TOKEN,
    ) -> None:
        chunks = list(_chunks(parts, chars_per_token))
        self.num_tokens = sum(tokens for _, tokens in chunks)
        """About how many tokens it has."""
        self._tokens = [tokens for _, tokens in chunks]
        self._lanes = [(lane.share, list(_keys(scope, lane.key, chunks))) for lane in lanes]

    def known_tokens(self, chunks: Mapping[bytes, None]) -> float:
        """Tokens that need not be computed where some chunks are held, by share of the layers."""
        known = 0.0
        for share, keys in self._lanes:
            for key, tokens in zip(keys, self._tokens, strict=True):
                if key not in chunks:
                    break
                known += share * tokens
        return known

    def forgettable_first(self) -> Iterator[bytes]:
        """The keys of all chunks, those behind others before them."""
        for _, keys in self._lanes:
            yield from reversed(keys)


class Holdings:
    """Of all replicas, bounded by what they can hold. One thread at a time."""

    def __init__(self) -> None:
        self._held: dict[Hashable, _Held] = {}
        self._sent: dict[str, _Sent] = {}

    def set_capacity(
        self, replica: Hashable, kv_tokens: int, chars_per_token: float = CHARS_PER_TOKEN
    ) -> None:
        """A replica's pools hold the KV of as many tokens."""
        most = max(1, min(MOST_CHUNKS, int(kv_tokens * chars_per_token / CHUNK_CHARS)))
        self._held.setdefault(replica, _Held()).most_chunks = most

    def rank(
        self,
        replicas: Sequence[Name],
        prompt: Prompt,
        cold: Collection[Hashable] = (),
    ) -> list[Name]:
        """Replicas, the cheapest first: by the tokens that come before the answer, of the prompt itself and
        of what waits there already. Equal ones in the order given.

        Args:
            cold: those that would read an adapter first.
        """
        return sorted(replicas, key=lambda replica: self.cost(replica, prompt, replica in cold))

    def cost(self, replica: Hashable, prompt: Prompt, cold: bool = False) -> float:
        """In tokens of a prompt."""
        held = self._held.get(replica)
        if held is None:
            return prompt.num_tokens + _ADAPTER_TOKENS * cold
        missing = prompt.num_tokens - prompt.known_tokens(held.chunks)
        return missing + _WAITING * held.tokens + _ADAPTER_TOKENS * cold

    def send(self, request_id: str, replica: Hashable, prompt: Prompt) -> None:
        """A request goes to a replica, which will hold its prompt; and to no other, where it did before."""
        self.end(request_id)
        held = self._held.setdefault(replica, _Held())
        work = prompt.num_tokens - prompt.known_tokens(held.chunks) + _ANSWER_TOKENS
        held.tokens += work
        self._sent[request_id] = _Sent(replica, work)
        for key in prompt.forgettable_first():
            held.chunks[key] = None
            held.chunks.move_to_end(key)
        while len(held.chunks) > held.most_chunks:
            held.chunks.popitem(last=False)

    def end(self, request_id: str, replica: Hashable | None = None) -> None:
        """A request is under way no more, on this replica (whichever it is on)."""
        sent = self._sent.get(request_id)
        if sent is None or replica not in (None, sent.replica):
            return
        del self._sent[request_id]
        held = self._held.get(sent.replica)
        if held is not None:
            held.tokens -= sent.tokens

    def forget(self, replica: Hashable) -> None:
        """A replica is no more."""
        self._held.pop(replica, None)
        for request_id in [name for name, sent in self._sent.items() if sent.replica == replica]:
            del self._sent[request_id]

    @property
    def replicas(self) -> tuple[Hashable, ...]:
        """Those of which anything is known."""
        return tuple(self._held)


def _chunks(parts: Sequence[str | list[int]], chars_per_token: float) -> Iterator[tuple[bytes, float]]:
    """Data of full chunks and about how many tokens each has; a rest at the end counts too."""
    left = MAX_CHUNKS
    for part in parts:
        size, per_token = (CHUNK_CHARS, chars_per_token) if isinstance(part, str) else (CHUNK_IDS, 1.0)
        for begin in range(0, len(part), size):
            if not left:
                return
            left -= 1
            piece = part[begin : begin + size]
            yield _data(piece), max(1.0, len(piece) / per_token)


def _data(piece: str | list[int]) -> bytes:
    if isinstance(piece, str):
        return piece.encode("utf-8", "surrogatepass")
    return b"".join(token.to_bytes(4, "little", signed=True) for token in piece)


def _keys(scope: str | None, lane: str, chunks: Sequence[tuple[bytes, float]]) -> Iterator[bytes]:
    key = repr((scope, lane)).encode("utf-8", "surrogatepass")
    for data, _ in chunks:
        key = hashlib.blake2b(key + data, digest_size=16, key=_HASH_KEY).digest()
        yield key
