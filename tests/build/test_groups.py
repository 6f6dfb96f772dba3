"""In which groups matrices are stored: as large as a model bears, or as those of blocks that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build import calibration
from blockzoo.build.cli import main
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.zoo.packing import GROUP, WHOLE_ROW
from blockzoo.zoo.store import Zoo

INT8 = CompileOptions(weights="int8", max_kl=0.04, verify=False, profile=False, calibration_texts=0)
SETTINGS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "NUM_TOKENS", 48)


@pytest.fixture(scope="module")
def models(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path_factory: Any
) -> dict[str, Path]:
    """One whose activations are alike, one with a few that are much larger, one like the first but for a
    block, one of an odd width, and one of whose weights no row has two sizes."""
    import torch

    root = tmp_path_factory.mktemp("groups")
    model = make_model("llama", 3, **SETTINGS)
    save(model, root / "even")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-1.0)
        save(model, root / "tuned")
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight[::64] *= 100
        save(model, root / "spiky")
        plain = make_model("llama", 3, **SETTINGS)
        for weight in plain.parameters():
            weight.copy_(weight.sign() / 32)
        save(plain, root / "plain")
    save(make_model("llama", 3, **{**SETTINGS, "intermediate_size": 320}), root / "odd")
    return {path.name: path for path in root.iterdir()}


def groups(zoo: Path, model: str) -> set[int]:
    """Columns that share a scale in a model's matrices."""
    opened = Zoo.open(zoo)
    blocks = [opened.read_block(key) for key in opened.manifest.models[model].chain]
    matrices = [tensor for block in blocks for tensor in block.tensors.values() if tensor.scales is not None]
    return {tensor.shape[1] // tensor.scales.shape[1] for tensor in matrices if tensor.scales is not None}


def widths(model: Path) -> set[int]:
    """Columns of a model's matrices."""
    config = json.loads((model / "config.json").read_text())
    return {config["hidden_size"], config["intermediate_size"]}


def compiled(zoo: Path, options: CompileOptions, **models: Path) -> Any:
    return compile_models(models, zoo, options)


def test_they_are_as_large_as_a_model_bears(models: dict[str, Path], tmp_path: Path) -> None:
    expected = {"even": 128, "spiky": 32, "odd": 64, "plain": WHOLE_ROW}
    for name, group in expected.items():
        compiled(tmp_path / name, INT8, **{name: models[name]})
        assert groups(tmp_path / name, name) == ({group} if group else widths(models[name])), name
        found = Zoo.open(tmp_path / name).manifest.models[name].quantization
        assert found is not None
        assert found.group == group


def test_a_looser_bound_is_borne_by_more(models: dict[str, Path], tmp_path: Path) -> None:
    compiled(tmp_path / "z", replace(INT8, max_kl=50.0), spiky=models["spiky"])
    assert groups(tmp_path / "z", "spiky") == widths(models["spiky"])


def test_models_that_share_blocks_have_equal_ones(models: dict[str, Path], tmp_path: Path) -> None:
    zoo = tmp_path / "z"
    compiled(zoo, replace(INT8, group_size=64), even=models["even"])
    compiled(zoo, INT8, tuned=models["tuned"])
    assert groups(zoo, "even") == groups(zoo, "tuned") == {64}
    even, tuned = (Zoo.open(zoo).manifest.models[name].chain for name in ("even", "tuned"))
    assert len({*even} & {*tuned}) == len(even) - 1


def test_auto_has_them_too_where_it_keeps_8_bits(models: dict[str, Path], tmp_path: Path) -> None:
    zoo, auto = tmp_path / "z", replace(INT8, weights="auto")
    compiled(zoo, auto, even=models["even"])
    opened = Zoo.open(zoo)
    even = opened.manifest.models["even"]
    assert {opened.manifest.blocks[key].dtype for key in even.chain} >= {"i8", "i4"}
    assert even.quantization is not None
    assert (even.quantization.group, even.quantization.group_made) == (128, 128)
    table = opened.read_block(even.chain[0]).tensors["weight"]
    assert table.scales is not None
    assert table.scales.shape[1] == SETTINGS["hidden_size"] // 128
    assert groups(zoo, "even") == {128}  # of 4 bits too: activations are rounded beside both
    compiled(zoo, replace(auto, max_kl=50.0), tuned=models["tuned"])  # which bears one scale a row
    assert Zoo.open(zoo).manifest.models["tuned"].chain[0] == even.chain[0]


def test_another_number_needs_replace(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "z"
    given = [f"even={models['even']}", "-o", str(zoo), "--no-verify", "--no-profile", "--weights", "int8"]
    assert main([*given, "--group-size", "32"]) == 0
    assert "weights int8 in groups of 32: " in capsys.readouterr().out
    for same in ([], ["--group-size", "32"]):  # what is there is kept, unless another one is asked for
        assert main([*given, *same]) == 0
        assert "unchanged" in capsys.readouterr().out
    assert main([*given, "--group-size", "128"]) == 2
    assert "--replace" in capsys.readouterr().err
    assert main([*given, "--group-size", "128", "--replace"]) == 0
    assert groups(zoo, "even") == {128}
    assert main([*given, "--group-size", "row", "--replace"]) == 0
    assert groups(zoo, "even") == widths(models["even"])
    assert "weights int8 with one scale a row: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*given, "--group-size", "96"])
    assert "'96' is none of 32, 64, 128, row" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given[:-1], "auto", "--group-size", "64"])
    assert "--group-size is a setting of --weights int8 and int4" in capsys.readouterr().err


