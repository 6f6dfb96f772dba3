"""Spans, drops, segments and row programs on made-up zoos, without engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockzoo.engines.arrays import HostArrays
from blockzoo.runtime.exec.batch import SeqShape, StepLayout, batch_order, layout_key
from blockzoo.runtime.exec.calls import Call, CallGraph
from blockzoo.runtime.exec.step_arrays import Buffers
from blockzoo.runtime.exec.topology import Copy, Topology, plan_topology, with_copies
from blockzoo.zoo.blocks import AttnSpec, BlockSpec, EmbedSpec, FfnSpec, HeadSpec
from blockzoo.zoo.manifest import BlockRecord, Manifest, ModelRecord
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.rope import RopeConfig

HIDDEN, VOCAB, HEAD_DIM = 4, 8, 2
ROPE = RopeConfig("default", 10000.0)
SPECS: dict[str, BlockSpec] = {
    "e": EmbedSpec(VOCAB, HIDDEN),
    "a": AttnSpec(HIDDEN, 2, 1, HEAD_DIM, 1e-5, ROPE, 0, False, False, False),
    "f": FfnSpec(HIDDEN, 8, 1e-5, False),
    "h": HeadSpec(HIDDEN, VOCAB, 1e-5, False),
}


def topology_of(
    chains: dict[str, str], max_span_layers: int | None = None, check_layers: int | None = None
) -> Topology:
    """Chains as words of block ids whose first letter is the kind: "e a1 f1 h"."""
    models = {name: _model(tuple(chain.split())) for name, chain in chains.items()}
    manifest = Manifest(models=models, blocks=blocks_of(chains))
    return plan_topology(manifest, max_span_layers, check_layers=check_layers)


def blocks_of(chains: dict[str, str]) -> dict[str, BlockRecord]:
    ids = {block for chain in chains.values() for block in chain.split()}
    return {
        i: BlockRecord(
            spec=SPECS[i[0]],
            dtype="f32",
            num_bytes=1,
            tied_to=None,
            plan="p",
            latency_us=None,
            latency_block=None,
        )
        for i in ids
    }


def _model(chain: tuple[str, ...]) -> ModelRecord:
    config = ModelConfig.__new__(ModelConfig)  # the topology reads blocks, not the config
    return ModelRecord(config=config, chain=chain, tokenizer="t", source=None, verification=None)  # type: ignore[arg-type]


def spans_of(topology: Topology, model: str) -> list[str]:
    chain = topology.chains[topology.chain_of_model[model]]
    return [" ".join(topology.spans[use.span].block_ids) for use in chain.uses]


def drops_of(topology: Topology) -> set[str]:
    return {" ".join(span.block_ids) for span in topology.spans if span.drops_rows}


def test_one_model_is_one_span() -> None:
    topology = topology_of({"m": "e a1 f1 a2 f2 h"})
    assert spans_of(topology, "m") == ["a1 f1 a2 f2 h"]
    assert drops_of(topology) == {"a1 f1 a2 f2 h"}


def test_tenants_that_differ_above_a_boundary() -> None:
    topology = topology_of({"x": "e a1 f1 a2 f2 h", "y": "e a1 f1 a3 f3 h", "alias": "e a1 f1 a2 f2 h"})
    assert spans_of(topology, "x") == ["a1 f1", "a2 f2", "h"]
    assert spans_of(topology, "y") == ["a1 f1", "a3 f3", "h"]
    assert topology.chain_of_model["x"] == topology.chain_of_model["alias"]
    assert drops_of(topology) == {"a2 f2", "a3 f3"}
    x, y = (topology.chains[topology.chain_of_model[m]].segments for m in "xy")
    assert [(s.first_layer, s.end_layer) for s in x] == [(0, 1), (1, 2)]
    assert x[0].key == y[0].key
    assert x[1].key != y[1].key


def test_another_embedding_shares_engines_but_no_kv() -> None:
    topology = topology_of({"x": "e1 a1 f1 h", "y": "e2 a1 f1 h"})
    assert len(topology.spans) == 1
    x, y = (topology.chains[topology.chain_of_model[m]].segments for m in "xy")
    assert x[0].key != y[0].key


def test_the_attention_of_a_layer_is_part_of_its_kv_but_its_ffn_is_not() -> None:
    topology = topology_of({"x": "e a1 f1 a2 f2 h", "y": "e a1 f3 a2 f2 h"})
    x, y = (topology.chains[topology.chain_of_model[m]].segments for m in "xy")
    assert x[0] == y[0]
    assert (x[0].first_layer, x[0].end_layer) == (0, 1)
    assert x[1].key != y[1].key


def test_rows_leave_in_the_next_span_where_a_chain_goes_on() -> None:
    topology = topology_of({"short": "e a1 f1 h", "long": "e a1 f1 a2 f2 h"})
    assert spans_of(topology, "short") == ["a1 f1", "h"]
    assert spans_of(topology, "long") == ["a1 f1", "a2 f2", "h"]
    assert drops_of(topology) == {"h", "a2 f2"}


def entries_of(topology: Topology, model: str) -> list[str]:
    """The blocks before which a model's tokens may enter, segment by segment."""
    chain = topology.chains[topology.chain_of_model[model]]
    return [topology.spans[chain.uses[use].span].block_ids[0] for use in chain.entries]


