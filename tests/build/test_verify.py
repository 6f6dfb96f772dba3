"""Verification against the real engines: sound models pass with tiny errors, wrong ones are refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build import sources as build_sources
from blockzoo.build.cli import main
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.verify import NUM_GENERATED, PROMPTS, compare
from blockzoo.engines.base import EngineError, EngineMaker
from blockzoo.engines.choose import make_engines
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.zoo.blocks import Block
from blockzoo.zoo.manifest import LossFigures, LossRecord, ModelRecord
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import verification_text
from blockzoo.zoo.tensors import BlockTensor, TensorFile, from_f32, write_tensor_file

Records = dict[str, ModelRecord]


@pytest.fixture(scope="module")
def verified(
    checkpoints: dict[str, Path], make_adapter: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A zoo of every variant, a copy, a LoRA and an f32 checkpoint with a LoRA (blocks of mixed dtypes)."""
    import warnings

    root = tmp_path_factory.mktemp("verified")
    wide = Path(shutil.copytree(checkpoints["qwen2"], root / "wide"))
    file = TensorFile(checkpoints["qwen2"] / "model.safetensors")
    values = {name: from_f32(file.tensor(name).to_f32() + np.float32(1e-5), "f32") for name in file.names}
    (wide / "model.safetensors").unlink()
    write_tensor_file(wide / "model.safetensors", values, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adapter(checkpoints["qwen2"], root / "notes")
    models: dict[str, str | Path] = {**checkpoints, "copy": checkpoints["llama"], "wide": wide}
    models["notes"] = f"{root / 'notes'}@qwen2"
    models["wide-notes"] = f"{root / 'notes'}@wide"
    compile_models(models, root / "zoo")
    return root / "zoo"


def test_every_model_agrees_with_the_oracle(verified: Path) -> None:
    models = Zoo.open(verified).manifest.models
    assert len(models) == 10
    for name, record in models.items():
        assert record.verification is not None, name
        figures = record.verification.figures["f32"]
        assert figures.max_relative_error < 2e-5, name
        assert figures.greedy_agreement > 0.99, name
        assert record.verification.num_tokens == len(PROMPTS) * NUM_GENERATED
        for other in record.verification.figures.values():
            assert other.max_relative_error < 0.2, name


def test_what_kv_in_8_bits_loses_is_measured(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    options = CompileOptions(judge_kv=True, profile=False)
    compile_models({"m": checkpoints["qwen2"]}, tmp_path / "zoo", options)
    record = Zoo.open(tmp_path / "zoo").manifest.models["m"].verification
    assert record is not None
    assert record.kv is not None
    assert record.kv.num_tokens == record.num_tokens
    assert record.kv.stored.max_relative_error > 10 * record.figures["f32"].max_relative_error
    assert 0 < record.kv.stored.kl < 30 * record.kv.bf16.kl
    assert "with KV in 8 bits it loses KL" in verification_text(record)


def test_kv_in_8_bits_is_judged_token_by_token(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is served: other kernels read it for one row than for many."""
    forward, rows = ProbeChain.forward, []

    def watched(chain: ProbeChain, token_ids: Any, past: int) -> np.ndarray:
        if np.asarray(chain.pages[0]).dtype == np.uint8:
            rows.append(len(token_ids))
        return forward(chain, token_ids, past)

    monkeypatch.setattr(ProbeChain, "forward", watched)
    options = CompileOptions(judge_kv=True, profile=False)
    compile_models({"m": checkpoints["llama"]}, tmp_path / "zoo", options)
    assert rows.count(1) == len(PROMPTS) * (NUM_GENERATED - 1)
    assert len(rows) == len(PROMPTS) * NUM_GENERATED


@pytest.mark.parametrize("fault", [None, "loses more", "not measured", "not verified"])
def test_auto_takes_8_bits_where_no_model_loses_more_than_by_bf16(
    verified: Path, caplog: pytest.LogCaptureFixture, fault: str | None
) -> None:
    zoo = Zoo.open(verified)
    figures = LossFigures(1e-4, 0.01, 1.0)
    models = {}
    for name, record in zoo.manifest.models.items():
        assert record.verification is not None
        loss = LossRecord(figures, replace(figures, kl=2e-4), 1.0, 0.0, 256)
        if fault == "loses more" and name == "notes":
            loss = replace(loss, stored=replace(figures, kl=3e-4))
        kv = None if fault == "not measured" and name == "notes" else loss
        checked = None if fault == "not verified" and name == "notes" else record.verification
        models[name] = replace(record, verification=checked and replace(checked, kv=kv))
    judged = Zoo(zoo.path, replace(zoo.manifest, models=models))
    maker = make_engines(precision="f32", zoo=judged, kv_precision="auto")
    assert maker.kv_precision == ("f32" if fault else "u8")
    said = "what notes loses in 8 bits was not measured"
    said = "notes loses 1.5 times what it loses by bf16" if fault == "loses more" else said
    assert (said in caplog.text) == (fault is not None)
    assert make_engines("reference", "f32", device="cpu", zoo=judged, kv_precision="auto").kv_precision == (
        "f32"  # the oracle stays exact unless it is told
    )


def test_nothing_is_rounded_unless_asked(verified: Path) -> None:
    models = Zoo.open(verified).manifest.models
    errors = {n: r.verification.rounding_error for n, r in models.items() if r.verification is not None}
    assert all(error is None for error in errors.values())  # adapters are not merged: nothing is rounded


def test_a_chain_is_verified_once(verified: Path) -> None:
    models = Zoo.open(verified).manifest.models
    copied, original = models["copy"].verification, models["llama"].verification
    assert copied is not None
    assert original is not None
    assert copied.same_as == "llama"
    assert original.same_as is None
    assert copied.figures == original.figures


def test_blocks_of_a_plan_share_one_measurement(verified: Path) -> None:
    manifest = Zoo.open(verified).manifest
    measured: dict[str, set[str | None]] = {}
    for block in manifest.blocks.values():
        assert block.latency_us is not None
        assert set(block.latency_us) == ({1, 8} if block.spec.kind == "head" else {1, 8, 64, 256})
        assert all(time > 0 for time in block.latency_us.values())
        measured.setdefault(block.plan, set()).add(block.latency_block)
    assert all(len(blocks) == 1 for blocks in measured.values())
    assert len(measured) == len(manifest.plans)


@pytest.mark.parametrize("weights", [[], ["--weights", "int8"]], ids=str)
def test_a_checkpoint_that_is_broken_itself_is_called_so(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: list[str]
) -> None:
    broken = Path(shutil.copytree(checkpoints["qwen2"], tmp_path / "broken"))
    file = TensorFile(checkpoints["qwen2"] / "model.safetensors")
    values = {name: from_f32(file.tensor(name).to_f32(), "f32") for name in file.names}
    values["model.layers.1.mlp.down_proj.weight"].data[0, :] = 3e38
    (broken / "model.safetensors").unlink()
    write_tensor_file(broken / "model.safetensors", values, {})
    assert main([f"m={broken}", "-o", str(tmp_path / "zoo"), "--no-profile", *weights]) == 2
    assert "m: the checkpoint itself gives NaN or infinity in f32" in capsys.readouterr().err


def test_a_wrong_chain_is_refused_and_the_zoo_unchanged(
    verified: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    tree: Callable[[Path], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    zoo = Path(shutil.copytree(verified, tmp_path / "zoo"))
    original = build_sources.checkpoint_reader

    def swapped(checkpoint: Any) -> Callable[[str], BlockTensor]:
        read = original(checkpoint)
        swap = {"model.layers.0.self_attn.k_proj.weight": "model.layers.0.self_attn.v_proj.weight"}
        return lambda name: read(swap.get(name, name))

    monkeypatch.setattr(build_sources, "checkpoint_reader", swapped)
    before = tree(zoo)
    assert main([f"wrong={checkpoints['qwen3']}", "-o", str(zoo)]) == 2
    assert "wrong: the compiled model is not the checkpoint" in capsys.readouterr().err
    assert tree(zoo) == before


def test_verification_can_be_made_up_for(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    zoo, models = tmp_path / "z", {"m": checkpoints["llama"]}
    compile_models(models, zoo, CompileOptions(verify=False, profile=False))
    assert Zoo.open(zoo).manifest.models["m"].verification is None
    report = compile_models(models, zoo, CompileOptions(profile=False, threads=1))
    assert report.models[0].status == "unchanged"
    assert Zoo.open(zoo).manifest.models["m"].verification == report.models[0].verification is not None


def test_a_removed_twin_is_not_named_any_more(verified: Path, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(verified, tmp_path / "zoo"))
    compile_models({}, zoo, CompileOptions(), remove=["llama"])
    copied = Zoo.open(zoo).manifest.models["copy"].verification
    assert copied is not None
    assert copied.same_as is None


def test_a_converted_model_passes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    models = {"m": checkpoints["llama"]}
    compile_models(models, tmp_path / "z", CompileOptions(dtype="f16", profile=False))
    record = Zoo.open(tmp_path / "z").manifest.models["m"]
    assert record.source.converted_to == "f16"
    assert record.verification is not None
    assert record.verification.rounding_error is not None


def test_a_model_too_short_for_the_prompts_says_so(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    assert main([str(checkpoint), "-o", str(tmp_path / "z")]) == 2
    assert "--no-verify leaves it out" in capsys.readouterr().err


def test_compare() -> None:
    expected = np.array([[1.0, -4.0, 2.0], [0.0, 1.0, 0.5]], np.float32)
    seen = expected + np.array([[0.0, 0.0, 0.4], [2.0, 0.0, 0.0]], np.float32)
    figures = compare([seen], [expected])
    assert figures.greedy_agreement == 0.5
    assert figures.max_relative_error == pytest.approx(2.0)
    seen[0, 0] = np.nan
    assert compare([seen], [expected]).max_relative_error == float("inf")


def decoded(maker: EngineMaker, blocks: list[Block], record: ModelRecord) -> np.ndarray:
    """Logits of a prompt of 48 tokens and of 12 more one by one, as other kernels read pages for one row."""
    tokens = list(range(40, 100))
    chain = ProbeChain(maker, blocks, record.config, len(tokens))
    rows = [chain.forward(tokens[:48], 0)]
    rows += [chain.forward(tokens[at : at + 1], at) for at in range(48, len(tokens))]
    return np.concatenate(rows)


def compiled(given: Path, options: CompileOptions) -> tuple[Zoo, ModelRecord, list[Block]]:
    """A zoo of a model alone, beside its folder; the model and its blocks."""
    compile_models({"x": given}, given.parent / "z", options)
    zoo = Zoo.open(given.parent / "z")
    record = zoo.manifest.models["x"]
    return zoo, record, [zoo.read_block(key) for key in record.chain]


@pytest.mark.parametrize("head_dim", [16, 48, 80, 20, 100])
def test_kv_in_8_bits_is_for_heads_of_which_it_is_computed_rightly(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path, head_dim: int
) -> None:
    """Of others the operator gives other logits without a word: they are neither judged nor served so."""
    given = save(make_model("llama", 5, head_dim=head_dim), tmp_path / "x")
    zoo, record, blocks = compiled(given, CompileOptions(judge_kv=True, profile=False))
    assert record.verification is not None
    packed = OpenVINOEngines("f32", 1, kv_precision="u8")
    if head_dim % 16:
        assert record.verification.kv is None
        with pytest.raises(EngineError, match=f"heads of {head_dim}: OpenVINO computes KV in 8 bits"):
            packed.span(blocks[1:])
        assert make_engines(zoo=zoo, kv_precision="auto").facts().get("kv") is None
        return
    assert record.verification.kv is not None
    makers = packed, make_engines("reference", "f32", device="cpu", num_threads=1, kv_precision="u8")
    said = [decoded(maker, blocks, record)[47:] for maker in makers]
    np.testing.assert_allclose(said[0], said[1], atol=2e-3 * np.abs(said[1]).max())


@pytest.mark.parametrize("head_dim", [4, 6, 12, 20, 24, 36, 100, 128])
def test_kv_in_f16_is_for_heads_of_any_size(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path, head_dim: int
) -> None:
    given = save(make_model("llama", 5, head_dim=head_dim), tmp_path / "x")
    _, record, blocks = compiled(given, CompileOptions(verify=False, profile=False))
    makers = OpenVINOEngines("f32", 1, kv_precision="f16"), OpenVINOEngines("f32", 1)
    said = [decoded(maker, blocks, record) for maker in makers]
    np.testing.assert_allclose(said[0], said[1], atol=1e-3 * np.abs(said[1]).max())
