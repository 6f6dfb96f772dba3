"""Requests about the server itself, answered beside any queue: `health` and `reload`; and who asks.

Who knows the launcher's secret, sent as the parameter `secret`, gets details, may ask for a reload, and may
say whose share of the engine a request takes (`tenant`, and its `weight`), as the OpenAI endpoint does.
"""

from __future__ import annotations

import hmac
import json
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.server_config.answer import Response, integers, send, strings

SECRET_VARIABLE = "BLOCKZOO_SECRET"  # of the server's environment


_TENANT_PARAMETERS = ("tenant", "weight")


class Control:
    """Answers them for the engine model.

    Args:
        pb: the `triton_python_backend_utils` module.
        secret: None: nobody has it.
        problem: why the process should be replaced; None while it is well.
        reload: takes over what has changed in the zoo; what to tell of it.
        unfinished: requests under way.
    """

    def __init__(
        self,
        pb: Any,
        secret: str | None,
        problem: Callable[[], str | None],
        reload: Callable[[], Mapping[str, Any]],
        unfinished: Callable[[], int],
    ) -> None:
        self._pb, self._secret = pb, secret
        self._problem, self._reload, self._unfinished = problem, reload, unfinished

    def answer(self, sender: Any, inputs: Mapping[str, np.ndarray], parameters: Mapping[str, Any]) -> bool:
        """Answer a request here, now or later; False: it is none of these.

        Raises:
            InvalidRequestError: a client asks for what is the launcher's.
        """
        if "health" in inputs and inputs["health"].any():
            self._answer_health(sender, inputs, self._from_launcher(parameters))
        elif "reload" in inputs and inputs["reload"].any():
            if not self._from_launcher(parameters):
                raise InvalidRequestError("reload is not for clients; it needs the launcher's secret")
            threading.Thread(
                target=self._run_reload, args=(sender,), name="blockzoo-reload", daemon=True
            ).start()
        else:
            return False
        return True

    def take_tenant(self, parameters: dict[str, Any]) -> tuple[str | None, float | None]:
        """Whose share of the engine a request takes, and with what weight; None: its model's.

        Takes out of the parameters what says so.

        Raises:
            InvalidRequestError: a client says it.
        """
        if not any(name in parameters for name in _TENANT_PARAMETERS):
            return None, None
        if not self._from_launcher(parameters):
            raise InvalidRequestError(
                "tenant and weight are not for clients; they need the launcher's secret"
            )
        del parameters["secret"]
        tenant, weight = (parameters.pop(name, None) for name in _TENANT_PARAMETERS)
        return tenant, None if weight is None else float(weight)

    def _from_launcher(self, parameters: Mapping[str, Any]) -> bool:
        return self._secret is not None and _same(parameters.get("secret"), self._secret)

    def _answer_health(self, sender: Any, inputs: Mapping[str, np.ndarray], details: bool) -> None:
        """Say how the process is. With `details` also give back what was sent, so that the launcher can check
        that tensors come through whole (numpy 2 reads them wrongly)."""
        problem = self._problem()
        if problem is not None:
            send(self._pb, sender, Response(error=problem, final=True, status="UNAVAILABLE"))
            return
        said = "ok"
        if details:
            echo = {name: array.reshape(-1).tolist() for name, array in inputs.items()}
            for name, values in echo.items():
                echo[name] = [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values]
            said = json.dumps({"unfinished": self._unfinished(), "echo": echo})
        send(
            self._pb, sender, Response({"text_output": strings(said), "token_ids": integers([])}, final=True)
        )

    def _run_reload(self, sender: Any) -> None:
        """In a thread of its own: reading the zoo takes a while. The engine runs those that come together as
        one."""
        try:
            said = json.dumps(self._reload())
            response = Response({"text_output": strings(said), "token_ids": integers([])}, final=True)
        except Exception as error:  # the zoo cannot be read; or a bug of ours
            self._pb.Logger.log_error(traceback.format_exc())
            response = Response(error=f"the zoo was not reloaded: {error}", final=True)
        with suppress(Exception):  # who asked is gone
            send(self._pb, sender, response)


def _same(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode())
