"""The page without a browser: what is sent, to whom, and what it may load."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from blockzoo.server_config.openai.live_page import read_figures

METRICS = """\
# HELP blockzoo_requests_running Requests that hold pages now
# TYPE blockzoo_requests_running gauge
blockzoo_requests_running 3.000000
blockzoo_generated_tokens_total 123456789012.000000
blockzoo_mean_batch_per_block 2.25
blockzoo_requests_total{finish_reason="stop"} 7.000000
blockzoo_model_requests_running{model="a"} 2.000000
blockzoo_model_requests_running{model="b"} 1.000000
blockzoo_model_requests_running{model="quiet"} 0.000000
blockzoo_model_requests_waiting{model="a"} 5.000000
blockzoo_model_requests_refused_total{model="a"} 9.000000
blockzoo_ttft_seconds_bucket{le="0.005"} 0
"""


def test_figures_are_read_from_metrics():
    found = read_figures(METRICS, ("a", "quiet"))
    assert found["requests_running"] == 3
    assert found["generated_tokens_total"] == 123456789012
    assert found["mean_batch_per_block"] == 2.25
    assert found["pages_total"] == 0  # a server that has just begun
    assert found["models"] == {"a": [2, 5]}  # b is not for everybody


class Html(HTMLParser):
    """Elements, and the text inside the style and the script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside, self._tag = [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._tag = tag

    def handle_data(self, data):
        self.inside.setdefault(self._tag, data)


@pytest.fixture(scope="module")
def endpoint(serve_openai, chat_zoo):
    return serve_openai(chat_zoo)


@pytest.fixture(scope="module")
def page(endpoint):
    status, headers, text = endpoint.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    return headers, text


def test_only_what_is_in_the_page_runs(page):
    headers, text = page
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    html = Html(text)
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(html.inside[tag].encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_page_names_nothing_outside_itself(page):
    _, text = page
    assert set(re.findall(r"\w+://[^\s'\"]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    for tag, attributes in Html(text).elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        links = [attributes[name] for name in ("src", "href", "action") if name in attributes]
        assert all(link.startswith(("#", "data:")) for link in links), tag
    assert "innerHTML" not in text
    assert "<!--" not in text  # every place is filled


def test_the_models_and_what_they_share(endpoint):
    status, headers, text = endpoint.ask("GET", "/page/zoo")
    assert (status, headers["cache-control"]) == (200, "no-store")
    zoo = json.loads(text)
    assert zoo["title"] == "zoo"
    assert {model["name"]: model["chat"] for model in zoo["models"]} == {
        "chat": True,
        "llama": True,
        "plain": False,
    }
    assert len({tuple(model["chain"]) for model in zoo["models"]}) == 1  # the same weights
    assert json.loads(endpoint.ask("GET", "/page/figures")[2])["zoo"] == zoo["zoo"]


def test_figures_follow_what_is_served(endpoint):
    def figures():
        status, headers, text = endpoint.ask("GET", "/page/figures")
        assert (status, headers["cache-control"]) == (200, "no-store")
        return json.loads(text)

    before = figures()
    usage = endpoint.client.completions.create(model="plain", prompt="one two", max_tokens=5).usage
    told = {"generated_tokens_total": usage.completion_tokens, "prompt_tokens_total": usage.prompt_tokens}

    def all_told():  # one after the other
        now = figures()
        return all(now[name] >= before[name] + count for name, count in told.items()) and now

    after = endpoint.served.wait_for(all_told)
    assert after["at"] > before["at"]
    assert {name: after[name] - before[name] for name in told} == told
    assert after["pages_total"] >= after["pages_used"] + after["pages_cached"]
    assert after["engine_calls_total"] > before["engine_calls_total"]


def test_other_methods_are_refused(endpoint):
    assert endpoint.ask("POST", "/", {})[0] == 405
    assert endpoint.ask("POST", "/page/zoo", {})[0] == 405
