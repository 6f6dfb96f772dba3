"""Is the server really serving? Asked with inferences, because a dead Python model leaves Triton "ready".

Health requests are answered by the models at once, beside the engine's queue, and where one comes late, what
the model has taken meanwhile tells a busy server from a dead one.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from blockzoo.server_config.beacon import BeaconReader
from blockzoo.server_config.environment import ServerError
from blockzoo.server_config.repository import ENGINE, POSTPROCESSING, PREPROCESSING, UNARY

_PROBE_TIMEOUT_S = 3.0
_TIMEOUTS_ALLOWED = 8  # in a row, so 30 s: machines were seen to stand still for 11; what has died says so
_FIRST_INFERENCE_S = 600.0
_RELOAD_S = 3600.0  # engines are compiled meanwhile; a server that dies ends the connection
_SAMPLE = {
    "text_input": "żółw 🐢",
    "max_tokens": 123456789,
    "temperature": 0.625,
    "random_seed": 2**63 + 1,
    "stop_words": ["a", "", "bc"],
}


class UnhealthyError(Exception):
    """A model gave an error where it should have answered; the message is its."""


class Watchdog:
    """Probes one server over HTTP.

    Args:
        http: base URL.
        tenant: any model served; set again when that one is no longer.
        secret: what the models know the launcher by.
        control_dir: where they show that they take requests; None: nowhere.
    """

    def __init__(self, http: str, tenant: str, secret: str = "", control_dir: Path | None = None) -> None:
        self._http, self._secret = http, secret
        self._beacons = None if control_dir is None else BeaconReader(control_dir)
        self.tenant = tenant
        self._timeouts = 0

    def ready(self) -> bool:
        """Whether Triton has loaded all models."""
        try:
            with urllib.request.urlopen(f"{self._http}/v2/health/ready", timeout=_PROBE_TIMEOUT_S):
                return True
        except OSError:
            return False

    def version(self) -> str:
        """What Triton says it is; "unknown" where it does not say."""
        try:
            with urllib.request.urlopen(f"{self._http}/v2", timeout=_PROBE_TIMEOUT_S) as response:
                return str(json.load(response)["version"])
        except (OSError, ValueError, KeyError):
            return "unknown"

    def self_test(self) -> None:
        """Send tensors of every type there and back, and generate a token through all steps.

        Raises:
            ServerError: what came back is wrong, or nothing did.
        """
        try:
            status = self._engine_status(_FIRST_INFERENCE_S, _SAMPLE)
            self._post(self.tenant, {"text_input": "a", "max_tokens": 1}, _FIRST_INFERENCE_S)
            self._post(UNARY, {"health": True}, _FIRST_INFERENCE_S)
        except (OSError, UnhealthyError) as error:
            raise ServerError(f"the server started, but its first inference failed: {error}") from None
        for name, sent in _SAMPLE.items():
            seen = status["echo"].get(name)
            if seen != (sent if isinstance(sent, list) else [sent]):
                raise ServerError(
                    f"the server's Python models read {name} as {seen} where {sent} was sent; the Python "
                    "they run, the first on PATH, must be this one, with numpy below 2"
                )

    def problem(self) -> str | None:
        """Probe every model process once; why the server should be restarted, None while it is well."""
        probes: tuple[tuple[str, dict[str, Any]], ...] = (
            (ENGINE, {"health": True}),
            (UNARY, {"health": True}),
            (PREPROCESSING, {"health": True}),
            (POSTPROCESSING, {"health": True}),
        )
        for model, request in probes:
            try:
                self._post(model, request, _PROBE_TIMEOUT_S)
            except UnhealthyError as error:
                return f"{model}: {error}"
            except OSError as error:  # no answer in time, or no connection
                if self._beacons is not None and self._beacons.moved(model):
                    continue  # busy: the probe waits its turn in Triton's queue
                self._timeouts += 1
                return f"{model}: {error}" if self._timeouts >= _TIMEOUTS_ALLOWED else None
        self._timeouts = 0
        return None

    def unfinished(self) -> int | None:
        """Requests that the engine model has under way; None when it does not answer."""
        try:
            return self._engine_status(_PROBE_TIMEOUT_S)["unfinished"]
        except (OSError, UnhealthyError):
            return None

    def reload(self) -> dict[str, Any]:
        """Let the engine take over what has changed in the zoo: the fields of `Reloaded`, and `serving`.

        Raises:
            OSError: no answer.
            UnhealthyError: it could not.
        """
        asked = {"reload": True, "secret": self._secret}
        return json.loads(self._post(ENGINE, asked, _RELOAD_S)["text_output"])

    def _engine_status(self, timeout_s: float, sample: dict[str, Any] | None = None) -> dict[str, Any]:
        asked = {"health": True, "secret": self._secret, **(sample or {})}
        return json.loads(self._post(ENGINE, asked, timeout_s)["text_output"])

    def _post(self, model: str, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        url = f"{self._http}/v2/models/{model}/generate"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise UnhealthyError(error.read().decode(errors="replace")) from None
        except ValueError as error:
            raise UnhealthyError(f"the answer is not JSON: {error}") from None
        if "error" in answer:  # generate reports some errors with status 200
            raise UnhealthyError(answer["error"])
        return answer