def test_tokens_enter_where_chains_part() -> None:
    topology = topology_of(
        {"x": "e a1 f1 a2 f2 h", "y": "e a1 f1 a3 f2 h", "z": "e a1 f3 a2 f2 h", "own": "e2 a1 f1 a2 f2 h"}
    )
    assert entries_of(topology, "x") == ["a1", "f1"]  # z differs in the first ffn, so nobody enters behind it
    assert entries_of(topology, "y") == ["a1", "f1"]
    assert entries_of(topology, "z") == ["a1", "f3"]
    assert entries_of(topology, "own") == ["a1"]
    x, y, z, own = (topology.chains[topology.chain_of_model[m]].segments for m in ("x", "y", "z", "own"))
    assert x[1].boundary == y[1].boundary == z[1].boundary != ""
    assert [s.boundary for s in own] == [""]


THREE = {"x": "e a1 f1 a2 f2 a3 f3 h", "y": "e a1 f1 a2 f2 a4 f4 h", "z": "e a1 f1 a5 f5 h"}


def test_each_set_of_sharers_has_its_boundary() -> None:
    topology = topology_of(THREE)
    assert entries_of(topology, "x") == ["a1", "a2", "a3"]
    assert entries_of(topology, "y") == ["a1", "a2", "a4"]
    assert entries_of(topology, "z") == ["a1", "a5"]
    x, y, z = (topology.chains[topology.chain_of_model[m]].segments for m in "xyz")
    assert x[1] == y[1]
    assert x[1].boundary == z[1].boundary
    assert x[2].boundary == y[2].boundary != x[1].boundary


def test_chains_part_where_one_goes_through_a_copy() -> None:
    topology = topology_of(THREE)
    x, y, z = (topology.chain_of_model[name] for name in "xyz")
    blocks = blocks_of(THREE)
    span = topology.chains[x].uses[1].span
    assert topology.chains[y].uses[1].span == span
    found = with_copies(topology, [Copy(span, (y,)), Copy(0, ())], blocks)
    assert [found.spans[i].block_ids for i in (-2, -1)] == [topology.spans[i].block_ids for i in (span, 0)]
    assert found.originals == (*range(len(topology.spans)), span, 0)
    assert found.chains[y].uses[1].span == len(topology.spans)
    assert found.chains[x].uses == topology.chains[x].uses
    assert found.chains[x].layer_keys == topology.chains[x].layer_keys
    common = [a == b for a, b in zip(found.chains[x].layer_keys, found.chains[y].layer_keys, strict=True)]
    assert common == [True, False, False]
    segments = [[(s.first_layer, s.end_layer) for s in found.chains[i].segments] for i in (x, y, z)]
    assert segments == [[(0, 1), (1, 3)], [(0, 1), (1, 3)], [(0, 1), (1, 2)]]
    assert entries_of(found, "y") == ["a1", "a2"]
    assert [found.chains[i].key for i in (x, y, z)] == [topology.chains[i].key for i in (x, y, z)]
    assert with_copies(found, [Copy(span, (y,))], blocks) == with_copies(topology, [Copy(span, (y,))], blocks)
    assert with_copies(found, (), blocks) == topology


