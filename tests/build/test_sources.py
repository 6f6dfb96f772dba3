"""Adapters: how they find their base, what is refused, and that the merge is exact."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockzoo.build.cli import main
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import open_sources, parse_models
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError, ZooError
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import TensorFile, from_f32, write_tensor_file

FAST = CompileOptions(verify=False, profile=False)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft


@pytest.fixture
def adapter(checkpoints: dict[str, Path], make_adapter: Callable[..., Any], tmp_path: Path) -> Path:
    make_adapter(checkpoints["llama"], tmp_path / "adapter")
    set_base(tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_base(folder: Path, name: str | None) -> None:
    edit(folder, base_model_name_or_path=name)


def test_parse_models() -> None:
    assert parse_models(["a=x/y", "x/b.c", "./d=e/f", "g=h@a", "x/i@a"]) == {
        "a": "x/y",
        "b.c": "x/b.c",
        "f": "./d=e/f",
        "g": "h@a",
        "i": "x/i@a",
    }


@pytest.mark.parametrize("name", ["blockzoo", "blockzoo_unary", "preprocessing", "postprocessing"])
def test_names_of_the_server_are_refused(
    name: str, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"{name}={checkpoints['llama']}", "-o", str(tmp_path / "z")]) == 2
    assert f"model name '{name}' is one of zoo-serve's own" in capsys.readouterr().err
    with pytest.raises(ZooError, match="zoo-serve's own"):
        open_sources({name: checkpoints["llama"]}, None)


@pytest.mark.parametrize("named", ["base", "org/base", "", "path"])
def test_the_base_is_found_among_the_models_given(
    named: str, adapter: Path, checkpoints: dict[str, Path]
) -> None:
    set_base(adapter, str(checkpoints["llama"]) if named == "path" else named)
    base = "other" if named == "path" else "base"
    given = f"{adapter}@base" if named == "" else adapter
    sources = open_sources({"notes": given, base: checkpoints["llama"]}, None)
    assert [source.name for source in sources] == [base, "notes"]


def test_a_base_in_the_zoo_gives_the_same_blocks_as_one_given(
    adapter: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    both = {"base": checkpoints["llama"], "notes": adapter}
    compile_models(both, tmp_path / "together", FAST)
    compile_models({"base": checkpoints["llama"]}, tmp_path / "apart", FAST)
    report = compile_models({"notes": adapter}, tmp_path / "apart", FAST)
    assert (tmp_path / "apart/manifest.json").read_text() == (tmp_path / "together/manifest.json").read_text()
    assert report.models[0].num_reused == report.models[0].num_blocks == 8
    assert report.models[0].rank == 4
    source = Zoo.open(tmp_path / "apart").manifest.models["notes"].source
    assert (source.format, source.base, source.folder) == ("peft", "base", "adapter")


def test_an_adapter_of_a_base_in_f32_shares_its_blocks(
    adapter: Path, checkpoint: Path, tmp_path: Path
) -> None:
    file = TensorFile(checkpoint / "model.safetensors")
    wide = {name: from_f32(file.tensor(name).to_f32(), "f32") for name in file.names}
    write_tensor_file(checkpoint / "new", wide, {})
    (checkpoint / "new").rename(checkpoint / "model.safetensors")
    compile_models({"base": checkpoint}, tmp_path / "z", FAST)
    compile_models({"notes": adapter}, tmp_path / "z", FAST)
    manifest = Zoo.open(tmp_path / "z").manifest
    assert manifest.models["notes"].chain == manifest.models["base"].chain
    assert manifest.blocks[manifest.models["base"].chain[1]].dtype == "bf16"


def test_adapters_of_adapters(adapter: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    models: dict[str, str | Path] = {
        "second": f"{adapter}@first",
        "first": adapter,
        "base": checkpoints["llama"],
    }
    for zoo, given in (
        ("together", [models]),
        ("apart", [{n: models[n]} for n in ("base", "first", "second")]),
    ):
        for part in given:
            compile_models(part, tmp_path / zoo, FAST)
        opened = Zoo.open(tmp_path / zoo)
        first, second = (opened.manifest.models[name] for name in ("first", "second"))
        assert first.chain == second.chain == opened.manifest.models["base"].chain
        once, twice = (opened.read_adapter(record.adapters[1]) for record in (first, second))
        assert [(lora.rank, lora.scale) for lora in twice.spec.loras] == [(8, 1.0), (8, 1.0)]
        a, b = (once.tensors[f"q.{which}"].to_f32() for which in "ab")
        deltas = [
            twice.tensors["q.b"].to_f32() @ twice.tensors["q.a"].to_f32(),
            2 * once.spec.loras[0].scale * b @ a,
        ]
        np.testing.assert_allclose(*deltas, atol=1e-5)
    with pytest.raises(ZooError, match="name each other as base"):
        open_sources({"a": f"{adapter}@b", "b": f"{adapter}@a"}, None)


def test_the_matrices_are_stored_as_they_are(
    adapter: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    compile_models({"notes": adapter, "base": checkpoints["llama"]}, tmp_path / "z", FAST)
    zoo = Zoo.open(tmp_path / "z")
    record = zoo.manifest.models["notes"]
    assert sorted(record.adapters) == [1, 3, 5]
    found = zoo.read_adapter(record.adapters[3])
    assert [(lora.projection, lora.rank, lora.scale) for lora in found.spec.loras] == [
        ("q", 4, 2.0),
        ("v", 4, 2.0),
    ]
    saved = TensorFile(adapter / "adapter_model.safetensors")
    for which in "AB":
        given = saved.tensor(f"base_model.model.model.layers.1.self_attn.v_proj.lora_{which}.weight")
        np.testing.assert_array_equal(found.tensors[f"v.{which.lower()}"].to_f32(), given.to_f32())


def test_an_adapter_may_bring_more_tokens(
    adapter: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    file = TensorFile(adapter / "adapter_model.safetensors")
    tensors = {name: file.tensor(name) for name in file.names}
    tensors["base_model.model.model.embed_tokens.weight"] = from_f32(np.ones((290, 64)), "bf16")
    tensors["base_model.model.lm_head.weight"] = from_f32(np.full((290, 64), 2.0), "bf16")
    write_tensor_file(adapter / "new", tensors, {})
    (adapter / "new").rename(adapter / "adapter_model.safetensors")
    edit(adapter, modules_to_save=["embed_tokens", "lm_head"])
    compile_models({"base": checkpoints["llama"], "notes": adapter}, tmp_path / "z", FAST)
    config = Zoo.open(tmp_path / "z").manifest.models["notes"].config
    assert (config.vocab_size, config.tie_word_embeddings) == (290, False)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"bias": "some"}, "bias='some'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"a": 1}}, "something_new"),
    ],
)
def test_other_adapters_are_refused_by_name(
    adapter: Path, checkpoints: dict[str, Path], setting: dict[str, Any], said: str
) -> None:
    edit(adapter, **setting)
    with pytest.raises(UnsupportedModelError, match=said):
        open_sources({"notes": adapter, "base": checkpoints["llama"]}, None)


def test_an_adapter_of_another_shape_is_refused(adapter: Path, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="is this adapter's base another model"):
        open_sources({"notes": f"{adapter}@other", "other": checkpoints["qwen3"]}, None)
    edit(adapter, r=8)
    with pytest.raises(CheckpointError, match="r=8"):
        open_sources({"notes": adapter, "base": checkpoints["llama"]}, None)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("base_model.model.model.layers.9.mlp.up_proj.weight", "belong to no weight of base"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", "no part of a plain LoRA"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", "no lora_A"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "no lora_B"),
        ("base_model.model.lm_head.lora_A.weight", "LoRA of lm_head"),
    ],
)
def test_unknown_tensors_are_refused(
    adapter: Path, checkpoints: dict[str, Path], name: str, said: str
) -> None:
    file = TensorFile(adapter / "adapter_model.safetensors")
    tensors = {n: file.tensor(n) for n in file.names} | {name: from_f32(np.ones((4, 64)), "f32")}
    write_tensor_file(adapter / "new", tensors, {})
    (adapter / "new").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        open_sources({"notes": adapter, "base": checkpoints["llama"]}, None)


def test_an_adapter_without_its_base_is_one_clear_error(
    adapter: Path, checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo = str(tmp_path / "z")
    assert main([f"notes={adapter}", "-o", zoo]) == 2
    assert "its base 'base' is neither among the models given nor in the zoo" in capsys.readouterr().err
    assert main([f"notes={adapter}@bse", f"base={checkpoints['llama']}", "-o", zoo]) == 2
    assert "did you mean base?" in capsys.readouterr().err
    set_base(adapter, None)
    assert main([f"notes={adapter}", "-o", zoo]) == 2
    assert "does not name its base" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").unlink()
    assert main([f"notes={adapter}", "-o", zoo]) == 2
    assert "adapter_model.safetensors is missing" in capsys.readouterr().err
    assert not Path(zoo).exists()


def test_junk_in_the_adapter_config_is_a_named_error_or_harmless(
    adapter: Path, checkpoints: dict[str, Path]
) -> None:
    given = json.loads((adapter / "adapter_config.json").read_text())
    base = checkpoints["llama"]
    junk_values: list[Any] = [None, -1, 0, 0.5, "x", "(", True, [], ["a"], {}]
    junk_values += [{"(": 1}, {"q_proj": "x"}, {"q_proj": 2}]
    for field in (*given, "rank_pattern", "alpha_pattern"):
        for junk in (
            None,
            -1,
            0,
            0.5,
            "x",
            "(",
            True,
            [],
            ["a"],
            {},
            {"(": 1},
            {"q_proj": "x"},
            {"q_proj": 2},
        ):
            (adapter / "adapter_config.json").write_text(json.dumps({**given, field: junk}))
            try:
                open_sources({"notes": adapter, "base": base}, None)
            except ZooError:
                continue
