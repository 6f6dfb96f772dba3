"""A server that follows its zoo: what changes in the repository, and a real one under requests."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.request
from typing import Any

import pytest
from patience import PATIENCE_S, wait_for
from served import free_port

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.server_config.follow import Change, Follower
from blockzoo.server_config.repository import RESERVED_NAMES, ServerSettings
from blockzoo.server_config.watchdog import UnhealthyError
from blockzoo.zoo.errors import ZooError

FAST = CompileOptions(verify=False, profile=False)
NOTHING: dict[str, Any] = {"added": [], "replaced": [], "removed": [], "waiting": {}, "left_out": {}}


class Engine:
    """Answers of the engine model, as a test scripts them."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] | Exception = NOTHING
        self.asked = 0

    def __call__(self) -> dict[str, Any]:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def zoo(demo_zoo, tmp_path):
    """A manifest of its own over the demo zoo's."""
    shutil.copy(demo_zoo / "manifest.json", tmp_path / "manifest.json")
    return tmp_path


def touch(zoo) -> None:
    text = (zoo / "manifest.json").read_text()
    (zoo / "new").write_text(text)
    (zoo / "new").rename(zoo / "manifest.json")


def stamps(repository) -> dict[str, int]:
    files = (path for path in repository.rglob("*") if path.is_file())
    return {str(path.relative_to(repository)): path.stat().st_mtime_ns for path in files}


def test_a_change_of_the_zoo_changes_what_it_must(zoo, engine, tmp_path):
    repository = tmp_path / "models"
    follower = Follower(ServerSettings(str(zoo)), repository, engine)
    assert "base" in follower.prepare()
    assert follower.follow() is None
    assert engine.asked == 0
    before = stamps(repository)

    touch(zoo)
    engine.answer = NOTHING | {
        "added": ["new"],
        "removed": ["notes"],
        "serving": ["base", "new", "solver"],
        "waiting": {"big": "9 engines would take about 900 MiB"},
    }
    change = follower.follow()
    assert change.tenants == ("base", "new", "solver")
    assert change.messages == (
        "added new",
        "removed notes",
        "big is not served yet: 9 engines would take about 900 MiB",
    )
    after = stamps(repository)
    assert {path.name for path in repository.iterdir()} == {*RESERVED_NAMES, "base", "new", "solver"}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"new/config.pbtxt", "preprocessing/config.pbtxt"}
    config = (repository / "preprocessing" / "config.pbtxt").read_text()
    assert "text_input@new" in config
    assert "text_input@notes" in config  # its ensemble may live a moment longer
    assert (repository / "new" / "1").is_dir()
    assert follower.follow() is None

    touch(zoo)
    assert follower.follow().messages == ("added new", "removed notes")  # what waits was told


def test_what_waits_for_memory_is_tried_again(zoo, engine, tmp_path, monkeypatch):
    follower = Follower(ServerSettings(str(zoo)), tmp_path / "models", engine)
    follower.prepare()
    touch(zoo)
    engine.answer = NOTHING | {"serving": ["base"], "waiting": {"big": "no memory"}}
    assert follower.follow().messages == ("big is not served yet: no memory",)
    assert follower.follow() is None
    assert engine.asked == 1
    monkeypatch.setattr("blockzoo.server_config.follow._RETRY_S", 0)
    touch(zoo)
    assert follower.follow().messages == ()
    engine.answer = NOTHING | {"added": ["big"], "serving": ["base", "big"]}
    assert follower.follow() == Change(("base", "big"), ("added big",))
    assert follower.follow() is None
    assert engine.asked == 3


def test_nobody_waits_for_an_engine_that_compiles(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("blockzoo.server_config.follow._PATIENCE_S", 0.01)
    compiled, asked = threading.Event(), []

    def reload() -> dict[str, Any]:
        asked.append(1)
        assert compiled.wait(PATIENCE_S)
        return NOTHING | {"added": ["new"], "serving": ["base", "new"]}

    follower = Follower(ServerSettings(str(zoo)), tmp_path / "models", reload)
    follower.prepare()
    touch(zoo)
    assert [follower.follow() for _ in range(3)] == [None] * 3
    compiled.set()
    change = wait_for(follower.follow)
    assert (change.tenants, change.messages, asked) == (("base", "new"), ("added new",), [1])


def test_an_engine_that_cannot_be_asked_is_asked_again(zoo, engine, tmp_path):
    follower = Follower(ServerSettings(str(zoo)), tmp_path / "models", engine)
    tenants = follower.prepare()
    touch(zoo)
    engine.answer = TimeoutError("no answer")
    assert follower.follow() is None
    assert follower.follow() is None
    assert engine.asked == 2
    engine.answer = UnhealthyError("the zoo was not reloaded: not JSON")
    change = follower.follow()
    assert (change.tenants, change.messages) == (tenants, ("the zoo was not reloaded: not JSON",))
    assert follower.follow() is None
    assert engine.asked == 3


def test_a_name_that_triton_cannot_serve_is_told(zoo, engine, tmp_path):
    follower = Follower(ServerSettings(str(zoo)), tmp_path / "models", engine)
    follower.prepare()
    touch(zoo)
    engine.answer = NOTHING | {"added": ["preprocessing"], "serving": ["base", "preprocessing"]}
    change = follower.follow()
    assert change.tenants == ("base",)
    assert "has the name of a server model" in change.messages[1]


def test_a_model_that_triton_cannot_serve_keeps_no_other_from_a_start(zoo, engine, tmp_path):
    follower = Follower(ServerSettings(str(zoo)), tmp_path / "models", engine)
    text = (zoo / "manifest.json").read_text()
    manifest = json.loads(text)
    manifest["models"]["blockzoo"] = manifest["models"].pop("notes")
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    assert follower.prepare() == tuple(sorted(manifest["models"].keys() - {"blockzoo"}))
    (why,) = follower.left_out.values()
    assert "model 'blockzoo' has the name of a server model; compile it under another name" in why
    manifest["models"] = {"blockzoo": manifest["models"]["blockzoo"]}
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ZooError, match="has the name of a server model"):
        follower.prepare()
    (zoo / "manifest.json").write_text(text)
    assert "notes" in follower.prepare()
    assert follower.left_out == {}


