"""zoo-inspect --placement: what workers are, what a zoo asks of them, and how it is shown."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.browser import CHROMIUM, Browser
from blockzoo.build.inspect import main
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.zoo.cluster import ClusterRecord, WorkerRecord, read_cluster, zoo_task
from blockzoo.zoo.errors import ManifestError
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.placement import place
from blockzoo.zoo.placement_page import placement_data, placement_page
from blockzoo.zoo.store import Zoo

FAST = CompileOptions(verify=False, profile=False)
HALF_MB = 2**-11  # GiB


@pytest.fixture(scope="module")
def zoo(checkpoints: dict[str, Path], tuned_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a model whose last layer's ffn differs, and one of another family."""
    root = tmp_path_factory.mktemp("placed")
    models = {"alien": checkpoints["qwen3"], "base": checkpoints["llama"], "tuned": tuned_llama}
    compile_models(models, root / "zoo", FAST)
    return root / "zoo"


@pytest.fixture(scope="module")
def manifest(zoo: Path) -> Manifest:
    return Zoo.open(zoo).manifest


def workers(count: int, memory_gib: float, **more) -> ClusterRecord:
    return ClusterRecord(tuple(WorkerRecord(f"w{i}", memory_gib) for i in range(count)), **more)


# ---- workers


def test_workers_in_short() -> None:
    cluster = read_cluster("3x8GiB")
    assert [worker.memory_gib for worker in cluster.workers] == [8.0] * 3
    assert read_cluster("1x1.5GB").workers[0].memory_gib == pytest.approx(1.5e9 / 2**30)


def test_workers_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    given = {
        "workers": [{"name": "a", "memory_gib": 2}, {"name": "b", "memory_gib": 1, "speed": 0.5}],
        "hop_ms": [[0, 1], [1, 0]],
        "gbit_s": [[8, 1], [1, 8]],
        "head": "b",
        "rates": {"base": 3},
    }
    path.write_text(json.dumps(given))
    cluster = read_cluster(str(path))
    assert (cluster.workers[1].speed, cluster.head, cluster.rates) == (0.5, "b", {"base": 3.0})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"workers": []}, "0 workers; expected 1 to 64"),
        ({"workers": [{"name": "a", "memory_gib": 1}] * 2}, "2 workers; expected 1 to 64 of different names"),
        ({"workers": [{"name": "a", "memory_gib": 0}]}, "a: expected memory_gib and speed above 0"),
        ({"workers": [{"name": "a"}]}, "missing field 'memory_gib'"),
        ({"hop_ms": [[0, 1]]}, "hop_ms: expected 1 rows of 1 numbers"),
        ({"gbit_s": [[0]]}, "gbit_s: expected above 0"),
        ({"hop_ms": [[-1]]}, "hop_ms: expected at least 0"),
        ({"head": "z"}, "there is no worker 'z'"),
        ({"rates": {"base": -1}}, "rates.base: -1.0 is less than 0"),
        ({"cores": 3}, "unknown field 'cores'"),
    ],
)
def test_what_is_wrong_with_workers_is_said(change: dict, said: str, tmp_path: Path) -> None:
    path = tmp_path / "workers.json"
    path.write_text(json.dumps({"workers": [{"name": "a", "memory_gib": 1}]} | change))
    with pytest.raises(ManifestError, match=re.escape(said)):
        read_cluster(str(path))


def test_what_is_no_file_is_said(capsys: pytest.CaptureFixture[str], zoo: Path, tmp_path: Path) -> None:
    assert main([str(zoo), "--placement", "8GiB"]) == 2
    assert "expected a number and a size (3x8GiB), or a file in JSON" in capsys.readouterr().err
    assert main([str(zoo), "--placement", "1x1MB"]) == 0
    assert main([str(zoo), "--placement", "1x0.1MB"]) == 2
    assert "add workers" in capsys.readouterr().err
    compile_models({}, tmp_path / "empty", FAST)
    assert main([str(tmp_path / "empty"), "--placement", "1x1GB"]) == 2
    assert "an empty zoo has nothing to place" in capsys.readouterr().err


# ---- what a zoo asks of them


def test_spans_are_what_the_same_models_use(manifest: Manifest) -> None:
    placed = zoo_task(manifest, workers(1, 1.0))
    chains = placed.task.chains
    assert {name: len(chain.spans) for name, chain in chains.items()} == {"alien": 1, "base": 3, "tuned": 3}
    assert chains["base"].spans[0] == chains["tuned"].spans[0]
    assert chains["base"].spans[1] != chains["tuned"].spans[1]
    assert chains["base"].spans[2] == chains["tuned"].spans[2]
    for name, chain in chains.items():
        blocks = [block for span in chain.spans for block in placed.blocks[span]]
        assert tuple(blocks) == manifest.models[name].chain[1:]
    sizes = sum(block.num_bytes for block in manifest.blocks.values() if block.spec.kind != "embed")
    tied = sum(manifest.blocks[b.tied_to].num_bytes for b in manifest.blocks.values() if b.tied_to)
    assert sum(span.num_bytes for span in placed.task.spans.values()) == sizes + tied
    assert not placed.timed


