"""Engines whose blocks are in two workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.workers.group import WorkerGroup

SETTINGS: dict[str, Any] = {
    "precision": "f32",
    "kv_cache_bytes": 32 << 20,
    "num_threads": 1,
    "max_num_batched_tokens": 256,
    "kv_sharing": "scope",
}


@contextmanager
def over_two(zoo: Path) -> Iterator[LLMEngine]:
    """One that ends with the block."""
    engine = LLMEngine(zoo, EngineConfig(workers=2, **SETTINGS))
    yield engine
    engine.close()


def group_of(engine: LLMEngine) -> WorkerGroup:
    """Its workers."""
    assert engine._zoo.workers is not None
    return engine._zoo.workers.group