def test_late_rows_do_not_part_the_rows_below() -> None:
    topology = topology_of({"x": "e a1 f1 a2 f2 h", "y": "e a1 f1 a3 f3 h"})
    kinds = [(chain, topology.chains[chain].entries[level]) for chain in (1, 0) for level in (0, 1)]
    order = batch_order([(*kind, False) for kind in kinds])
    assert [kinds[i] for i in order] == [(0, 1), (0, 0), (1, 0), (1, 1)]
    shapes = [SeqShape(chain, 3, 8, True, entry, True) for chain, entry in (kinds[i] for i in order)]
    layout = StepLayout(shapes, topology.chains, topology.spans, _buffers(32, 8), HOST)
    assert [call.num_rows for call in layout.calls] == [6, 6, 6, 4]
    assert not any(call.copies_in or call.copies_out for call in layout.calls)


def test_a_block_may_recur_in_a_chain() -> None:
    topology = topology_of({"m": "e a1 f1 a1 f1 a2 f2 h"})
    chain = topology.chains[0]
    assert spans_of(topology, "m") == ["a1 f1", "a1 f1", "a2 f2 h"]
    assert [use.first_layer for use in chain.uses] == [0, 1, 2]
    assert chain.num_layers == 3


def test_spans_can_be_cut_by_layers() -> None:
    topology = topology_of({"m": "e a1 f1 a2 f2 a3 f3 h"}, max_span_layers=2)
    assert spans_of(topology, "m") == ["a1 f1 a2 f2", "a3 f3 h"]


# ---- row programs, with arithmetic in place of engines


def _constant(block_id: str) -> float:
    return float(sum(ord(char) * (i + 1) for i, char in enumerate(block_id)) % 97 + 1)


HOST = HostArrays("f32")
KV = dict[tuple[int, int], float]  # (first page id of the sequence in a layer, position) -> what was written


def _run_engine(topology: Topology, call: Call, kv: KV) -> Iterator[None]:
    """x -> x / 2 + c per block; attention writes x to its page and adds position, page ids, rotary row.

    Pauses between what it reads and what it writes.
    """
    span, binds = topology.spans[call.span], call.binds
    x, layer = binds["hidden"].copy(), 0
    if span.drops_rows and not span.num_layers:
        x = x[binds["rows"]]
    for block_id in span.block_ids:
        x = x * np.float32(0.5) + np.float32(_constant(block_id))
        if block_id[0] != "a":
            continue
        begins, entries = binds["subsequence_begins"], binds["block_indices_begins"]
        for s, past in enumerate(binds["past_lens"]):
            rows = slice(begins[s], begins[s + 1])
            table = binds[f"block_indices.{layer}"][entries[s] : entries[s + 1]]
            kv.update({(int(table[0]), int(past) + i): float(row[0]) for i, row in enumerate(x[rows])})
            x[rows] += np.arange(past, past + begins[s + 1] - begins[s], dtype=np.float32)[:, None]
            x[rows] += np.float32(table.sum())
            x[rows] += binds["cos"][rows, 0, 0, :1]
        layer += 1
        if span.drops_rows and layer == span.num_layers:
            x = x[binds["rows"]]
    yield
    out = binds["logits"] if "logits" in binds else binds["hidden_out"]
    out[:, : x.shape[1]] = x


def _run_call(
    topology: Topology, call: Call, kv: KV, passed: dict[tuple[int, int], np.ndarray]
) -> Iterator[None]:
    """A call in steps, between which others may take some."""
    for destination, source in call.copies_in:
        destination[...] = source
        yield
    yield from _run_engine(topology, call, kv)
    yield
    for destination, source in call.copies_out:
        destination[...] = source
        yield
    passed |= {(kept.seq, kept.entry): kept.rows.copy() for kept in call.passed}