def test_spans_are_cut_for_small_workers(manifest: Manifest) -> None:
    whole = max(span.num_bytes for span in zoo_task(manifest, workers(1, 1.0)).task.spans.values())
    size = 1.5 * whole
    cut = zoo_task(manifest, workers(4, size / 2**30))
    assert max(span.num_bytes for span in cut.task.spans.values()) <= size / 2
    assert len(cut.task.chains["alien"].spans) > 1
    for blocks in cut.blocks.values():
        assert manifest.blocks[blocks[0]].spec.kind in ("attn", "ffn", "head")
    plan = place(cut.task)
    assert len({worker for homes in plan.homes.values() for worker in homes}) > 1


def test_times_are_the_measured_ones(manifest: Manifest) -> None:
    blocks = {
        block_id: replace(block, latency_us={1: 110.0, 8: 180.0, 64: 700.0})
        if block.spec.kind != "embed"
        else block
        for block_id, block in manifest.blocks.items()
    }
    placed = zoo_task(replace(manifest, blocks=blocks), workers(1, 1.0))
    assert placed.timed
    for span, ids in placed.blocks.items():
        assert placed.task.spans[span].seconds == pytest.approx(10e-6 * len(ids))
        assert placed.task.spans[span].call_seconds == pytest.approx(100e-6 * len(ids))


def test_rates_and_links_are_those_given(manifest: Manifest) -> None:
    cluster = workers(
        2,
        1.0,
        head="w1",
        rates={"base": 7.0},
        hop_ms=((0.0, 2.0), (3.0, 0.0)),
        gbit_s=((8.0, 1.0), (1.0, 8.0)),
    )
    task = zoo_task(manifest, cluster).task
    assert (task.chains["base"].rate, task.chains["alien"].rate, task.head) == (7.0, 0.0, 1)
    hidden = max(model.config.hidden_size for model in manifest.models.values())
    assert task.hop_s[0][1] == pytest.approx(2e-3 + 2 * hidden / 1.25e8)
    assert task.byte_s[0] == pytest.approx([1e-9, 8e-9])
    with pytest.raises(ManifestError, match="there is no model 'nobody'"):
        zoo_task(manifest, replace(cluster, rates={"nobody": 1.0}))


# ---- how it is shown


def test_text_and_json_say_the_same(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(zoo), "--placement", "3x0.4MB"]) == 0
    text = capsys.readouterr().out
    assert main([str(zoo), "--placement", "3x0.4MB", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["models"]["base"]["chain"], "what --json shows without --placement is there too"
    found = seen["placement"]
    for name, model in found["models"].items():
        way = " > ".join(f"{span}@{worker}" for span, worker in model["route"])
        assert re.search(rf"^{name} .* {re.escape(way)}$", text, re.M)
        for span, worker in model["route"]:
            assert worker in found["spans"][span]["workers"]
            assert name in found["spans"][span]["models"]
    for worker in found["workers"]:
        used = sum(found["spans"][span]["num_bytes"] for span in worker["spans"])
        assert used == worker["used_bytes"] <= worker["num_bytes"] == 400_000
        assert re.search(
            rf"^{worker['name']}  {re.escape(worker['said'])} .* {' '.join(worker['spans']) or '-'}$",
            text,
            re.M,
        )
    assert any("no rates were given" in line for line in found["said"])
    assert any("without measured times" in line for line in found["said"])


def test_what_a_span_is(manifest: Manifest) -> None:
    placed = zoo_task(manifest, workers(1, 1.0))
    spans = placement_data(manifest, placed, place(placed.task))["spans"]
    first, own, head = (spans[span]["what"] for span in placed.task.chains["base"].spans)
    assert first == "layers 0 to 2 (without its feed-forward)"
    assert own == "layer 2 (feed-forward)"
    assert head == "head"
    assert spans[placed.task.chains["alien"].spans[0]]["what"] == "layers 0 to 2, head"


def test_the_page_escapes_names(manifest: Manifest) -> None:
    hostile = "</script><script>alert(1)</script>"
    named = replace(manifest, models={hostile: manifest.models["base"]})
    placed = zoo_task(named, workers(1, 1.0))
    assert "<script>alert" not in placement_page(named, placed, place(placed.task), hostile)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: chromium)")
def test_the_page_in_a_browser(zoo: Path, tmp_path: Path) -> None:
    page = tmp_path / "placement.html"
    assert main([str(zoo), "--placement", "3x0.4MB", "--html", str(page)]) == 0
    with Browser() as browser:
        for width, dark in ((1280, False), (390, True)):
            tab = browser.open(page.as_uri(), width, dark=dark)
            assert tab.evaluate("document.querySelectorAll('.worker').length") == 3
            assert tab.evaluate("document.querySelectorAll('tbody tr').length") == 3
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
            span = tab.evaluate("document.querySelector('td i').dataset.span")
            same = f"[...document.querySelectorAll('i')].filter(i => i.dataset.span === '{span}')"
            tab.evaluate(f"{same}[0].dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}))")
            assert tab.evaluate(f"{same}.every(i => i.classList.contains('lit'))")
            assert tab.evaluate("document.querySelectorAll('.lit').length") == tab.evaluate(f"{same}.length")
            assert f"span {span}: " in tab.evaluate("document.querySelector('.pointed').textContent")
            heights = "[...document.querySelectorAll('.memory')].map(m => m.scrollHeight <= m.clientHeight)"
            assert tab.evaluate(heights) == [True] * 3, "what a worker holds fits its box"
            assert tab.problems == []
            assert {url for url in tab.requests if not url.startswith(("file:", "data:"))} == set()
            tab.close()
