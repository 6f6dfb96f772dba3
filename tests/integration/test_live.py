"""Models with blocks of their own that come, change and go while engines serve: no restart, equal answers."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patience import PATIENCE_S

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, EngineConfig, EngineThread, LLMEngine, RequestOutput, SamplingParams
from blockzoo.runtime.api.errors import UnknownModelError
from blockzoo.runtime.exec.topology import plan_topology
from blockzoo.zoo.store import Zoo, block_path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_k=50, seed=7, ignore_eos=True)
SETTINGS: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 32 << 20, "kv_sharing": "scope"}
FAST = CompileOptions(verify=False, profile=False, share="exact")
REPLACING = CompileOptions(verify=False, profile=False, share="exact", replace=True)
PROMPT = np.random.default_rng(0).integers(2, 2048, 70).tolist()
TUNED = {  # weights that are changed: what the model has of its own
    "top": ["layers.2."],
    "ffn": ["layers.2.mlp"],
    "upper": ["layers.1.", "layers.2."],
    "middle": ["layers.1."],
    "bottom": ["layers.0."],
    "whole": [""],
    "top2": ["layers.2."],
}
LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("base", {"r": 4, "target_modules": ["q_proj", "v_proj"]}),
    "lora-top": ("base", {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2]}),
}
OTHER = "qwen3-qk-norm"  # of another head size: it meets nobody


def tune(base: Path, folder: Path, parts: list[str], seed: int) -> Path:
    """A full fine-tune, made up: random changes of the weights whose names have one of the parts."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        if any(part in name for part in parts):
            noise = torch.randn(tensors[name].shape, generator=generator)
            tensors[name] = tensors[name] + 0.05 * noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folders(
    architectures: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_lora: Callable[[Path, Path, int, dict[str, Any]], None],
) -> dict[str, Path]:
    root, base = tmp_path_factory.mktemp("tuned"), architectures["llama-gqa-untied"]
    found = {"base": base, "other": architectures[OTHER]}
    for seed, (name, parts) in enumerate(TUNED.items()):
        found[name] = tune(base, root / name, parts, seed)
    for seed, (name, (_, settings)) in enumerate(LORAS.items()):
        make_lora(base, root / name, seed, settings)
        found[name] = root / name
    return found


