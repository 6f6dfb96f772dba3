"""The watchdog's judgement, against a scripted HTTP server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from patience import PATIENCE_S, wait_for

from blockzoo.server_config import beacon as beacons
from blockzoo.server_config import watchdog
from blockzoo.server_config.beacon import Beacon, BeaconReader
from blockzoo.server_config.environment import ServerError
from blockzoo.server_config.watchdog import Watchdog


class Models:
    """Answers of a healthy server; a test breaks some."""

    def __init__(self) -> None:
        self.broken: dict[str, tuple[int, object]] = {}
        self.silent: set[str] = set()
        self.release = threading.Event()

    def answer(self, model: str, body: dict) -> tuple[int, object]:
        if model in self.silent:
            self.release.wait(PATIENCE_S)
        if model in self.broken:
            return self.broken[model]
        echo = {name: value if isinstance(value, list) else [value] for name, value in body.items()}
        return 200, {"text_output": json.dumps({"unfinished": 2, "echo": echo})}


@pytest.fixture
def models():
    return Models()


@pytest.fixture
def dog(models, monkeypatch):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = models.answer(self.path.split("/")[3], body)
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *args: object) -> None:
            pass

    post = Watchdog._post

    def impatient_with_the_silent(dog: Watchdog, model: str, body: dict, _: float) -> dict:
        return post(dog, model, body, 0.02 if model in models.silent else PATIENCE_S)

    monkeypatch.setattr(Watchdog, "_post", impatient_with_the_silent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Watchdog(f"http://127.0.0.1:{server.server_port}", "chat")
    models.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_healthy_server_passes(dog):
    dog.self_test()
    assert dog.problem() is None
    assert dog.unfinished() == 2


@pytest.mark.parametrize("model", ["blockzoo", "blockzoo_unary", "preprocessing", "postprocessing"])
@pytest.mark.parametrize(
    "answer",
    [
        (400, {"error": "Stub process is not healthy."}),
        (500, {"error": "internal"}),
        (200, {"error": "generate expects one response"}),
    ],
)
def test_an_error_of_any_model_is_a_problem_at_once(dog, models, model, answer):
    models.broken[model] = answer
    problem = dog.problem()
    assert problem.startswith(f"{model}: ")
    assert answer[1]["error"] in problem


def test_silence_is_a_problem_when_it_lasts(dog, models):
    models.silent.add("preprocessing")
    assert [dog.problem() for _ in range(watchdog._TIMEOUTS_ALLOWED - 1)] == [None] * 7
    assert dog.problem().startswith("preprocessing: ")
    models.silent.clear()
    assert dog.problem() is None
    models.silent.add("preprocessing")
    assert dog.problem() is None


def test_a_model_that_takes_requests_is_busy_and_not_silent(dog, models, tmp_path, monkeypatch):
    monkeypatch.setattr(beacons, "_EVERY_S", 0.01)
    dog._beacons = BeaconReader(tmp_path)
    models.silent.add("blockzoo")
    beacon = Beacon(str(tmp_path), "blockzoo")
    file = tmp_path / "blockzoo.taken"
    for _ in range(12):  # more than the timeouts that end a silent one
        beacon.taken += 1
        wait_for(lambda: file.exists() and file.read_text() == str(beacon.taken))
        assert dog.problem() is None
    assert [dog.problem() for _ in range(watchdog._TIMEOUTS_ALLOWED - 1)] == [None] * 7
    assert dog.problem().startswith("blockzoo: "), "it takes nothing any more"


def test_the_count_of_another_model_excuses_nobody(dog, models, tmp_path):
    dog._beacons = BeaconReader(tmp_path)
    models.silent.add("preprocessing")
    for count in range(watchdog._TIMEOUTS_ALLOWED):
        (tmp_path / "blockzoo.taken").write_text(str(count))
        last = dog.problem()
    assert last.startswith("preprocessing: ")


def test_without_a_launcher_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Beacon(None, "blockzoo").taken += 1
    assert not list(tmp_path.iterdir())


def test_the_self_test_sees_tensors_that_come_through_wrong(dog, models):
    echo = {**watchdog._SAMPLE, "max_tokens": [7]}
    models.broken["blockzoo"] = 200, {"text_output": json.dumps({"echo": echo})}
    with pytest.raises(ServerError, match=r"read text_input as .* where .* was sent; .* numpy below 2"):
        dog.self_test()


def test_the_self_test_needs_a_real_answer(dog, models):
    models.broken["chat"] = 400, {"error": "no"}
    with pytest.raises(ServerError, match=r"its first inference failed: .*no"):
        dog.self_test()


def test_nobody_there(dog):
    gone = Watchdog("http://127.0.0.1:9", "chat")
    assert not gone.ready()
    assert gone.unfinished() is None


def test_it_says_who_it_is(dog, models):
    known = Watchdog(dog._http, "chat", "a secret")
    asked: list[dict] = []
    real = models.answer
    models.answer = lambda model, body: asked.append(body) or real(model, body)
    known.unfinished()
    known.reload()
    assert [body["secret"] for body in asked] == ["a secret"] * 2


def test_a_reload_gives_what_the_engine_found(dog, models):
    models.broken["blockzoo"] = (200, {"text_output": '{"added": ["a"], "serving": ["a", "chat"]}'})
    assert dog.reload() == {"added": ["a"], "serving": ["a", "chat"]}
    models.broken["blockzoo"] = (400, {"error": "the zoo was not reloaded"})
    with pytest.raises(watchdog.UnhealthyError, match="not reloaded"):
        dog.reload()
