"""Steps padded to few shapes, as for CUDA graphs: the same tokens, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from blockzoo.engines.reference import ReferenceEngines
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.runtime.exec.batch import StepLayout


def test_padding_changes_no_token(demo_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []
    layouts: list[StepLayout] = []  # of what is recorded

    def recording(*_: Any, **__: Any) -> ReferenceEngines:
        engines = ReferenceEngines("f32", "cpu")
        engines.arrays.records = True

        def recorded(run: Any) -> Callable[[], None]:
            launches.append(0)
            layouts.extend(run.args)  # of the partial that launches a layout
            place = len(launches) - 1

            def counted() -> None:
                launches[place] += 1
                run()

            return counted

        engines.arrays.recorded = recorded  # type: ignore[method-assign]
        return engines

    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    sides = []
    for recorded in (False, True):
        if recorded:
            monkeypatch.setattr("blockzoo.runtime.serve.llm_engine.make_engines", recording)
        llm = LLM(demo_zoo, backend="reference", device="cpu", precision="f32", kv_cache_bytes=16 << 20)
        models = [llm.models[i] for i in (0, 0, 0, 2, 4, 4, 4, 4, 4)]
        rng = np.random.default_rng(3)
        prompts = [rng.integers(2, 2048, 20 + 9 * i).tolist() for i in range(len(models))]
        sides.append([c.token_ids for c in llm.generate(models, prompts, params, progress=False)])
    assert sides[0] == sides[1]
    assert max(launches) > 3  # shapes repeat, so that a recorded step is replayed
    (executor,) = llm.engine._zoo.executors.values()
    keeping = [
        layout for layout, *_ in executor._layouts.values() if any(call.passed for call in layout.calls)
    ]
    assert keeping
    assert not [layout for layout in keeping if layout in layouts]  # a replay would hand nothing out
