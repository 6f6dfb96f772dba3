"""The executor against one-sequence probes of the same chains: any mixture of rows, any order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blockzoo.engines.embedding import EmbeddingTable
from blockzoo.engines.openvino import OpenVINOEngines
from blockzoo.engines.probe import ProbeChain
from blockzoo.runtime.exec.executor import Executor, Rows
from blockzoo.runtime.exec.topology import Topology, plan_topology
from blockzoo.zoo.store import Zoo

NUM_PAGES = 512
MAX_TOKENS = 256


class Setup:
    def __init__(self, path: Path, max_span_layers: int | None) -> None:
        self.zoo = Zoo.open(path)
        self.maker = OpenVINOEngines("f32")
        self.topology: Topology = plan_topology(self.zoo.manifest, max_span_layers)
        spans = self.topology.spans
        self.blocks = {i: self.zoo.read_block(i) for i in self.zoo.manifest.blocks}
        engines = {
            i: self.maker.span([self.blocks[b] for b in span.block_ids], drops_rows=span.drops_rows)
            for i, span in enumerate(spans)
        }
        chains = self.topology.chains
        rope = next(iter(self.zoo.manifest.models.values())).config.rope
        tables = rope.tables(chains[0].family.head_dim, 1024)
        self.executor = Executor(
            chains[0].family,
            chains,
            spans,
            engines,
            {c.embed_id: EmbeddingTable(self.blocks[c.embed_id], "f32") for c in chains},
            dict.fromkeys(range(len(chains)), tables),
            self.maker.arrays,
            NUM_PAGES,
            MAX_TOKENS,
            max_seqs=40,
        )
        self._free = np.random.default_rng(1).permutation(NUM_PAGES).astype(np.int32)

    def table(self, chain: int, tokens: int) -> np.ndarray:
        layers, pages = self.topology.chains[chain].num_layers, -(-tokens // 32)
        ids, self._free = np.split(self._free, [layers * pages])
        return ids.reshape(layers, pages)

    def reference(self, model: str, token_ids: np.ndarray) -> np.ndarray:
        record = self.zoo.manifest.models[model]
        blocks = [self.blocks[i] for i in record.chain]
        probe = ProbeChain(self.maker, blocks, record.config, len(token_ids))
        return probe.forward(token_ids.tolist(), 0)


@pytest.fixture(scope="module", params=[None, 1], ids=["fused", "layers"])
def setup(request: pytest.FixtureRequest, demo_zoo: Path) -> Setup:
    return Setup(demo_zoo, request.param)


def test_rows_of_all_models_meet_in_any_mixture(setup: Setup) -> None:
    rng = np.random.default_rng(0)
    models = sorted(setup.topology.chain_of_model)
    jobs = []
    for model in models * 2:
        ids = rng.integers(0, 2000, int(rng.integers(3, 70)), dtype=np.int32)
        chain = setup.topology.chain_of_model[model]
        jobs.append((chain, ids, setup.table(chain, len(ids)), setup.reference(model, ids)))
    done = [0] * len(jobs)
    checked = 0
    while any(count < len(job[1]) for count, job in zip(done, jobs, strict=True)):
        batch, owners = [], []
        budget = MAX_TOKENS
        for i in rng.permutation(len(jobs)):
            chain, ids, table, _ = jobs[i]
            left = len(ids) - done[i]
            take = min(left, budget, int(rng.integers(0, 33)))
            if take:
                wants = bool(take == left or rng.integers(4) == 0)
                batch.append(Rows(chain, ids[done[i] : done[i] + take], done[i], table, wants))
                owners.append(i)
                budget -= take
        if not batch:
            continue
        result = setup.executor.run(batch)
        for i, rows in zip(owners, batch, strict=True):
            done[i] += len(rows.token_ids)
        found = {
            index: row
            for logits, indices in result.logits
            for row, index in zip(logits, indices, strict=True)
        }
        assert sorted(found) == [i for i, rows in enumerate(batch) if rows.num_logits]
        for index, row in found.items():
            expected = jobs[owners[index]][3][done[owners[index]] - 1]
            np.testing.assert_allclose(row, expected, atol=2e-4, rtol=1e-4)
            checked += 1
    assert checked >= len(jobs)


def test_shared_blocks_run_once_for_all_models(demo_zoo: Path) -> None:
    setup = Setup(demo_zoo, None)
    base, solver = (setup.topology.chain_of_model[m] for m in ("base", "solver"))
    rows = [Rows(c, np.array([5], np.int32), 0, setup.table(c, 1), True) for c in (base, solver, base)]
    result = setup.executor.run(rows)
    uses = {(use.position, use.span) for c in (base, solver) for use in setup.topology.chains[c].uses}
    assert result.num_calls == len(uses)
    assert result.num_calls < sum(len(setup.topology.chains[c].uses) for c in (base, solver, base))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past_len": -1}, "expected at least 1 after 0"),
        ({"token_ids": np.array([], np.int32)}, "0 new tokens"),
        ({"token_ids": np.array([2048], np.int32)}, "vocabulary 2048"),
        ({"token_ids": np.array([-1], np.int32)}, "token ids -1"),
        ({"past_len": 32}, "2 pages"),
        ({"page_table": np.full((6, 1), NUM_PAGES, np.int32)}, f"in a pool of {NUM_PAGES}"),
        ({"page_table": np.full((6, 1), -1, np.int32)}, "page ids -1"),
        ({"page_table": np.zeros((5, 1), np.int32)}, "6 layers"),
        ({"past_len": 5000, "page_table": np.zeros((6, 200), np.int32)}, "positions are prepared"),
    ],
)
def test_what_would_crash_an_engine_is_refused(setup: Setup, change: dict, message: str) -> None:
    good = Rows(0, np.array([1], np.int32), 0, np.zeros((6, 1), np.int32), True)
    with pytest.raises(ValueError, match=message):
        setup.executor.run([good._replace(**change)])