@pytest.fixture(scope="module")
def all_zoo(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    zoo = tmp_path_factory.mktemp("all") / "zoo"
    compile_models(folders, zoo, FAST)
    return zoo


class Expected:
    """What each model answers in a zoo that held all of them from the start, asked alone."""

    def __init__(self, zoo: Path) -> None:
        self.llm = LLM(zoo, **SETTINGS)
        self.known: dict[Any, tuple[int, ...]] = {}

    def __call__(
        self, model: str, prompt: list[int] = PROMPT, params: SamplingParams = GREEDY
    ) -> tuple[int, ...]:
        key = model, tuple(prompt), params.max_tokens, params.temperature, params.seed
        if key not in self.known:
            (done,) = self.llm.generate(model, [prompt], params, kv_reuse="off", progress=False)
            self.known[key] = done.token_ids
        return self.known[key]


@pytest.fixture(scope="module")
def expected(all_zoo: Path) -> Expected:
    answers = Expected(all_zoo)
    names = ["base", *TUNED, *LORAS]
    assert len({answers(name) for name in names}) == len(names)
    return answers


def add(zoo: Path, folders: dict[str, Path], *names: str, remove: tuple[str, ...] = ()) -> None:
    compile_models({name: folders[name] for name in names}, zoo, FAST, remove=remove)


def run(engine: LLMEngine, steps: int | None = None) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = defaultdict(list)  # steps may leave some out
    while engine.has_unfinished() and steps != 0:
        for output in engine.step():
            assert output.error is None, output.error
            outputs[output.request_id].append(output)
        steps = None if steps is None else steps - 1
    return outputs


def tokens(*parts: list[RequestOutput]) -> tuple[int, ...]:
    return tuple(token for part in parts for output in part for token in output.token_ids)


def ask(engine: LLMEngine, *names: str) -> dict[str, tuple[int, ...]]:
    for name in names:
        engine.add_request(name, name, PROMPT, GREEDY)
    return {name: tokens(parts) for name, parts in run(engine).items()}


def spans(engine: LLMEngine) -> set[tuple[str, ...]]:
    return {span.block_ids for span in engine._zoo.topology.spans}


def planned(zoo: Path) -> set[tuple[str, ...]]:
    return {span.block_ids for span in plan_topology(Zoo.open(zoo).manifest).spans}


def engines(engine: LLMEngine) -> list[Any]:
    return [weakref.ref(e) for executor in engine._zoo.executors.values() for e in executor._engines.values()]


# ---- models come


@pytest.mark.parametrize(
    "name",
    [
        "top",
        "middle",
        "whole",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("ffn", "upper", "bottom")),
    ],
)
def test_a_model_joins_those_that_run(
    name: str, folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    """Wherever it parts from the others: all answer as if together from the start."""
    add(tmp_path, folders, "base", "lora")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    for model in ("base", "lora"):
        engine.add_request(f"{model} greedy", model, PROMPT, GREEDY)
        engine.add_request(f"{model} sampled", model, PROMPT, SAMPLED)
        engine.add_request(f"{model} uncached", model, PROMPT, GREEDY, kv_reuse="off")
    before = run(engine, 6)
    add(tmp_path, folders, name)
    found = engine.reload()
    assert (found.added, found.waiting, found.left_out) == ((name,), {}, {})
    engine.check_integrity()
    engine.add_request("new", name, PROMPT, GREEDY)
    after = run(engine)
    for model in ("base", "lora"):
        for how, params in (("greedy", GREEDY), ("sampled", SAMPLED), ("uncached", GREEDY)):
            found_tokens = tokens(before[f"{model} {how}"], after[f"{model} {how}"])
            assert found_tokens == expected(model, params=params), (model, how)
    assert tokens(after["new"]) == expected(name)
    assert ask(engine, "base", "lora", name) == {n: expected(n) for n in ("base", "lora", name)}
    engine.check_integrity()
    assert spans(engine) == planned(tmp_path)


def test_what_is_cached_is_shared_with_who_comes(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    assert ask(engine, "base") == {"base": expected("base")}
    pages = engine.metrics().pages_cached
    add(tmp_path, folders, "ffn", "top")
    engine.reload()
    assert engine.metrics().pages_cached == pages
    engine.check_integrity()
    engine.add_request("ffn", "ffn", PROMPT, GREEDY)  # of the last feed-forward block: all KV is the base's
    last = run(engine)["ffn"]
    assert (tokens(last), last[-1].num_cached_tokens) == (expected("ffn"), 64)
    engine.add_request("base", "base", PROMPT, GREEDY)
    last = run(engine)["base"]
    assert (tokens(last), last[-1].num_cached_tokens) == (expected("base"), 64)
    assert ask(engine, "top") == {"top": expected("top")}  # its two lower layers are there
    assert engine.metrics().prefix_hit_tokens["0-1"] >= 64


def test_a_prefill_in_the_middle_goes_on(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "top")
    prompt = np.random.default_rng(5).integers(2, 2048, 300).tolist()
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, max_num_batched_tokens=64))
    engine.add_request("base", "base", prompt, GREEDY)
    run(engine, 2)
    engine.add_request("top", "top", prompt, GREEDY)  # starts where the base has come to, in the lower layers
    before = run(engine, 1)
    add(tmp_path, folders, "upper", "middle")
    engine.reload()
    engine.check_integrity()
    engine.add_request("upper", "upper", prompt, GREEDY)
    after = run(engine)
    for name in ("base", "top", "upper"):
        assert tokens(before[name], after[name]) == expected(name, prompt), name


