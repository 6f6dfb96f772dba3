"""The runtime: requests for any model of a zoo -> tokens, from one process and one KV pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockzoo.runtime.api.request import RequestOutput, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from blockzoo.runtime.llm import LLM, Completion
    from blockzoo.runtime.serve.config import EngineConfig
    from blockzoo.runtime.serve.engine_thread import EngineThread
    from blockzoo.runtime.serve.llm_engine import LLMEngine
    from blockzoo.runtime.serve.metrics import Metrics

__all__ = [
    "LLM",
    "Completion",
    "EngineConfig",
    "EngineThread",
    "LLMEngine",
    "Metrics",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprob",
]

_HOMES = {
    "LLM": "llm",
    "Completion": "llm",
    "EngineConfig": "serve.config",
    "EngineThread": "serve.engine_thread",
    "LLMEngine": "serve.llm_engine",
    "Metrics": "serve.metrics",
}


def __getattr__(name: str) -> object:
    """Import on first use what pulls in an engine backend."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