def _run_in_any_order(
    graph: CallGraph, start: Callable[[Call], Iterator[None]], rng: np.random.Generator
) -> None:
    """Every call of a graph, a step of one that runs or that may begin at a time; some are much slower."""
    speeds = 10 ** rng.uniform(-2, 2, len(graph.calls))
    running: dict[int, Iterator[None]] = {}
    done: set[int] = set()
    while len(done) < len(graph.calls):
        ready = [i for i in range(len(graph.calls)) if i not in done and graph.waits_for[i] <= done]
        index = int(rng.choice(ready, p=speeds[ready] / speeds[ready].sum()))
        steps = running.setdefault(index, start(graph.calls[index]))
        if next(steps, StopIteration) is StopIteration:
            done.add(index)


def _expected(
    chain: list[str], first: int, x: np.ndarray, past: int, tables: np.ndarray, cos: np.ndarray, kv: KV
) -> dict[int, np.ndarray]:
    """The rows before each block from `first` on, and after the last."""
    rows = {first: x}
    layer = sum(block_id[0] == "a" for block_id in chain[:first])
    for position in range(first, len(chain)):
        x = x * np.float32(0.5) + np.float32(_constant(chain[position]))
        if chain[position][0] == "a":
            kv.update({(int(tables[layer][0]), past + i): float(row[0]) for i, row in enumerate(x)})
            x += np.arange(past, past + len(x), dtype=np.float32)[:, None]
            x += np.float32(tables[layer].sum())
            x += cos
            layer += 1
        rows[position + 1] = x
    return rows


_BLOCKS = st.sampled_from(["a1 f1", "a2 f2", "a1 f2", "a3 f3", "a4 f1"])
_CHAIN = st.builds(
    lambda layers, head: " ".join(["e", *layers, head]),
    st.lists(_BLOCKS, min_size=1, max_size=4),
    st.sampled_from(["h1", "h2"]),
)
_PARTING = ["e a1 f1 a2 f2 h1", "e a1 f1 a3 f3 h1", "e a1 f1 a4 f4 h1"]  # many rows that are not neighbours


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.just(_PARTING), st.lists(_CHAIN, min_size=1, max_size=4)), st.data())
def test_every_row_goes_through_its_own_chain_in_any_order_of_calls(
    chains: list[str], data: st.DataObject
) -> None:
    words = {f"m{i}": chain for i, chain in enumerate(chains)}
    limit = st.sampled_from([None, 1, 2])
    topology = topology_of(words, data.draw(limit), data.draw(limit))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    models = data.draw(st.lists(st.sampled_from(sorted(words)), min_size=1, max_size=8))
    entries, exits = [], []
    for model in models:
        plan = topology.chains[topology.chain_of_model[model]]
        entries.append(data.draw(st.sampled_from(sorted({*plan.entries, plan.check or 0}))))
        exits.append(
            plan.check if plan.check and entries[-1] < plan.check and data.draw(st.booleans()) else None
        )
    order = batch_order(
        [
            (topology.chain_of_model[m], a, b is not None)
            for m, a, b in zip(models, entries, exits, strict=True)
        ]
    )
    models, entries, exits = ([values[i] for i in order] for values in (models, entries, exits))
    shapes = [
        SeqShape(
            topology.chain_of_model[m],
            int(rng.integers(1, 4)),
            int(rng.integers(1, 3)),
            bool(rng.integers(2)) and leaves is None,
            entry,
            bool(rng.integers(2)) and leaves is None,
            leaves,
        )
        for m, entry, leaves in zip(models, entries, exits, strict=True)
    ]
    buffers = _buffers(max_tokens=32, max_seqs=8)
    layout = StepLayout(shapes, topology.chains, topology.spans, buffers, HOST)
    arrays = layout.arrays
    arrays.past_lens[:] = rng.integers(0, 9, len(shapes))
    arrays.tables[:] = rng.permutation(arrays.tables.size).reshape(arrays.tables.shape)
    rows = layout.num_rows
    start = rng.integers(0, 9, (rows, HIDDEN)).astype(np.float32)
    for i, shape in enumerate(shapes):
        begin, end = layout.seq_begins[i : i + 2]
        buffers.hidden[0][begin:end] = start[begin:end] if shape.entry == 0 else np.nan
        if shape.entry:
            layout.entering_rows(i)[...] = start[begin:end]
    buffers.cos[:rows] = rng.integers(0, 9, (rows, 1, 1, 1))
    written: KV = {}
    passed: dict[tuple[int, int], np.ndarray] = {}
    _run_in_any_order(layout.graph, lambda call: _run_call(topology, call, written, passed), rng)
    found = {seq: row for matrix, seqs in layout.logits for row, seq in zip(matrix, seqs, strict=True)}
    assert sorted(found) == [i for i, shape in enumerate(shapes) if shape.num_logits]
    expected_kv: KV = {}
    for i, model in enumerate(models):
        begin, end = layout.seq_begins[i : i + 2]
        table = arrays.tables[:, layout.table_begins[i] : layout.table_begins[i + 1]]
        cos, past = buffers.cos[begin:end, 0, 0, :1], int(arrays.past_lens[i])
        chain = topology.chains[shapes[i].chain]
        first = chain.uses[entries[i]].position
        blocks = words[model].split()[: None if exits[i] is None else chain.uses[exits[i]].position]
        expected = _expected(blocks, first, start[begin:end], past, table, cos, expected_kv)
        if i in found:
            np.testing.assert_allclose(found[i][:HIDDEN], expected[len(blocks)][-1], rtol=1e-5)
        for entry in {*chain.entries} if exits[i] is None else {exits[i]}:
            kept = shapes[i].keeps_hidden or entry == exits[i]
            assert ((i, entry) in passed) == (kept and entry > entries[i])
            if (i, entry) in passed:
                np.testing.assert_allclose(passed[i, entry], expected[chain.uses[entry].position], rtol=1e-5)
    assert written == pytest.approx(expected_kv)


