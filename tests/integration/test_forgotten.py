"""What models leave behind when they are gone: nothing that piles up as ever others come."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft

FAST = CompileOptions(verify=False, profile=False, share="exact")
PROMPT = list(range(5, 75))
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)


def reached(start: object) -> Iterator[object]:
    """All that an object keeps alive, without modules and classes."""
    seen, todo = {id(start)}, [start]
    while todo:
        item = todo.pop()
        yield item
        found = gc.get_referents(item)
        if isinstance(item, FunctionType):  # not what its module has
            found = [item.__closure__, item.__defaults__, item.__kwdefaults__]
        elif isinstance(item, dict):  # else not the keys where all are text
            found = [*item.keys(), *item.values()]
        for other in found:
            if id(other) not in seen and not isinstance(other, (ModuleType, type)):
                seen.add(id(other))
                todo.append(other)


def test_names_and_adapters_of_models_that_are_gone_are_forgotten(
    architectures: dict[str, Path],
    make_lora: Callable[[Path, Path, int, dict[str, Any]], None],
    tmp_path: Path,
) -> None:
    base, zoo = architectures["llama-gqa-untied"], tmp_path / "zoo"
    compile_models({"base": base}, zoo, FAST)
    config = EngineConfig(
        precision="f32", enable_lora=True, kv_cache_bytes=8 << 20, adapter_cache_bytes=4096, speculate="auto"
    )
    engine = LLMEngine(zoo, config)
    names = [f"guest-{i}" for i in range(3)]
    adapters: set[str] = set()
    for seed, name in enumerate(names):
        make_lora(base, tmp_path / name, seed, {"r": 4, "target_modules": ["q_proj", "up_proj"]})
        compile_models({name: tmp_path / name}, zoo, FAST, remove=tuple(names[seed - 1 : seed]))
        engine.reload()
        adapters |= set(engine._zoo.manifest.models[name].adapters.values())
        engine.add_request(name, name, PROMPT, GREEDY)
        engine.count_refusal(engine.prepare(f"{name} refused", name, PROMPT, GREEDY))
        while engine.has_unfinished():
            engine.step()
    assert engine.metrics().adapter_loads_total == len(adapters)
    compile_models({}, zoo, FAST, remove=(names[-1],))
    assert engine.reload().removed == (names[-1],)
    while engine.settle():
        pass
    engine.reload()
    gc.collect()
    told = [item for item in reached(engine) if isinstance(item, str)]
    assert {"base", "f32"} <= set(told)
    assert [text for text in told if any(name in text for name in names[:-1])] == []  # but for the latest
    assert engine.metrics().adapter_bytes == 0
    assert not (engine._make.adapters._loaded.keys() | engine._make.adapters._dropped) & adapters