def test_4_bits_have_small_ones_unless_others_are_asked_for(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = tmp_path / "z"
    given = [f"even={models['even']}", "-o", str(zoo), "--no-verify", "--no-profile", "--weights", "int4"]
    assert main(given) == 0
    assert groups(zoo, "even") == {32}
    assert main([*given, "--group-size", "64"]) == 2
    assert "--replace" in capsys.readouterr().err
    assert main([*given, "--group-size", "64", "--replace"]) == 0
    assert "weights int4 in groups of 64: " in capsys.readouterr().out
    assert groups(zoo, "even") == {64}
    compiled(zoo, replace(INT8, weights="int4"), tuned=models["tuned"])
    assert groups(zoo, "tuned") == {64}
    even, tuned = (Zoo.open(zoo).manifest.models[name].chain for name in ("even", "tuned"))
    assert len({*even} & {*tuned}) == len(even) - 1
    assert main([*given, "--group-size", "row", "--replace"]) == 0
    said = "weights int4 with one scale a row, 4 bits in groups of 128 at most: "
    assert said in capsys.readouterr().out
    assert groups(zoo, "even") == {128, SETTINGS["hidden_size"]}


SAID = {
    (96, 256): {
        32: "in groups of 32",
        128: "in groups of 128",
        64: "in groups of 64",
        0: "with one scale a row",
    },
    (48, 80): {
        32: "with one scale a row (which is what groups of 32 come to here)",
        128: "with one scale a row (which is what groups of 128 come to here)",
        0: "with one scale a row",
    },
    (128, 128): {
        128: "with one scale a row (which is what groups of 128 come to here)",
        0: "with one scale a row",
        64: "in groups of 64",
    },
}


@pytest.mark.parametrize("sizes", list(SAID), ids=str)
def test_blocks_may_come_out_the_same_in_other_groups(
    make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path, sizes: tuple[int, int]
) -> None:
    hidden, intermediate = sizes
    settings = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1}
    given = save(make_model("llama", 3, **settings), tmp_path / "x")
    for group, how in SAID[sizes].items():
        options = replace(INT8, group_size=group, replace=True)
        (told,) = compiled(tmp_path / "z", options, x=given).models
        assert any(f"weights int8 {how}: " in note for note in told.notes), (group, told.notes)
        compiled(tmp_path / str(group), options, x=given)
        chains = [Zoo.open(tmp_path / zoo).manifest.models["x"].chain for zoo in ("z", str(group))]
        assert chains[0] == chains[1]


def test_engines_round_activations_in_the_groups_of_their_blocks(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the smallest where a span has several."""
    monkeypatch.setattr("blockzoo.engines.openvino.engine.multiplies_int8", lambda: True)
    maker = OpenVINOEngines(num_threads=1, int8_activations=True)
    blocks = {}
    for group in (WHOLE_ROW, 32, 128):
        compiled(tmp_path / str(group), replace(INT8, group_size=group), even=models["even"])
        zoo = Zoo.open(tmp_path / str(group))
        blocks[group] = [zoo.read_block(key) for key in zoo.manifest.models["even"].chain[1:]]
    for chain, expected in (
        (blocks[32], GROUP),
        (blocks[128], 128),
        (blocks[WHOLE_ROW], 128),
        (blocks[128][:2] + blocks[32][2:], GROUP),
    ):
        span = maker.span(chain)._request.get_compiled_model()
        assert span.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == expected