def test_models_with_approximate_kv_go_on(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    """All that is taken over is computed anew here, so that answers are exact."""
    add(tmp_path, folders, "base", "top")
    config = EngineConfig(
        **SETTINGS, approximate={"recompute": 0.999, "edit_recompute": 0.999, "pointed": 1.0, "refresh": 0}
    )
    engine = LLMEngine(tmp_path, config)
    document = np.random.default_rng(6).integers(2, 2048, 160).tolist()
    prompts = [[*PROMPT[i:j], *document, *PROMPT[-9:]] for i, j in ((0, 3), (3, 20), (20, 60))]
    engine.add_request("donor", "base", prompts[0], GREEDY)
    run(engine)
    for i, prompt in enumerate(prompts[1:]):
        engine.add_request(str(i), "base", prompt, LONG, kv_reuse="approx")
    before = run(engine, 8)
    assert engine.metrics().approximate_tokens_total > 0
    seqs = [request.seq for request in engine._requests.values()]
    add(tmp_path, folders, "middle")
    engine.reload()
    assert all(seq.approx is not None and seq.num_preemptions == 0 for seq in seqs)
    after = run(engine)
    for i, prompt in enumerate(prompts[1:]):
        assert tokens(before[str(i)], after[str(i)]) == expected("base", prompt, LONG)
    taken = engine.metrics().approximate_tokens_total
    engine.add_request("again", "base", [*PROMPT[5:55], *document, 7], GREEDY, kv_reuse="approx")
    assert tokens(run(engine)["again"]) == expected("base", [*PROMPT[5:55], *document, 7])
    assert engine.metrics().approximate_tokens_total > taken  # from donors of before


# ---- models go


def test_a_model_that_goes_gives_back_what_only_it_used(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "top", "lora")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    ask(engine, "base", "top", "lora")
    old, blocks = engines(engine), set(engine._zoo.blocks)
    engine.add_request("base", "base", PROMPT, GREEDY)
    before = run(engine, 4)
    add(tmp_path, folders, remove=("top",))
    gc.collect()
    gc.disable()  # what is let go is gone at once, and not when Python next looks for cycles
    try:
        found = engine.reload()
        assert not any(ref() for ref in old)  # the base's spans are one again, so all are other ones
    finally:
        gc.enable()
    assert (found.removed, engine.models) == (("top",), ("base", "lora"))
    assert spans(engine) == planned(tmp_path)
    assert len(blocks - set(engine._zoo.blocks)) == 2
    engine.check_integrity()
    assert tokens(before["base"], run(engine)["base"]) == expected("base")
    with pytest.raises(UnknownModelError, match="top"):
        engine.add_request("late", "top", PROMPT, GREEDY)
    assert ask(engine, "base", "lora") == {n: expected(n) for n in ("base", "lora")}


def test_requests_of_a_model_that_goes_end_as_they_would_have(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "upper", "lora-top")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, max_num_seqs=3, max_num_batched_tokens=64))
    for i in range(3):  # the last wait when it goes
        for name in ("upper", "lora-top"):
            engine.add_request(f"{name} {i}", name, PROMPT, GREEDY)
    before = run(engine, 8)
    add(tmp_path, folders, remove=("upper", "lora-top"))
    assert engine.reload().removed == ("lora-top", "upper")
    assert engine.models == ("base",)
    add(tmp_path, folders, "middle")  # cuts the spans of those that are gone, too
    assert engine.reload().added == ("middle",)
    after: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            after.setdefault(output.request_id, []).append(output)
    for i in range(3):
        assert tokens(before[f"upper {i}"], after[f"upper {i}"]) == expected("upper")
        last = after[f"lora-top {i}"]
        if last[-1].error is None:
            assert tokens(before[f"lora-top {i}"], last) == expected("lora-top")
        else:  # its file was gone before it was first read
            assert "missing" in last[-1].error
            assert not before.get(f"lora-top {i}")
    assert spans(engine) != planned(tmp_path)
    assert engine.may_settle
    assert engine.settle()
    assert not engine.may_settle
    assert spans(engine) == planned(tmp_path)
    assert ask(engine, "base", "middle") == {n: expected(n) for n in ("base", "middle")}
    engine.check_integrity()


def test_a_running_adapter_goes_on_when_its_file_is_gone_and_its_span_is_cut(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "lora")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, adapter_cache_bytes=1))
    engine.add_request("lora", "lora", PROMPT, GREEDY)
    before = run(engine, 5)
    add(tmp_path, folders, "middle", remove=("lora",))
    engine.reload()
    assert tokens(before["lora"], run(engine)["lora"]) == expected("lora")


