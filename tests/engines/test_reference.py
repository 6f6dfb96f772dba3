"""The torch engines, and the whole runtime on them, against the OpenVINO ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from blockzoo.engines.base import EngineError, EngineMaker  # noqa: E402
from blockzoo.engines.choose import make_engines  # noqa: E402
from blockzoo.engines.probe import ProbeChain, time_block  # noqa: E402
from blockzoo.engines.reference import ReferenceEngines  # noqa: E402
from blockzoo.engines.reference.arrays import TorchArrays, _Recorded  # noqa: E402
from blockzoo.engines.reference.attention import DenseAttention  # noqa: E402
from blockzoo.runtime import LLM  # noqa: E402
from blockzoo.runtime.api.errors import InvalidRequestError  # noqa: E402
from blockzoo.zoo.blocks import AttnSpec  # noqa: E402
from blockzoo.zoo.rope import RopeConfig  # noqa: E402
from blockzoo.zoo.store import Zoo  # noqa: E402


@pytest.fixture(scope="module")
def reference() -> ReferenceEngines:
    return ReferenceEngines("f32", "cpu")


def test_weights_that_models_share_are_loaded_once(demo_zoo: Path, reference: ReferenceEngines) -> None:
    zoo = Zoo.open(demo_zoo)
    engines = ReferenceEngines("bf16", "cpu")
    for model in zoo.manifest.models.values():
        blocks = [zoo.read_block(i) for i in model.chain]
        engines.embedding(blocks[0])
        engines.span(blocks[1:])
    stored = sum(block.num_bytes for block in zoo.manifest.blocks.values())
    assert engines.weights.num_bytes <= stored


def test_bf16_is_near_f32(demo_zoo: Path, reference: ReferenceEngines) -> None:
    zoo = Zoo.open(demo_zoo)
    record = zoo.manifest.models["base"]
    ids = np.random.default_rng(2).integers(2, 2048, 80).tolist()

    def logits(engines: EngineMaker) -> np.ndarray:
        probe = ProbeChain(engines, [zoo.read_block(i) for i in record.chain], record.config, 96)
        return np.concatenate([probe.forward(ids[:50], 0), probe.forward(ids[50:], 50)])

    exact, rounded = logits(reference), logits(ReferenceEngines("bf16", "cpu"))
    assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.03


def test_rows_at_any_positions_attend_as_in_order() -> None:
    rope = RopeConfig(rope_type="default", theta=1e4)
    spec = AttnSpec(32, 4, 2, 16, 1e-5, rope, 24, False, False, False)
    torch.manual_seed(0)
    tokens = 70
    qkv = torch.randn(tokens, 8 * 16)
    begins = torch.tensor([0, tokens], dtype=torch.int32)
    pages = torch.tensor([4, 0, 2], dtype=torch.int32)
    inputs = {
        "key_cache": torch.zeros(5, 2, 32, 16),
        "value_cache": torch.zeros(5, 2, 32, 16),
        "subsequence_begins": begins,
        "block_indices_begins": torch.tensor([0, 3], dtype=torch.int32),
        "past_lens": torch.zeros(1, dtype=torch.int32),
    }
    expected = DenseAttention().rotated(qkv, inputs, pages, spec)
    some = torch.randperm(tokens)[:20]
    inputs |= {
        "positions": some.int(),
        "subsequence_begins": torch.tensor([0, len(some)], dtype=torch.int32),
    }
    torch.testing.assert_close(DenseAttention().rotated(qkv[some], inputs, pages, spec), expected[some])


def test_blocks_are_timed(demo_zoo: Path, reference: ReferenceEngines) -> None:
    zoo = Zoo.open(demo_zoo)
    chain = zoo.manifest.models["base"].chain
    for block_id in (*chain[:3], chain[-1]):
        assert time_block(reference, zoo.read_block(block_id), 4, repeats=1) > 0


def test_a_choice_that_cannot_be_met_is_explained() -> None:
    with pytest.raises(EngineError, match="'xpu'"):
        ReferenceEngines(device="xpu")
    with pytest.raises(EngineError, match="openvino backend runs on the cpu"):
        make_engines("openvino", device="cuda")
    with pytest.raises(EngineError, match="expected one of openvino, reference, tensorrt"):
        make_engines("onnx")  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="sees no GPU"):
            ReferenceEngines(device="cuda")


def test_config_names_the_backends(demo_zoo: Path) -> None:
    with pytest.raises(InvalidRequestError, match="backend is 'tpu'"):
        LLM(demo_zoo, backend="tpu")


class Recorder(_Recorded):
    """The order of things without a GPU: what runs, and whether it is told that a recording comes."""

    def __init__(self, arrays: TorchArrays, graphs: SimpleNamespace, fails: bool) -> None:
        self.seen: list[tuple[str, bool]] = []
        self._fails = fails
        super().__init__(lambda: None, arrays, graphs)  # type: ignore[arg-type]

    def _run_directly(self) -> None:
        self.seen.append(("direct", self._arrays.settling))

    def _record(self) -> None:
        self.seen.append(("record", self._arrays.settling))
        if self._fails:
            self._graphs.failed = True
        else:
            self._graph = SimpleNamespace(replay=lambda: self.seen.append(("replay", self._arrays.settling)))


def test_the_third_run_of_a_step_is_recorded_and_a_failure_ends_recording() -> None:
    arrays, graphs = TorchArrays(torch.device("cpu"), "f32"), SimpleNamespace(failed=False)
    step = Recorder(arrays, graphs, fails=False)
    for _ in range(4):
        step()
    ran = [("direct", False), ("direct", True), ("record", True), ("replay", True), ("replay", True)]
    assert step.seen == ran
    failing, other = (Recorder(arrays, graphs, fails=True) for _ in range(2))
    for _ in range(4):
        failing()
    for _ in range(3):
        other()
    assert [what for what, _ in failing.seen] == ["direct", "direct", "record", "direct", "direct"]
    assert [what for what, _ in other.seen] == ["direct"] * 3
    assert not arrays.settling
