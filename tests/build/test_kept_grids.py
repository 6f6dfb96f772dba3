"""Models of GGUF files whose matrices lie on a grid that 4 bits can keep: nothing is rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf

from blockzoo.build import quantize
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.engines.base import EngineMaker
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.openvino.engine import RoundedActivations, multiplies_int8
from blockzoo.engines.probe import ProbeChain
from blockzoo.engines.reference import ReferenceEngines
from blockzoo.zoo.store import Zoo

SETTINGS = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300, "num_hidden_layers": 2}
KINDS = {"model.embed_tokens.weight": "Q8_0", "model.layers.1.self_attn.o_proj.weight": "Q4_0"}
IDS = np.random.default_rng(3).integers(0, 256, 40).tolist()


@pytest.fixture(scope="module")
def zoos(make_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Zoo]:
    """A file in Q4_1, as given and in 4 bits."""
    root = tmp_path_factory.mktemp("grids")
    file = write_gguf(root / "m.gguf", make_model("llama", 7, **SETTINGS), "llama", "Q4_1", kinds=KINDS)
    options = {
        "given": CompileOptions(verify=False, profile=False),
        "int4": CompileOptions(verify=False, profile=False, weights="int4"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "calibrate", None)  # nothing is looked at
        for name, each in options.items():
            compile_models({"m": file}, root / name, each)
    return {name: Zoo.open(root / name) for name in options}


def logits(zoo: Zoo, maker: EngineMaker) -> np.ndarray:
    record = zoo.manifest.models["m"]
    blocks = [zoo.read_block(key) for key in record.chain]
    return np.array(ProbeChain(maker, blocks, record.config, len(IDS)).forward(IDS, 0))


def test_matrices_keep_their_offsets(zoos: dict[str, Zoo]) -> None:
    given, kept = ([zoo.read_block(key) for key in zoo.manifest.models["m"].chain] for zoo in zoos.values())
    for own, theirs in zip(given, kept, strict=True):
        for name, tensor in theirs.tensors.items():
            np.testing.assert_allclose(tensor.to_f32(), own.tensors[name].to_f32(), rtol=0, atol=1e-7)
    assert all(kept[1].tensors[name].offsets is not None for name in ("q", "k", "v", "o"))
    assert kept[3].tensors["o"].dtype == "i4"
    assert kept[3].tensors["o"].offsets is None
    record = zoos["int4"].manifest.blocks[zoos["int4"].manifest.models["m"].chain[2]]
    assert record.num_bytes == 2 * 256 + 3 * 256 * 512 * 6 // 8  # 4 bits, and 2 for scale and offset


@pytest.mark.parametrize("maker", [OpenVINOEngines, ReferenceEngines])
def test_logits_are_those_of_the_file(maker: type, zoos: dict[str, Zoo]) -> None:
    expected = logits(zoos["given"], OpenVINOEngines("f32"))
    found = logits(zoos["int4"], maker("f32"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("by_plugin", [True, False])
def test_activations_are_rounded_beside_offsets(by_plugin: bool, zoos: dict[str, Zoo]) -> None:
    if by_plugin and not multiplies_int8():
        pytest.skip("the CPU has no VNNI")
    exact = logits(zoos["given"], OpenVINOEngines("f32"))
    maker = OpenVINOEngines(int8_activations=True) if by_plugin else RoundedActivations()
    found = logits(zoos["int4"], maker)
    strayed = float(np.abs(found - exact).max() / np.abs(exact).max())
    assert 1e-4 < strayed < 0.05


def test_an_automatic_choice_takes_all_of_them(
    zoos: dict[str, Zoo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nothing is lost by it; no text is looked at."""
    monkeypatch.setattr(quantize, "calibrate", None)
    file = zoos["given"].path.parent / "m.gguf"
    compile_models({"m": file}, tmp_path / "z", CompileOptions(profile=False, weights="auto", max_kl=1e-3))
    manifest = Zoo.open(tmp_path / "z").manifest
    chain = manifest.models["m"].chain
    assert [manifest.blocks[key].dtype for key in chain[1:-1]] == ["i4"] * 4
