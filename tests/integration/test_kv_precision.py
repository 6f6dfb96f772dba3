"""KV in 8 bits and in f16 through the whole runtime: cached, copied, moved, kept on disk or preempted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quiet
from quiet import words

from blockzoo.engines.kv_pages import kv_dtype, unpack_u8
from blockzoo.engines.openvino.engine import multiplies_int8
from blockzoo.runtime import LLM, EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.runtime.kv.sequence import TokenSequence

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
LONG = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
DOCUMENT = "def parse(line):\n    key, value = line.split('=')\n    return key.strip(), int(value)\n\n" * 3
QUESTION = "def main():\n    print(parse("


def serve(zoo: Path, **settings: Any) -> LLMEngine:
    settings = {"precision": "f32", "kv_precision": "u8", "kv_cache_bytes": 8 << 20} | settings
    return LLMEngine(zoo, EngineConfig(**settings))


def start(engine: LLMEngine, prompt: Any, params: SamplingParams = LONG, **how: Any) -> TokenSequence:
    """Run the prefill of a request that then goes on."""
    engine.add_request("r", how.pop("model", "base"), prompt, params, **how)
    while not any(output.token_ids for output in engine.step()):
        pass
    (seq,) = engine._scheduler.running
    return seq


def ask(engine: LLMEngine, prompt: Any, **how: Any) -> tuple[list[int], list[float], int]:
    """Tokens, their log-probabilities, and how many tokens of the prompt came from the cache."""
    return quiet.ask(engine, how.pop("model", "base"), prompt, GREEDY, **how)


def kv_of(engine: LLMEngine, seq: TokenSequence, num_tokens: int) -> np.ndarray:
    """K and V of the first tokens as pages hold them: [2, layers, tokens, heads, width]."""
    (executor,) = engine._zoo.executors.values()
    positions = np.arange(num_tokens)
    pages = seq.page_table[:, positions // 32]
    pools = [executor._device.to_host(pool) for pool in executor._pool.values()]
    return np.stack([pool[pages, :, positions % 32] for pool in pools])


@pytest.mark.parametrize("held", ["u8", "f16"])
def test_a_cached_prefix_is_a_cold_run_bit_for_bit(demo_zoo: Path, held: Any) -> None:
    """In chunks of a page, so that both compute the end of the prompt in calls of the same shape."""
    prompt = words(150, 1)
    cold = serve(demo_zoo, prefix_caching=False, max_num_batched_tokens=32, kv_precision=held)
    expected = kv_of(cold, start(cold, prompt), 150)
    cold.abort("r")
    answer = ask(cold, prompt)
    warm = serve(demo_zoo, max_num_batched_tokens=32, kv_precision=held)
    ask(warm, prompt[:130])
    seq = start(warm, prompt)
    found = kv_of(warm, seq, 150)
    assert (seq.num_cached, found.dtype) == (128, kv_dtype(held))
    np.testing.assert_array_equal(found, expected)
    warm.abort("r")
    ask(warm, prompt[:130], scope="other")
    assert ask(warm, prompt, scope="other") == (answer[0], answer[1], 128)


def test_a_page_that_begins_alike_is_copied_with_its_grids(demo_zoo: Path) -> None:
    first = words(70, 2)
    other = first[:45] + words(20, 3)
    engine, cold = serve(demo_zoo), serve(demo_zoo, prefix_caching=False)
    ask(engine, first)
    seq = start(engine, other)
    assert seq.num_cached == 45
    expected = kv_of(cold, start(cold, other), 65)
    found = kv_of(engine, seq, 65)
    np.testing.assert_allclose(unpack_u8(found), unpack_u8(expected), atol=0.05)
    assert (found[..., 8:] != expected[..., 8:]).mean() < 0.01
    for each in (engine, cold):
        each.abort("r")
    assert ask(engine, other)[0] == ask(cold, other)[0]


@pytest.mark.parametrize("backend", ["openvino", "reference"])
def test_a_moved_key_is_turned_and_rounded_once_more(demo_zoo: Path, backend: str) -> None:
    document = words(150, 4)
    donor, prompt = words(20, 5) + document + words(30, 6), words(37, 7) + document + words(25, 8)
    reuse = ReuseConfig(recompute=0.0, refresh=0, head=0)
    engine = serve(demo_zoo, approximate=reuse, backend=backend, device="cpu", num_threads=1)
    given = kv_of(engine, start(engine, donor), 170)[:, :, 20:]
    engine.abort("r")
    ask(engine, donor)
    seq = start(engine, prompt, kv_reuse="approx")
    assert seq.approx is not None
    assert np.flatnonzero(seq.approx.reused).tolist() == list(range(37, 187))
    found = kv_of(engine, seq, 187)[:, :, 37:]
    np.testing.assert_array_equal(found[1], given[1])  # values do not move
    (executor,) = engine._zoo.executors.values()
    cos, sin = (table.astype(np.float64) for table in executor._rotation[seq.chain_index])
    half = cos.shape[1] // 2
    turn = (cos + 1j * sin)[17, :half]
    old = unpack_u8(given[0]).astype(np.float64)
    turned = (old[..., :half] + 1j * old[..., half:]) * turn
    expected = np.concatenate([turned.real, turned.imag], -1)
    step = (expected.max(-1) - expected.min(-1)) / 255
    assert (np.abs(unpack_u8(found[0]) - expected).max(-1) <= 0.501 * step + 1e-5).all()
    assert np.abs(unpack_u8(found[0]) - old).max() > 10 * step.max()
    deviations = executor.kv.values(seq.page_table, np.arange(37, 187))
    np.testing.assert_array_equal(deviations, unpack_u8(given[1]))


@pytest.mark.parametrize("selector", ["query", "importance*deviation"])
def test_what_is_recomputed_is_a_full_prefill(demo_zoo: Path, selector: Any) -> None:
    """Scores of attention and deviations of V are read from pages in 8 bits."""
    document = words(150, 4)
    donor, prompt = words(20, 5) + document + words(30, 6), words(37, 7) + document + words(25, 8)
    reuse = ReuseConfig(recompute=0.999, pointed=1.0, refresh=0, head=0, selector=selector)
    engine = serve(demo_zoo, approximate=reuse)
    ask(engine, donor)
    found = ask(engine, prompt, kv_reuse="approx")
    expected = ask(serve(demo_zoo, prefix_caching=False), prompt)
    assert found[0] == expected[0]
    assert found[1] == pytest.approx(expected[1], abs=0.02)


@pytest.mark.parametrize("backend", ["openvino", "reference"])
def test_a_moved_key_in_f16_is_turned_and_rounded_once_more(demo_zoo: Path, backend: str) -> None:
    document = words(150, 4)
    donor, prompt = words(20, 5) + document + words(30, 6), words(37, 7) + document + words(25, 8)
    found = {}
    for held in ("f32", "f16"):
        reuse = ReuseConfig(recompute=0.0, refresh=0, head=0)
        settings = {"approximate": reuse, "backend": backend, "device": "cpu", "num_threads": 1}
        engine = serve(demo_zoo, kv_precision=held, **settings)
        ask(engine, donor)
        seq = start(engine, prompt, kv_reuse="approx")
        found[held] = kv_of(engine, seq, 187)[:, :, 37:]
    assert found["f16"].dtype == np.float16
    np.testing.assert_allclose(
        found["f16"].astype(np.float32), found["f32"], atol=2e-3 * np.abs(found["f32"]).max()
    )


@pytest.mark.parametrize(("held", "share"), [("u8", 0.35), ("f16", 0.6)])
def test_documents_on_disk_are_those_of_their_precision(
    demo_zoo: Path, tmp_path: Path, held: Any, share: float
) -> None:
    def published(engine: LLMEngine) -> list[np.ndarray]:
        publication = next(iter(engine._publisher._published["doc"].places.values())).publication
        (executor,) = engine._zoo.executors.values()
        return [kv for node in publication.nodes for kv in executor.kv.read(node.pages)]

    first = serve(demo_zoo, kv_cache_dir=str(tmp_path), kv_precision=held)
    assert first.publish("doc", DOCUMENT, ["base"]).num_loaded == 0
    files = set(tmp_path.iterdir())
    size = sum(file.stat().st_size for file in files)
    second = serve(demo_zoo, kv_cache_dir=str(tmp_path), kv_precision=held)
    assert second.publish("doc", DOCUMENT, ["base"]).num_loaded == 1
    for computed, loaded in zip(published(first), published(second), strict=True):
        assert loaded.dtype == kv_dtype(held)
        np.testing.assert_array_equal(computed, loaded)
    asked = {"documents": [DOCUMENT]}
    assert ask(first, QUESTION, **asked) == ask(second, QUESTION, **asked)
    plain = serve(demo_zoo, kv_cache_dir=str(tmp_path), kv_precision=None)
    assert plain.publish("doc", DOCUMENT, ["base"]).num_loaded == 0
    assert plain.metrics().document_rejects_total == 0
    others = set(tmp_path.iterdir()) - files  # each precision has its own
    assert len(others) == len(files)
    assert size < share * sum(file.stat().st_size for file in others)


def test_preempted_requests_and_all_models_together(demo_zoo: Path) -> None:
    """Equal to those alone, up to where a sum in another order moves a value to the next step."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    settings: dict[str, Any] = {"precision": "f32", "kv_precision": "u8"}
    crowded = LLM(demo_zoo, kv_cache_bytes=1 << 19, **settings)
    models = [crowded.models[i % len(crowded.models)] for i in range(16)]
    prompts = [rng.integers(2, 2048, int(rng.integers(1, 120))).tolist() for _ in models]
    together = crowded.generate(models, prompts, params, progress=False)
    assert crowded.engine.metrics().preemptions_total > 0
    quiet = LLM(demo_zoo, kv_cache_bytes=8 << 20, prefix_caching=False, **settings)
    alone = [quiet.generate(m, [p], params, progress=False)[0] for m, p in zip(models, prompts, strict=True)]
    same = [a.token_ids == b.token_ids for a, b in zip(together, alone, strict=True)]
    assert sum(same) >= 15, same