def test_models_that_the_engine_left_out_have_no_ensemble(zoo, engine, tmp_path):
    repository = tmp_path / "models"
    follower = Follower(ServerSettings(str(zoo)), repository, engine)
    follower.prepare()
    before = (repository / "preprocessing" / "config.pbtxt").stat().st_mtime_ns
    engine.answer = NOTHING | {"serving": ["base"], "left_out": {"notes": "blocks/a: corrupt"}}
    follower.settle()
    assert follower.tenants == ("base",)
    assert follower.left_out == {"notes": "model notes: blocks/a: corrupt"}
    assert {path.name for path in repository.iterdir()} == {*RESERVED_NAMES, "base"}
    assert (repository / "preprocessing" / "config.pbtxt").stat().st_mtime_ns == before
    assert follower.follow() is None

    touch(zoo)
    engine.answer = NOTHING | {
        "added": ["solver"],
        "serving": ["base", "solver"],
        "left_out": {"notes": "blocks/a: corrupt", "late": "blocks/b: missing"},
    }
    change = follower.follow()
    assert change.tenants == ("base", "solver")
    assert change.messages == ("added solver", "left out: model late: blocks/b: missing")


def test_strict_refuses_a_name_that_triton_cannot_serve(zoo, engine, tmp_path):
    manifest = json.loads((zoo / "manifest.json").read_text())
    manifest["models"]["blockzoo"] = manifest["models"].pop("notes")
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    settings = ServerSettings(str(zoo), {"strict": True})
    with pytest.raises(ZooError, match="has the name of a server model"):
        Follower(settings, tmp_path / "models", engine).prepare()


def test_a_server_that_starts_again_serves_what_the_zoo_holds(zoo, engine, tmp_path):
    follower = Follower(ServerSettings(str(zoo)), tmp_path / "models", engine)
    follower.prepare()
    manifest = json.loads((zoo / "manifest.json").read_text())
    del manifest["models"]["notes"]
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    assert "notes" not in follower.prepare()
    assert not (tmp_path / "models" / "notes").exists()
    assert follower.follow() is None
    (zoo / "manifest.json").unlink()
    assert follower.follow() is None
    with pytest.raises(ZooError):
        follower.prepare()


def openai_models(server) -> list[str]:
    with urllib.request.urlopen(f"{server.openai}/v1/models", timeout=PATIENCE_S) as answer:
        return [model["id"] for model in json.load(answer)["data"]]


def test_tenants_come_and_go_on_a_running_server(serve_zoo, demo_family, tmp_path):
    zoo = tmp_path / "zoo"
    compile_models({"base": demo_family["base"]}, zoo, FAST)
    server = serve_zoo(zoo, f"--openai-port={free_port()}")
    prompt = "Note. The baker Tessa owns the jade lamp.\nQ: Who keeps the jade lamp?\nA:"
    alone = server.generate("base", prompt)["text_output"]
    long = {"text_input": "x", "max_tokens": 400, "sampling_parameters": '{"ignore_eos": true}'}
    first = server.stream("base", long)
    assert len(first) == 400
    over = threading.Event()
    streamed: list[bool] = []

    def stream() -> None:
        while not over.is_set():
            streamed.append(server.stream("base", long) == first)

    streams = [threading.Thread(target=stream, daemon=True) for _ in range(2)]
    for thread in streams:
        thread.start()
    compile_models({"notes": demo_family["notes"], "solver": demo_family["solver"]}, zoo, FAST)
    server.wait_for(lambda: server.post("notes", {"text_input": "x", "max_tokens": 1})[0] == 200)
    answer = server.generate("notes", prompt)["text_output"]
    assert answer != alone
    assert answer == server.generate("blockzoo", prompt, model="notes")["text_output"]
    server.wait_for(lambda: any("added notes, solver" in line for line in server.err))
    server.wait_for(lambda: server.post("solver", {"text_input": "x", "max_tokens": 1})[0] == 200)
    assert server.generate("solver", prompt)["text_output"] != alone  # of the last layers its own
    server.wait_for(lambda: {*openai_models(server)} == {"base", "notes", "solver"})  # at most a second old
    compile_models({}, zoo, FAST, remove=["notes", "solver"])
    server.wait_for(lambda: any("removed notes, solver" in line for line in server.err))
    for name in ("notes", "solver"):
        server.wait_for(lambda: server.post(name, {"text_input": "x", "max_tokens": 1})[0] == 404)  # noqa: B023
    status, said = server.post("blockzoo", {"text_input": "x", "model": "notes", "max_tokens": 1})
    assert (status, "no model 'notes'" in said["error"]) == (400, True)
    assert server.generate("base", prompt)["text_output"] == alone
    over.set()
    for thread in streams:
        thread.join(PATIENCE_S)
    assert streamed
    assert all(streamed)  # each went on through it all, and said what it says when nothing changes
    assert not any("restarting the server" in line for line in server.err), server.err
