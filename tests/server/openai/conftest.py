"""The endpoint of a served demo zoo, and OpenAI's own clients for it."""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from patience import PATIENCE_S
from served import free_port


class Endpoint:
    """A zoo-serve process with its OpenAI endpoint."""

    def __init__(self, served: Any) -> None:
        self.served = served
        self.address = urllib.parse.urlsplit(served.openai).netloc
        self.client = openai.OpenAI(base_url=f"{served.openai}/v1", api_key="none", max_retries=0)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.served.openai}/v1", api_key=key, max_retries=0)

    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = PATIENCE_S,
    ) -> http.client.HTTPConnection:
        """A request that is sent and not yet answered."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body)
        kind = {"content-type": "application/json"} if data is not None else {}
        connection.request(method, path, data, {**kind, **(headers or {})})
        return connection

    def ask(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers, text."""
        connection = self.open(method, path, body, **options)
        try:
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read().decode()
        finally:
            connection.close()

    def aborted(self) -> float:
        return self.served.metrics().get('blockzoo_requests_total{finish_reason="abort"}', 0)

    def wait_until_idle(self) -> None:
        self.served.wait_for(
            lambda: all(
                self.served.metrics()[f"blockzoo_{name}"] == 0
                for name in ("requests_running", "requests_waiting", "pages_used")
            )
        )


@pytest.fixture(scope="module")
def serve_openai(serve_zoo: Callable[..., Any]) -> Iterator[Callable[..., Endpoint]]:
    """Start zoo-serve with the endpoint on a free port."""
    started: list[Endpoint] = []

    def start(zoo: Path, *options: str) -> Endpoint:
        endpoint = Endpoint(serve_zoo(zoo, f"--openai-port={free_port()}", *options))
        started.append(endpoint)
        return endpoint

    yield start
    for endpoint in started:
        endpoint.client.close()


TEMPLATES = Path(__file__).parents[2] / "runtime/text/chat_templates"


@pytest.fixture(scope="session")
def chat_family(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with chat templates: `chat` has Qwen's, `llama` Llama's, `plain` none."""
    folder = tmp_path_factory.mktemp("chat-family")
    templates = {"chat": "qwen2.5.jinja", "llama": "llama3.1.jinja", "plain": None}
    for name, template in templates.items():
        shutil.copytree(demo_family["base"], folder / name)
        if template is not None:
            shutil.copy(TEMPLATES / template, folder / name / "chat_template.jinja")
    return {name: folder / name for name in templates}


@pytest.fixture(scope="session")
def chat_zoo(chat_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from blockzoo.build.pipeline import CompileOptions, compile_models

    zoo = tmp_path_factory.mktemp("chat-zoo") / "zoo"
    compile_models(chat_family, zoo, CompileOptions(verify=False, profile=False))
    return zoo