def test_models_are_replaced_and_old_requests_keep_the_old_ones(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    compile_models({"base": folders["base"], "tenant": folders["top"]}, tmp_path, FAST)
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    order = ["top2", "upper", "whole", "middle", "top"]
    engine.add_request("0", "tenant", PROMPT, GREEDY)
    parts: dict[str, list[RequestOutput]] = {}
    for number, name in enumerate(order, 1):
        for request_id, more in run(engine, 3).items():
            parts.setdefault(request_id, []).extend(more)
        compile_models({"tenant": folders[name]}, tmp_path, REPLACING)
        assert engine.reload().replaced == ("tenant",)
        engine.check_integrity()
        engine.add_request(str(number), "tenant", PROMPT, GREEDY)
    for request_id, more in run(engine).items():
        parts.setdefault(request_id, []).extend(more)
    found = [tokens(parts[str(number)]) for number in range(6)]
    assert found == [expected(name) for name in ("top", *order)]
    engine.settle()
    assert spans(engine) == planned(tmp_path)
    assert not engine._zoo.gone


def test_a_base_is_replaced_under_its_adapters(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    """They stay adapters of the base that they were compiled with, whose blocks stay for them."""
    add(tmp_path, folders, "base", "lora")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    for name in ("base", "lora"):
        engine.add_request(f"early {name}", name, PROMPT, GREEDY)
    before = run(engine, 5)
    compile_models({"base": folders["middle"]}, tmp_path, REPLACING)
    assert engine.reload().replaced == ("base",)
    for name in ("base", "lora"):
        engine.add_request(name, name, PROMPT, GREEDY)
    after = run(engine)
    for name in ("base", "lora"):
        assert tokens(before[f"early {name}"], after[f"early {name}"]) == expected(name)
    assert tokens(after["base"]) == expected("middle")
    assert tokens(after["lora"]) == expected("lora")


def test_a_request_that_was_prepared_before_its_model_went_is_told(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base", "top")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    prepared = {name: engine.prepare(name, name, PROMPT, GREEDY) for name in ("base", "top")}
    add(tmp_path, folders, "middle", remove=("top",))
    engine.reload()
    engine.enqueue(prepared["base"])  # its segments and its number are others now
    with pytest.raises(UnknownModelError, match="was removed or replaced while the request was on its way"):
        engine.enqueue(prepared["top"])
    assert tokens(run(engine)["base"]) == expected("base")
    engine.check_integrity()


# ---- families, memory, damage


def test_a_model_of_another_shape_gets_a_pool_of_its_own(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    pages = engine.metrics().pages_total
    engine.add_request("base", "base", PROMPT, GREEDY)
    before = run(engine, 4)
    add(tmp_path, folders, "other")
    assert engine.reload().added == ("other",)
    sizes = {family: cache.pool.num_pages for family, cache in engine._zoo.caches.items()}
    whole = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    assert sizes == {family: cache.pool.num_pages for family, cache in whole._zoo.caches.items()}
    assert engine.metrics().pages_total == sum(sizes.values())
    engine.add_request("other", "other", PROMPT, GREEDY)
    after = run(engine)
    assert tokens(before["base"], after["base"]) == expected("base")
    assert tokens(after["other"]) == expected("other")
    engine.check_integrity()
    kept = [weakref.ref(cache) for cache in engine._zoo.caches.values()]
    add(tmp_path, folders, remove=("other",))
    engine.reload()
    gc.collect()
    assert sum(ref() is not None for ref in kept) == 1
    assert engine.metrics().pages_total == pages  # the base has all of them again
    assert ask(engine, "base") == {"base": expected("base")}
    engine.check_integrity()


def test_a_pool_gives_no_page_that_a_request_needs(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base")
    settings = SETTINGS | {"kv_cache_bytes": 2 * 32 * 2 * 16 * 4 * 3 * 12}  # 12 pages a layer
    engine = LLMEngine(tmp_path, EngineConfig(**settings))
    assert engine.metrics().pages_total == 36
    long = SamplingParams(max_tokens=310, temperature=0.0, ignore_eos=True)
    engine.add_request("base", "base", PROMPT, long)  # needs all of it
    before = run(engine, 4)
    add(tmp_path, folders, "other")
    found = engine.reload()
    assert (found.added, found.waiting.keys()) == ((), {"other"})
    assert "running requests hold the memory" in found.waiting["other"]
    assert engine.metrics().pages_total == 36
    assert tokens(before["base"], run(engine)["base"]) == expected("base", params=long)
    assert engine.reload().added == ("other",)
    assert ask(engine, "other") == {"other": expected("other")}
    engine.check_integrity()


def test_what_does_not_fit_in_memory_waits(
    folders: dict[str, Path], expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, folders, "base", "lora")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    add(tmp_path, folders, "whole", "lora-top", "top")
    size = sum(t.data.nbytes for i in engine._zoo.blocks.values() for t in i.tensors.values())
    monkeypatch.setattr("blockzoo.runtime.serve.reload.available_memory", lambda: size // 4)
    found = engine.reload()
    assert found.waiting.keys() == {"lora-top", "top", "whole"}
    assert "of memory are available" in found.waiting["whole"]
    assert engine.models == ("base", "lora")
    monkeypatch.setattr("blockzoo.runtime.serve.reload.available_memory", lambda: 2 * size)
    assert engine.reload().added == ("lora-top", "top")  # the base's spans, and one layer more
    monkeypatch.undo()
    assert engine.reload().added == ("whole",)
    names = ("base", "lora", "lora-top", "top", "whole")
    assert ask(engine, *names) == {n: expected(n) for n in names}


def test_engines_of_models_that_are_gone_are_kept_while_memory_is_short(
    folders: dict[str, Path], expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(tmp_path, folders, "base", "top")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    add(tmp_path, folders, remove=("top",))
    monkeypatch.setattr("blockzoo.runtime.serve.reload.available_memory", lambda: 1)
    assert engine.reload().removed == ("top",)
    assert spans(engine) != planned(tmp_path)
    assert not engine.may_settle  # not again at once
    monkeypatch.undo()
    engine.reload()
    assert spans(engine) == planned(tmp_path)
    assert ask(engine, "base") == {"base": expected("base")}


def test_what_cannot_be_served_keeps_nobody_else_away(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tune(folders["base"], tmp_path / "broken", ["layers.2."], 9)
    tensors = load_file(broken / "model.safetensors")
    name = max(name for name in tensors if "down_proj" in name)
    tensors[name] = tensors[name] * 0 + 3e38
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    zoo = tmp_path / "zoo"
    add(zoo, folders, "base")
    engine = LLMEngine(zoo, EngineConfig(**SETTINGS))
    engine.add_request("early", "base", PROMPT, GREEDY)
    before = run(engine, 4)
    compile_models({"broken": broken, "middle": folders["middle"], "top": folders["top"]}, zoo, FAST)
    manifest = Zoo.open(zoo).manifest
    (own, *_) = [i for i in manifest.models["top"].chain if i not in manifest.models["base"].chain]
    content = block_path(zoo, own).read_bytes()
    block_path(zoo, own).write_bytes(content[:-5])
    found = engine.reload()
    assert (found.added, found.left_out.keys()) == (("middle",), {"broken", "top"})
    assert "not finite" in found.left_out["broken"]
    assert "corrupt" in found.left_out["top"]
    engine.add_request("middle", "middle", PROMPT, GREEDY)
    after = run(engine)
    assert tokens(before["early"], after["early"]) == expected("base")
    assert tokens(after["middle"]) == expected("middle")
    block_path(zoo, own).write_bytes(content)
    found = engine.reload()
    assert (found.added, found.left_out.keys()) == (("top",), {"broken"})
    assert ask(engine, "base", "top") == {n: expected(n) for n in ("base", "top")}


def test_an_engine_that_cannot_be_made_leaves_out_who_needs_it(
    folders: dict[str, Path], expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it is one of the base, which is cut for who comes."""
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    add(tmp_path, folders, "top", "whole")
    (last,) = (i for i in Zoo.open(tmp_path).manifest.models["base"].chain[5:6])
    make = engine._make.maker.span

    def span(blocks: Any, **settings: Any) -> Any:
        if any(block.id == last for block in blocks):
            raise RuntimeError("no room for it")
        return make(blocks, **settings)

    monkeypatch.setattr(engine._make.maker, "span", span)
    found = engine.reload()
    assert (found.added, dict(found.left_out)) == ((), dict.fromkeys(["top", "whole"], "no room for it"))
    assert ask(engine, "base") == {"base": expected("base")}
    monkeypatch.undo()
    assert engine.reload().added == ("top", "whole")
    assert ask(engine, "base", "top", "whole") == {n: expected(n) for n in ("base", "top", "whole")}


def test_a_block_that_was_damaged_since_is_not_compiled_anew(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    """Engines that run keep their weights; who would need new ones of that block is left out."""
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS))
    add(tmp_path, folders, "top")
    path = block_path(tmp_path, Zoo.open(tmp_path).manifest.models["base"].chain[2])
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-5] ^= 1
    path.unlink()
    path.write_bytes(content)
    found = engine.reload()
    assert (found.added, found.left_out.keys()) == ((), {"top"})
    assert "corrupt" in found.left_out["top"]
    assert ask(engine, "base") == {"base": expected("base")}
    path.write_bytes(whole)
    assert engine.reload().added == ("top",)
    assert ask(engine, "base", "top") == {n: expected(n) for n in ("base", "top")}


# ---- documents, threads, anything

TEXT = "The quick brown fox jumps over the lazy dog, and the dog barks. " * 12


def test_published_documents_follow(folders: dict[str, Path], tmp_path: Path) -> None:
    add(tmp_path, folders, "base")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS | {"kv_sharing": "model"}))
    document = engine.publish("all", TEXT)
    whole = document.num_tokens // 32 * 32

    def cached(model: str) -> int:
        engine.add_request("q", model, "And so", SamplingParams(max_tokens=1), documents=[TEXT])
        return run(engine)["q"][-1].num_cached_tokens

    for _ in range(2):
        pages = engine.metrics().document_pages
        add(tmp_path, folders, "top", "upper", "other")
        engine.reload()
        for name in ("base", "top", "upper", "other"):
            assert cached(name) == whole, name
        engine.check_integrity()
        add(tmp_path, folders, remove=("top", "upper", "other"))
        engine.reload()
        run(engine)  # documents follow
        engine.settle()
        assert spans(engine) == planned(tmp_path)
        assert (cached("base"), engine.metrics().document_pages) == (whole, pages)
        engine.check_integrity()
    engine.withdraw("all")
    assert engine.metrics().document_pages == 0


def test_models_come_and_go_beside_the_engine_thread(
    folders: dict[str, Path], expected: Expected, tmp_path: Path
) -> None:
    add(tmp_path, folders, "base")
    thread = EngineThread(tmp_path, EngineConfig(**SETTINGS))
    outputs: dict[str, list[RequestOutput]] = {}
    ended = threading.Semaphore(0)

    def ask_for(name: str, model: str, params: SamplingParams) -> None:
        def take(output: RequestOutput) -> None:
            outputs.setdefault(name, []).append(output)
            if output.finished:
                ended.release()

        thread.submit(name, model, PROMPT, params, take)

    order = [("top", ()), ("upper", ("top",)), ("whole", ("upper",)), ("top", ("whole",))]
    try:
        ask_for("stream", "base", LONG)
        for number, (name, remove) in enumerate(order):
            add(tmp_path, folders, name, remove=remove)
            assert thread.reload().added == (name,)
            ask_for(f"{number} {name}", name, GREEDY)
        for _ in range(5):
            assert ended.acquire(timeout=PATIENCE_S)
        add(tmp_path, folders, remove=("top",))
        thread.reload()
        ask_for("last", "base", GREEDY)
        assert ended.acquire(timeout=PATIENCE_S)
    finally:
        thread.close()
    assert tokens(outputs.pop("stream")) == expected("base", params=LONG)
    assert tokens(outputs.pop("last")) == expected("base")
    assert {key: tokens(parts) for key, parts in outputs.items()} == {k: expected(k[2:]) for k in outputs}
    assert len(outputs) == 4
    assert spans(thread.engine) == planned(tmp_path)
    thread.engine.check_integrity()


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 15))])
def test_answers_do_not_depend_on_who_comes_and_goes(
    seed: int, folders: dict[str, Path], all_zoo: Path, expected: Expected, tmp_path: Path
) -> None:
    """Random models under random names, at random moments, beneath random requests."""
    draw = random.Random(seed)
    known = [name for name in folders if name not in LORAS]
    zoo = tmp_path / "zoo"
    names = {"a": "base"}
    compile_models({"a": folders["base"]}, zoo, FAST)
    config = EngineConfig(
        **SETTINGS
        | {"kv_cache_bytes": draw.choice([1, 2, 32]) << 20, "kv_sharing": draw.choice(["scope", "model"])},
        max_num_seqs=draw.choice([3, 16]),
        max_num_batched_tokens=draw.choice([32, 100]),
        max_span_layers=draw.choice([None, None, 1]),
        boundary_cache_bytes=draw.choice([0, 64 << 20]),
        schedule=draw.choice(["hit-first", "fair"]),
    )
    engine = LLMEngine(zoo, config)
    prompts = [np.random.default_rng(i).integers(2, 2048, draw.randint(5, 200)).tolist() for i in range(4)]
    live: dict[str, tuple[str, list[int]]] = {}
    outputs: dict[str, list[int]] = {}
    seen = 0
    for step in range(60 if seed < 3 else 300):
        if draw.random() < 0.4 and len(live) < 12:
            name, prompt = draw.choice(sorted(names)), draw.choice(prompts)[: draw.randint(3, 200)]
            engine.add_request(str(step), name, prompt, GREEDY)
            live[str(step)], outputs[str(step)] = (names[name], prompt), []
        if draw.random() < 0.12:
            new = {n: draw.choice(known) for n in draw.sample(["a", "b", "c", "d"], draw.randint(1, 3))}
            remove = tuple(sorted(n for n in names if n not in new and draw.random() < 0.5))
            compile_models({n: folders[m] for n, m in new.items()}, zoo, REPLACING, remove=remove)
            names = {n: m for n, m in (names | new).items() if n not in remove}
            found = engine.reload()
            assert not found.left_out
            for name, why in found.waiting.items():
                assert "running requests hold" in why or "kv_cache_bytes" in why
                names.pop(name)
            for name in set(names) - set(engine.models):
                names.pop(name)
            if set(engine.models) != set(names):  # an older one of the name is served
                names = {n: m for n, m in names.items() if n in engine.models}
            if not names:
                break
        if draw.random() < 0.1 and engine.may_settle:
            engine.settle()
        for output in engine.step():
            assert output.error is None, output.error
            outputs[output.request_id] += output.token_ids
            if output.finished:
                model, prompt = live.pop(output.request_id)
                assert tuple(outputs[output.request_id]) == expected(model, prompt), (model, len(prompt))
                seen += 1
        engine.check_integrity()
    for request_id, parts in run(engine).items():
        model, prompt = live.pop(request_id)
        assert (*outputs[request_id], *tokens(parts)) == expected(model, prompt), (model, len(prompt))
        seen += 1
    assert seen > 5
    engine.settle()
    assert engine.metrics().pages_used == 0
    assert not engine._zoo.gone


def test_torch_engines_come_and_go_too(folders: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    add(tmp_path, folders, "base", "lora")
    engine = LLMEngine(tmp_path, EngineConfig(**SETTINGS, backend="reference", device="cpu"))
    weights = engine._make.maker.weights
    for name in ("base", "lora"):
        engine.add_request(f"early {name}", name, PROMPT, GREEDY)
    before, held = run(engine, 5), weights.num_bytes
    add(tmp_path, folders, "upper", "ffn", "other")
    found = engine.reload()
    assert (found.added, found.waiting.keys()) == (("ffn", "upper"), {"other"})
    assert "divides its memory at the start only" in found.waiting["other"]
    for name in ("upper", "ffn"):
        engine.add_request(name, name, PROMPT, GREEDY)
    after = run(engine)
    for name in ("base", "lora"):
        assert tokens(before[f"early {name}"], after[f"early {name}"]) == expected(name)
    assert [tokens(after[name]) for name in ("upper", "ffn")] == [expected("upper"), expected("ffn")]
    assert weights.num_bytes > held
    add(tmp_path, folders, remove=("upper", "ffn"))
    engine.reload()
    gc.collect()
    assert weights.num_bytes == held
    assert ask(engine, "base", "lora") == {n: expected(n) for n in ("base", "lora")}