def test_an_output_that_nobody_reads_disturbs_none() -> None:
    """Rows that enter late and want no logits run beside a call whose rows are not neighbours."""
    topology = topology_of({"x": _PARTING[0], "y": _PARTING[1], "z": _PARTING[2]})
    late = SeqShape(0, 3, 1, False, entry=1)
    shapes = [late, SeqShape(1, 4, 1, False), late._replace(chain=1), SeqShape(2, 4, 1, False)]
    seen = []
    for seed in range(400):
        buffers = _buffers(max_tokens=32, max_seqs=8)
        layout = StepLayout(shapes, topology.chains, topology.spans, buffers, HOST)
        layout.arrays.tables[:] = np.arange(layout.arrays.tables.size).reshape(layout.arrays.tables.shape)
        for rows in buffers.hidden:
            rows[...] = np.arange(len(rows))[:, None]
        written: KV = {}
        run = partial(_run_call, topology, kv=written, passed={})
        _run_in_any_order(layout.graph, run, np.random.default_rng(seed))
        seen.append(written)
    assert all(written == seen[0] for written in seen)


def _buffers(max_tokens: int, max_seqs: int) -> Buffers:
    def pair(rows: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full((rows, HIDDEN), np.nan, np.float32), np.full((rows, HIDDEN), np.nan, np.float32)

    return Buffers(
        hidden=pair(max_tokens),
        kept=pair(max_seqs),
        scratch=pair(max_tokens),
        cos=np.zeros((max_tokens, 1, 1, HEAD_DIM), np.float32),
        sin=np.zeros((max_tokens, 1, 1, HEAD_DIM), np.float32),
        logits=np.full(max_seqs * VOCAB, np.nan, np.float32),
    )


def test_spans_are_cut_behind_the_check_layers() -> None:
    chains = {"x": "e a1 f1 a2 f2 a3 f3 h", "y": "e a1 f1 a4 f4 a3 f3 h", "z": "e a1 f1 a2 f2 h2"}
    topology = topology_of(chains, None, 2)
    assert spans_of(topology, "x") == ["a1 f1", "a2 f2", "a3 f3 h"]
    assert [chain.check for chain in (topology.chains[topology.chain_of_model[m]] for m in "xyz")] == [
        2,
        2,
        None,
    ]
    alone = topology_of({"x": "e a1 f1 a2 f2 a3 f3 h"}, None, 2)
    assert spans_of(alone, "x") == ["a1 f1 a2 f2", "a3 f3 h"]
    assert alone.chains[0].check == 1


def test_a_steady_decode_of_neighbours_copies_nothing() -> None:
    topology = topology_of({"x": "e a1 f1 a2 f2 h", "y": "e a1 f1 a3 f3 h", "z": "e a1 f1 a4 f4 h"})
    shapes = [SeqShape(chain, 1, 8, True) for chain in range(3) for _ in range(2)]
    layout = StepLayout(shapes, topology.chains, topology.spans, _buffers(32, 8), HOST)
    assert len(layout.calls) == 5  # lower layers, three times the upper, head
    assert [call.num_rows for call in layout.calls] == [6, 2, 2, 2, 6]
    assert not any(call.copies_in or call.copies_out for call in layout.calls)


def test_a_layout_fits_drafts_that_are_shared_out_otherwise() -> None:
    topology = topology_of({"x": "e a1 f1 a2 f2 h", "y": "e a1 f1 a3 f3 h"})

    def laid_out(counts: list[int]) -> tuple[list[SeqShape], StepLayout]:
        shapes = [SeqShape(i // 3, n, 8, n) for i, n in enumerate(counts)]
        return shapes, StepLayout(shapes, topology.chains, topology.spans, _buffers(32, 16), HOST)

    _, layout = laid_out([1, 4, 2, 1, 1, 3])
    wanted, fresh = laid_out([2, 2, 3, 3, 1, 1])
    assert layout_key(layout.shapes) == layout_key(wanted)
    bound = [dict(call.binds) for call in layout.calls]
    layout.fit(wanted)
    assert layout.seq_begins.tolist() == fresh.seq_begins.tolist()
    assert [owners for _, owners in layout.logits] == [owners for _, owners in fresh.logits]
    for call, before, expected in zip(layout.calls, bound, fresh.calls, strict=True):
        assert all(call.binds[name] is array for name, array in before.items()), "nothing is bound anew"
        for name in call.binds.keys() & {"subsequence_begins", "block_indices_begins", "rows"}:
            assert call.binds[name].tolist() == expected.binds[name].tolist()
    for others in ([2, 2, 3, 3, 1, 2], [2, 2, 2, 4, 1, 1]):
        assert layout_key(laid_out(others)[0]) != layout_key(wanted), "of each chain as many rows in all"
    prompts = [SeqShape(0, n, 8, 1) for n in (3, 4)]
    assert layout_key(prompts) != layout_key(prompts[::-1])


@pytest.mark.parametrize("wants", [(False, False, False), (True, False, True)])
def test_a_chunk_without_logits_skips_the_head(wants: tuple[bool, ...]) -> None:
    topology = topology_of({"x": "e a1 f1 a2 f2 h", "y": "e a1 f1 a3 f3 h"})
    shapes = [SeqShape(0, 3, 8, wants[0]), SeqShape(0, 3, 8, wants[1]), SeqShape(1, 3, 8, wants[2])]
    layout = StepLayout(shapes, topology.chains, topology.spans, _buffers(32, 8), HOST)
    heads = [call for call in layout.calls if "logits" in call.binds]
    assert len(heads) == int(any(wants))
    assert all(len(call.binds["logits"]) == sum(wants) for call in heads)


def test_what_stands_for_segments_and_chains_does_not_depend_on_who_else_is_there() -> None:
    chains = {"x": "e a1 f1 a2 f2 a3 f3 h", "y": "e a1 f1 a2 f2 a4 f4 h", "z": "e a1 f1 a5 f5 a3 f3 h"}
    found: dict[str, set[str]] = {}
    for names in ("x", "xy", "xz", "xyz"):
        topology = topology_of({name: chains[name] for name in names})
        chain = topology.chains[topology.chain_of_model["x"]]
        found.setdefault("key", set()).add(chain.key)
        for segment in chain.segments:  # by the layers that it has
            found.setdefault(f"{segment.first_layer}-{segment.end_layer}", set()).add(segment.key)
        assert [chain.layer_keys[s.end_layer - 1] for s in chain.segments] == [s.key for s in chain.segments]
    assert {layers: len(keys) for layers, keys in found.items()} == dict.fromkeys(found, 1)
    assert found.keys() == {"key", "0-3", "0-2", "2-3", "0-1", "1-3", "1-2"}
    # equal beginnings and lengths alone are not the same layers
    x, y = (topology_of({"m": chains[name]}).chains[0].segments for name in "xy")
    assert x != y