def test_torch_gives_the_tokens_of_openvino(architecture_zoo: Path) -> None:
    """Of every architecture: windows, biases, norms, stretched rotary embeddings; near f32's own."""

    def answers(**settings: Any) -> list[tuple[int, ...]]:
        llm = LLM(architecture_zoo, **({"precision": "f32", "kv_cache_bytes": 8 << 20} | settings))
        prompts = [words(40, seed) for seed in range(len(llm.models))]
        found = llm.generate(
            list(llm.models), prompts, replace(GREEDY, max_tokens=4, logprobs=None), progress=False
        )
        return [completion.token_ids for completion in found]

    exact, packed = answers(), answers(kv_precision="u8")
    torch = answers(kv_precision="u8", backend="reference", device="cpu", num_threads=1)
    pairs = list(zip(packed, torch, exact, strict=True))
    assert sum(a == b for a, b, _ in pairs) >= len(pairs) - 1, pairs
    assert sum(a == c for a, _, c in pairs) >= len(pairs) - 3, pairs


def test_what_may_be_asked_for_and_what_it_gives(demo_zoo: Path) -> None:
    with pytest.raises(
        InvalidRequestError, match="kv_precision is 'u4'; expected f32, bf16, f16, u8, auto or None"
    ):
        EngineConfig(kv_precision="u4")  # type: ignore[arg-type]
    plain = serve(demo_zoo, kv_precision="auto")  # its models were not verified
    packed = serve(demo_zoo)
    assert "kv" not in plain.engine_facts
    assert packed.engine_facts["kv"] == "u8"
    if multiplies_int8():
        assert serve(demo_zoo, int8_activations=True, kv_precision=None).engine_facts["kv"] == "f16"
    (family,) = packed._zoo.caches
    more = packed._zoo.caches[family].pool.num_pages / plain._zoo.caches[family].pool.num_pages
    assert more == pytest.approx(4 * family.head_dim / (family.head_dim + 8), rel=0.01)
