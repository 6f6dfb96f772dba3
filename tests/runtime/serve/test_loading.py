"""How the KV pool is split between geometries, and what is said of models that it bounds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blockzoo.runtime import EngineConfig, LLMEngine
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.exec.topology import ChainPlan, Family, Topology
from blockzoo.runtime.serve.making import pages_per_family

MAKER: Any = SimpleNamespace(precision="bf16", kv_precision="bf16")
LARGE, SMALL = Family(4096, 8, 128), Family(768, 4, 64)


def topology(*models: tuple[Family, int]) -> Topology:
    chains = tuple(ChainPlan(family, "e", (), layers, (), 10) for family, layers in models)
    return Topology((), chains, {f"m{i}": i for i in range(len(chains))}, {})


def test_one_large_model_beside_many_small_ones_gets_what_its_tokens_take() -> None:
    models = topology((LARGE, 32), *[(SMALL, 12)] * 19)
    pages = pages_per_family(models, EngineConfig(kv_cache_bytes=1 << 30), MAKER)
    tokens = {LARGE: pages[LARGE] // 32 * 32, SMALL: pages[SMALL] // 12 * 32}
    # every model gets the same number of tokens; those of a family share them
    assert tokens[SMALL] / tokens[LARGE] == pytest.approx(19, rel=0.01)
    page_bytes = {family: 2 * 32 * family.num_kv_heads * family.head_dim * 2 for family in pages}
    used = sum(pages[family] * page_bytes[family] for family in pages)
    assert (1 << 30) - sum(page_bytes.values()) <= used <= 1 << 30


def test_the_need_that_is_named_suffices() -> None:
    models = topology((LARGE, 32), (SMALL, 12))
    with pytest.raises(InvalidRequestError, match="raise it") as refused:
        pages_per_family(models, EngineConfig(kv_cache_bytes=1 << 20), MAKER)
    need = int(str(refused.value).split("needs ")[1].split(":")[0])
    assert pages_per_family(models, EngineConfig(kv_cache_bytes=need), MAKER)[LARGE] >= 32


def test_models_that_the_pool_bounds_are_named(demo_zoo: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=1 << 20))
    (record,) = caplog.records
    message = record.getMessage()
    fits = engine.max_model_len("base")
    assert f"holds {fits} tokens" in message
    assert all(name in message for name in engine.models)
    caplog.clear()
    config = EngineConfig(precision="f32", kv_cache_bytes=1 << 20, max_model_len=fits)
    assert LLMEngine(demo_zoo, config).max_model_len("base") == fits
    LLMEngine(demo_zoo, EngineConfig(precision="f32", kv_cache_bytes=64 << 20))
    assert not caplog.records
