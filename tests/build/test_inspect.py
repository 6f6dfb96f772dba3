"""zoo-inspect: the map, the check and the page."""

import base64
import hashlib
import io
import itertools
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build.inspect import main
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.zoo.sharing import layer_runs, letters, sharing_map
from blockzoo.zoo.sharing_page import sharing_data, sharing_page
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.summary import human_bytes

FAST = CompileOptions(verify=False, profile=False)


@pytest.fixture(scope="module")
def zoo(checkpoints: dict[str, Path], tuned_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a copy, a model whose last layer's ffn differs, and one of another family."""
    root = tmp_path_factory.mktemp("inspect")
    base = checkpoints["llama"]
    models = {"alien": checkpoints["qwen3"], "base": base, "copy": base, "tuned": tuned_llama}
    compile_models(models, root / "zoo", FAST)
    return root / "zoo"


def test_the_map(zoo: Path) -> None:
    manifest = Zoo.open(zoo).manifest
    shared = sharing_map(manifest)
    assert shared.models.index("alien") in (0, 3)  # the one that shares nothing stands at an end
    labels = letters(shared)
    assert "".join(labels["alien", kind, layer] for kind, layer in shared.columns) == "........"
    assert "".join(labels["base", kind, layer] for kind, layer in shared.columns) == "AAAAAAAA"
    assert "".join(labels["tuned", kind, layer] for kind, layer in shared.columns) == "AAAAAA.A"
    assert layer_runs(shared, labels) == [(0, 1), (2, 2)]
    assert shared.own_bytes["copy"] == 0
    assert shared.own_bytes["alien"] == shared.all_bytes["alien"]
    block = shared.cells["tuned", "ffn", 2]
    assert shared.users[block] == ("tuned",)
    assert shared.own_bytes["tuned"] == manifest.blocks[block].num_bytes


def test_the_table(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(zoo)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^model  embed  0-1  2  head", out, re.M)
    assert re.search(r"^base\s+A\s+AA AA\s+A\s+0 B of 222 kB$", out, re.M)
    assert re.search(r"^tuned\s+A\s+AA A\.\s+A\s+37 kB of 222 kB$", out, re.M)
    assert "4 models, 17 distinct blocks" in out
    assert "not measured" in out
    assert "not verified" in out


def test_json(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(zoo), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert list(seen["models"]) == ["alien", "base", "copy", "tuned"]
    assert seen["stored_bytes"] < seen["unshared_bytes"]
    assert seen["blocks"][seen["models"]["base"]["chain"][0]]["users"] == ["base", "copy", "tuned"]
    assert "problems" not in seen


def test_check_finds_every_damaged_file(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    assert main([str(copy), "--check"]) == 0
    assert "every checksum right, every engine compiles" in capsys.readouterr().out
    first, second, *_ = sorted((copy / "blocks").iterdir())
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    second.unlink()
    next((copy / "tokenizers").iterdir()).joinpath("tokenizer.json").write_text("{}")
    assert main([str(copy), "--check", "--json"]) == 1
    problems = "\n".join(json.loads(capsys.readouterr().out)["problems"])
    assert first.name in problems
    assert second.name in problems
    assert "tokenizer files are not what was compiled" in problems


class _Page(HTMLParser):
    """Collects tags, everything a browser would fetch, and what the page holds besides text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.policy = ""
        self.inside: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name in given if name.startswith("on") or name == "style"]
        if tag == "meta":
            self.policy += given.get("content") or "" if "http-equiv" in given else ""
        else:
            self.open.append(tag if given.get("type") is None else "data")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() in (tag, "data")

    def handle_data(self, data: str) -> None:
        self.inside[self.open[-1] if self.open else ""] = data


def test_the_page_is_whole_and_self_contained(zoo: Path, tmp_path: Path) -> None:
    assert main([str(zoo), "--html", str(tmp_path / "map.html")]) == 0
    text = (tmp_path / "map.html").read_text("utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.fetched == []
    assert "http:" not in text
    assert "https:" not in text
    for tag in ("style", "script"):  # the policy lets these run, and nothing else
        digest = base64.b64encode(hashlib.sha256(page.inside[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page.policy
    assert json.loads(page.inside["data"]) == sharing_data(Zoo.open(zoo).manifest)


def test_what_the_page_draws(zoo: Path) -> None:
    manifest = Zoo.open(zoo).manifest
    data = sharing_data(manifest)
    models = {model["name"]: model for model in data["models"]}
    assert data["layers"] == 3
    assert len(data["blocks"]) == len(manifest.blocks)
    for name, record in manifest.models.items():
        chain = [data["blocks"][number][0] for number in models[name]["chain"]]
        assert chain == [block_id[:12] for block_id in record.chain]
    users = [data["groups"][data["blocks"][number][4]] for number in models["tuned"]["chain"]]
    names = [[data["models"][number]["name"] for number in group["models"]] for group in users]
    assert [sorted(group) for group in names] == 6 * [["base", "copy", "tuned"]] + [
        ["tuned"],
        ["base", "copy", "tuned"],
    ]
    assert models["tuned"]["own"] == "37 kB"
    colours = {block[3] for block in data["blocks"]}
    assert all(re.fullmatch(r"hsl\(\d+ \d+% \d+%\)", colour) for colour in colours)


def test_the_page_escapes_names(zoo: Path) -> None:
    hostile = "</script><script>alert(1)</script>"
    manifest = Zoo.open(zoo).manifest
    named = replace(manifest, models={hostile: manifest.models["base"]})
    assert "<script>alert" not in sharing_page(named, hostile)


def test_an_empty_zoo(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(zoo, tmp_path / "zoo"))
    compile_models({}, copy, FAST, remove=["alien", "base", "copy", "tuned"])
    assert main([str(copy), "--html", str(tmp_path / "map.html")]) == 0
    assert "an empty zoo" in capsys.readouterr().out
    assert list((copy / "blocks").iterdir()) == []


def test_what_is_no_zoo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "expected a zoo, written by zoo-compile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (16_800_000, "16.8 MB"), (999_600, "1 MB"), (3e12, "3 TB")],
)
def test_human_bytes(count: Any, said: str) -> None:
    assert human_bytes(int(count)) == said


def test_progress_is_quiet_for_short_work(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockzoo.build import progress

    clock = iter([0.1, 0.5, 0.9, 1.0, 5.0, 12.0, 13.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    printer = progress.ProgressPrinter()
    for done in range(3):
        printer("short work", done, 2)
    for done in range(4):
        printer("long work", done, 3)
    printer.close()
    assert capsys.readouterr().err == "long work: 2 of 3\nlong work: done in 12.0 s\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockzoo.build import progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    clock = itertools.count(0.0, 2.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    terminal = Terminal()
    printer = progress.ProgressPrinter(terminal)
    for done in range(4):
        printer("long work", done, 3, "a phase of it")
    printer.close()
    assert "long work (a phase of it)" in terminal.getvalue()
