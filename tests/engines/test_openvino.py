"""OpenVINO engines: spans cut anywhere compute the same, types convert exactly, errors are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino.op import Parameter

from blockzoo.engines.base import EngineError, Precision, activation_dtype
from blockzoo.engines.embedding import EmbeddingTable
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.openvino.graphs import to_bf16
from blockzoo.engines.probe import ProbeChain, time_block
from blockzoo.zoo.blocks import Block, BlockTensor, EmbedSpec
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.tensors import bf16_to_f32, f32_to_bf16


def test_bf16_rounding_is_torchs() -> None:
    values = np.concatenate(
        [
            np.random.default_rng(0).standard_normal(10000).astype(np.float32) * 1e3,
            np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3.4e38, 1.00390625, 1.01171875], np.float32),
        ]
    )
    expected = torch.from_numpy(values).bfloat16()
    found = torch.from_numpy(f32_to_bf16(values).view(np.int16)).view(torch.bfloat16)
    assert torch.equal(expected.isnan(), found.isnan())
    assert torch.equal(expected[~expected.isnan()], found[~expected.isnan()])
    np.testing.assert_array_equal(bf16_to_f32(f32_to_bf16(values)), expected.float().numpy())


def test_bf16_in_graphs_is_to_nearest() -> None:
    values = np.random.default_rng(0).standard_normal((512, 64)).astype(np.float32)
    values *= 10.0 ** np.random.default_rng(1).integers(-9, 10, (512, 1)).astype(np.float32)
    x = Parameter(ov.Type.f32, ov.PartialShape([-1, 64]))
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = ov.compile_model(ov.Model([to_bf16(x)], [x]), "CPU", settings).create_infer_request()
    request.infer([values])
    found = np.frombuffer(request.get_output_tensor().data.tobytes(), np.uint16).reshape(values.shape)
    np.testing.assert_array_equal(found, f32_to_bf16(values))


@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize("stored", ["f32", "bf16", "f16"])
def test_embedding_rows_in_any_type(stored: str, precision: Precision) -> None:
    values = (np.random.default_rng(0).standard_normal((10, 4)) * 3).astype(np.float32)
    held = {"f32": values, "bf16": f32_to_bf16(values), "f16": values.astype(np.float16)}[stored]
    tensor = BlockTensor(stored, held)  # type: ignore[arg-type]
    table = EmbeddingTable(Block("id", EmbedSpec(10, 4), {"weight": tensor}), precision)
    out = np.empty((3, 4), activation_dtype(precision))
    table.lookup(np.array([7, 0, 7], np.int32), out)
    expected = tensor.to_f32()[[7, 0, 7]]
    np.testing.assert_array_equal(out, f32_to_bf16(expected) if precision == "bf16" else expected)


@pytest.fixture(scope="module")
def chain(demo_zoo: Path) -> tuple[list[Block], ProbeChain, OpenVINOEngines]:
    zoo = Zoo.open(demo_zoo)
    record = zoo.manifest.models["base"]
    blocks = [zoo.read_block(block_id) for block_id in record.chain]
    engines = OpenVINOEngines("f32", num_threads=1)
    return blocks, ProbeChain(engines, blocks, record.config, 96), engines


def test_a_sequence_in_pieces_is_the_sequence(chain: tuple) -> None:
    _, probe, _ = chain
    ids = np.random.default_rng(0).integers(0, 2048, 96).tolist()
    whole = probe.forward(ids, 0)
    pieces = [probe.forward(ids[a:b], a) for a, b in ((0, 32), (32, 33), (33, 95), (95, 96))]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=2e-4, rtol=1e-4)


def test_a_probe_refuses_more_than_it_was_made_for(chain: tuple) -> None:
    with pytest.raises(ValueError, match="90 \\+ 7 tokens exceed the 96"):
        chain[1].forward([1] * 7, 90)


@pytest.mark.parametrize("index", [0, 1, 2, -1], ids=["embed", "attn", "ffn", "head"])
def test_every_kind_of_block_can_be_timed(chain: tuple, index: int) -> None:
    blocks, _, engines = chain
    assert time_block(engines, blocks[index], num_tokens=40, repeats=1) > 0


def test_weights_may_be_concatenated_where_they_do_not_lie_side_by_side(chain: tuple) -> None:
    blocks, probe, engines = chain
    apart = [
        Block(b.id, b.spec, {n: BlockTensor(t.dtype, t.data.copy()) for n, t in b.tensors.items()})
        for b in blocks
    ]
    zoo_config = type("Config", (), {"rope": blocks[1].spec.rope, "vocab_size": 2048, "hidden_size": 256})
    other = ProbeChain(engines, apart, zoo_config, 96)  # type: ignore[arg-type]
    ids = list(range(50))
    np.testing.assert_array_equal(other.forward(ids, 0), probe.forward(ids, 0))


def test_a_precision_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino as ov

    real = ov.Core.get_property

    def without_bf16(self: ov.Core, device: str, name: str) -> object:
        if name == "OPTIMIZATION_CAPABILITIES":
            return ["FP32", "INT8"]
        return real(self, device, name)

    monkeypatch.setattr(ov.Core, "get_property", without_bf16)
    with pytest.raises(EngineError, match="bf16 was asked for, but this CPU offers FP32, INT8; use f32"):
        OpenVINOEngines("bf16")
    assert OpenVINOEngines().precision == "f32"


def test_openvino_is_imported_without_its_telemetry() -> None:
    script = (
        "import sys, blockzoo.engines.openvino, openvino\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "import threading; assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_memory_stays_bounded_whatever_numbers_of_rows_come(demo_zoo: Path) -> None:
    zoo = Zoo.open(demo_zoo)
    chain = zoo.manifest.models["base"].chain
    block = next(zoo.read_block(i) for i in chain if zoo.manifest.blocks[i].spec.kind == "ffn")
    makers = OpenVINOEngines("f32")
    makers.expect(1000)
    engine = makers.span([block])
    hidden, out = (np.ones((700, block.spec.hidden_size), np.float32) for _ in range(2))
    resident = []
    for count in [700, *range(1, 701)]:
        engine.bind("hidden", hidden[:count])
        engine.bind("hidden_out", out[:count])
        engine.run()
        resident.append(resident_bytes())
    # oneDNN keeps 1024 kernels of its own, whatever the engines keep: they are there after 400 shapes
    assert resident[-1] - resident[400] < 40 << 20  # with all kernels kept: 100 MiB


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
