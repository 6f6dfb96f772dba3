"""API keys: the file, quotas, and a server that asks for them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from pathlib import Path

import openai
import pytest

from blockzoo.server_config.openai import keys as keys_module
from blockzoo.server_config.openai.errors import ApiError
from blockzoo.server_config.openai.keys import Key, Keyring, KeysError, Quotas, read_keys
from blockzoo.server_config.serve import main

SECRET = "sk-very-secret-é-1234567890"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def a_key(**settings) -> Key:
    fields = {"models": None, "kv_scope": "s", "requests": None, "tokens_per_minute": None, **settings}
    return Key("alice", digest(SECRET), **fields)


def test_a_file_of_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        f"# ours\n\nalice {digest('a')}  # full rights\n"
        f"bot@x {digest('b').upper()} models=chat,legal kv_scope=team requests=4 tokens_per_minute=600 "
        "weight=2.5\n"
    )
    assert read_keys(file) == (
        Key("alice", digest("a"), None, "alice", None, None),
        Key("bot@x", digest("b"), frozenset({"chat", "legal"}), "team", 4, 600, 2.5),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("# nothing\n", "holds no keys"),
        (f"alice {SECRET}", "keys:1: the second word is no SHA-256 in hex"),
        ("alice", "keys:1: the second word is no SHA-256 in hex"),
        (f"\n{SECRET}!! x", "keys:2: the first word is no name"),
        (f"alice {digest('a')} models", "keys:1: expected name=value, each once, of models, kv_scope"),
        (f"alice {digest('a')} priority=2", "keys:1: expected name=value"),
        (f"alice {digest('a')} weight=0", "keys:1: weight is '0'; expected a number from 0.001 to 1000"),
        (f"alice {digest('a')} weight=nan", "weight is 'nan'"),
        (f"alice {digest('a')} weight=much", "weight is 'much'"),
        (f"alice {digest('a')} requests=1 requests=2", "keys:1: expected name=value"),
        (f"alice {digest('a')} requests=0", "requests is '0'; expected a whole number above 0"),
        (f"alice {digest('a')} tokens_per_minute=1e5", "tokens_per_minute is '1e5'"),
        (f"alice {digest('a')} kv_scope={'s' * 257}", "kv_scope has 257 characters"),
        (f"alice {digest('a')}\nalice {digest('b')}", "keys:2: the name or the key is that of 'alice'"),
        (f"alice {digest('a')}\nbob {digest('a')}", "keys:2: the name or the key is that of 'alice'"),
    ],
)
def test_files_that_are_wrong_are_refused_without_showing_a_key(tmp_path, text, message, capsys):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(KeysError, match=message) as caught:
        read_keys(file)
    assert SECRET not in str(caught.value)
    assert main([str(tmp_path), "--api-keys", str(file)]) == 1
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(KeysError, match="keys cannot be read: No such file"):
        read_keys(tmp_path / "keys")
    (tmp_path / "keys").write_bytes(b"\xff")
    with pytest.raises(KeysError, match="is not UTF-8"):
        read_keys(tmp_path / "keys")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(keys_module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_changed_file_counts_and_a_wrong_one_does_not(tmp_path, clock):
    file, said = tmp_path / "keys", []
    file.write_text(f"alice {digest('a')}")
    ring = Keyring(file, said.append)
    assert ring.find("Bearer a").name == "alice"

    def rewrite(text):
        file.write_text(text)
        clock.now += 2

    rewrite(f"bob {digest(SECRET)}")
    assert ring.find(f"bearer {SECRET.encode().decode('latin-1')}").name == "bob"
    with pytest.raises(ApiError, match="not known here"):
        ring.find("Bearer a")
    rewrite(f"carol {SECRET}")
    assert ring.find(f"Bearer {SECRET.encode().decode('latin-1')}").name == "bob"
    file.unlink()
    clock.now += 2
    ring.find(f"Bearer {SECRET.encode().decode('latin-1')}")
    assert ["the keys stay as they were" in line for line in said] == [False, True, True]
    assert SECRET not in "".join(said)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {SECRET}", SECRET])
def test_a_header_without_a_key(tmp_path, header):
    (tmp_path / "keys").write_text(f"alice {digest(SECRET)}")
    with pytest.raises(ApiError, match="Authorization: Bearer KEY") as caught:
        Keyring(tmp_path / "keys", print).find(header)
    assert caught.value.status == 401
    assert SECRET not in caught.value.message


def test_answers_at_once_are_counted(clock):
    quotas, key = Quotas(), a_key(requests=3)
    first = quotas.enter(key, 2, 0)
    with pytest.raises(ApiError, match="2 answers are being generated for this key, of the 3") as caught:
        quotas.enter(key, 2, 0)
    assert caught.value.status == 429
    second = quotas.enter(key, 1, 0)
    first.end()
    quotas.enter(key, 2, 0)
    second.end()
    quotas.enter(None, 100, 10**9).end()


def test_tokens_run_off_at_the_rate_of_the_key(clock):
    quotas, key = Quotas(), a_key(tokens_per_minute=60)
    lease = quotas.enter(key, 1, 10)
    lease.spend(40, 0)
    lease.spend(5, 25)  # the prompt has 25 tokens, not the 10 that it was taken for
    with pytest.raises(ApiError, match="used its 60 tokens a minute; send it again in 10 s") as caught:
        quotas.enter(key, 1, 0)
    assert (caught.value.status, caught.value.retry_after) == (429, 10)
    clock.now += 10.5
    quotas.enter(key, 1, 30)  # gone before its prompt was counted: the estimate stands
    with pytest.raises(ApiError, match="send it again in 30 s"):
        quotas.enter(key, 1, 0)
    clock.now += 3600
    quotas.enter(key, 1, 0)


# ---- served


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(
        f"alice {digest('ka')}\n"
        f"bob {digest('kb')} models=base requests=1 kv_scope=team\n"
        f"carol {digest('kc')} models=base,notes kv_scope=team\n"
        f"erin {digest('ke')} tokens_per_minute=10\n"
        f"light {digest('kl')} kv_scope=shares\n"
        f"heavy {digest('kh')} kv_scope=shares weight=3\n"
    )
    return path


@pytest.fixture(scope="module")
def endpoint(serve_openai, demo_zoo, file):
    return serve_openai(demo_zoo, "--api-keys", str(file), "--host", "0.0.0.0", "--max-num-seqs", "4")


def as_key(endpoint, key):
    return endpoint.client.with_options(api_key=key)


PATHS = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/base"),
    ("GET", "/metrics"),
    ("GET", "/page/zoo"),
    ("GET", "/page/figures"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_endpoint_but_health_needs_a_key(endpoint, method, path):
    for headers in ({}, {"authorization": "Bearer kz"}):
        status, given, text = endpoint.ask(method, path, {} if method == "POST" else None, headers=headers)
        assert (status, given["www-authenticate"]) == (401, "Bearer")
        assert json.loads(text)["error"]["type"] == "authentication_error"
        assert "kz" not in text
    assert endpoint.ask(method, path, headers={"authorization": "Bearer ka"})[0] != 401


def test_health_needs_no_key_and_triton_stays_on_this_machine(endpoint):
    assert endpoint.ask("GET", "/health")[0] == 200
    assert endpoint.served.openai.startswith("http://0.0.0.0:")
    assert "HTTP     http://127.0.0.1:" in "".join(endpoint.served.out)


def test_models_of_a_key(endpoint):
    bob = as_key(endpoint, "kb")
    assert [model.id for model in bob.models.list()] == ["base"]
    assert len(list(as_key(endpoint, "ka").models.list())) == 5
    for ask in (
        lambda: bob.completions.create(model="notes", prompt="x"),
        lambda: bob.models.retrieve("notes"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_the_page_needs_no_key_and_what_it_shows_is_what_the_key_may_see(endpoint):
    status, _, page = endpoint.ask("GET", "/")
    assert status == 200
    assert "notes" not in page
    assert 'data-keys="asked"' in page

    def shown(path, key):
        return json.loads(endpoint.ask("GET", path, headers={"authorization": f"Bearer {key}"})[2])

    zoo = shown("/page/zoo", "kb")
    assert [model["name"] for model in zoo["models"]] == ["base"]
    assert "notes" not in json.dumps(zoo)
    assert len(shown("/page/zoo", "ka")["models"]) == 5
    versions = {key: shown("/page/figures", key)["zoo"] for key in ("ka", "kb", "kc", "ke")}
    assert versions["ka"] == versions["ke"]
    assert len(set(versions.values())) == 3

    stream = as_key(endpoint, "ka").completions.create(
        model="notes", prompt="x", stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    endpoint.served.wait_for(lambda: shown("/page/figures", "ka")["models"] == {"notes": [1, 0]})
    assert shown("/page/figures", "kb")["models"] == {}
    stream.close()
    endpoint.wait_until_idle()


def test_the_scope_of_cached_kv_is_the_keys(endpoint):
    prompt = "the same long prompt for everybody " * 20

    def cached(key):
        usage = as_key(endpoint, key).completions.create(model="base", prompt=prompt, max_tokens=1).usage
        return usage.prompt_tokens_details.cached_tokens

    assert cached("ka") == 0
    assert cached("kb") == 0  # another scope
    assert cached("kb") > 0
    assert cached("kc") > 0  # bob's scope
    with pytest.raises(openai.BadRequestError, match="kv_scope comes from the API key"):
        as_key(endpoint, "ka").completions.create(model="base", prompt="x", extra_body={"kv_scope": "team"})


def test_quotas_of_a_key(endpoint):
    bob = as_key(endpoint, "kb")
    stream = bob.completions.create(
        model="base", prompt="x", stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="1 answers are being generated for this key, of the 1"):
        bob.completions.create(model="base", prompt="x", max_tokens=1)
    stream.close()
    endpoint.wait_until_idle()
    endpoint.served.wait_for(lambda: bob.completions.create(model="base", prompt="x", max_tokens=1))

    erin = as_key(endpoint, "ke")
    erin.completions.create(model="notes", prompt="x", max_tokens=24, extra_body={"ignore_eos": True})
    with pytest.raises(openai.RateLimitError, match="10 tokens a minute") as caught:
        erin.completions.create(model="notes", prompt="x", max_tokens=1)
    assert int(caught.value.response.headers["retry-after"]) > 1


def test_keys_share_the_engine_by_weight(endpoint):
    """Of one model, in one scope, all waiting before the first runs: answers are counted, not time."""
    each, ended = 24, {"kl": 0, "kh": 0}
    asked = {"model": "base", "max_tokens": 100, "extra_body": {"ignore_eos": True}}

    async def answer(key, client, number):
        await client.completions.create(**asked, prompt=f"{key} {number}")
        ended[key] += 1

    async def main():
        before = as_key(endpoint, "ka").completions.create(
            **{**asked, "max_tokens": 4000}, prompt="x", n=4, stream=True
        )
        async with endpoint.async_client("kl") as light, endpoint.async_client("kh") as heavy:
            clients = {"kl": light, "kh": heavy}
            tasks = {
                key: [asyncio.ensure_future(answer(key, client, number)) for number in range(each)]
                for key, client in clients.items()
            }
            await asyncio.to_thread(
                endpoint.served.wait_for,
                lambda: endpoint.served.metrics()["blockzoo_requests_waiting"] == 2 * each,
            )
            before.close()
            await asyncio.gather(*tasks["kh"])
            counted = ended["kl"]
            for task in tasks["kl"]:
                task.cancel()
            await asyncio.gather(*tasks["kl"], return_exceptions=True)
            return counted

    assert 6 <= asyncio.run(main()) <= 10  # to 24
    endpoint.wait_until_idle()


def test_the_processes_secret_is_in_no_command(endpoint):
    pid = endpoint.served.openai_pid()
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (secret,) = (v.partition(b"=")[2] for v in environment if v.startswith(b"BLOCKZOO_SECRET="))
    assert len(secret) > 30
    assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_new_key_counts_at_once(endpoint, file):
    with pytest.raises(openai.AuthenticationError):
        as_key(endpoint, "kd").models.list()
    unfinished = file.with_suffix(".new")
    unfinished.write_text(file.read_text() + f"dora {digest('kd')}\n")
    os.replace(unfinished, file)

    def known():
        try:
            return len(list(as_key(endpoint, "kd").models.list())) == 5
        except openai.AuthenticationError:
            return False

    endpoint.served.wait_for(known)


def test_no_key_is_in_logs_or_metrics(endpoint):
    said = "".join(endpoint.served.out + endpoint.served.err) + endpoint.served.metrics_text()
    for key in ("ka", "kb", "kc", "kd"):
        assert digest(key) not in said
        assert f"Bearer {key}" not in said


def test_without_keys_only_this_machine_is_served_unless_said():
    from argparse import Namespace

    from blockzoo.server_config.serve import _openai_host

    def host(**options):
        return _openai_host(Namespace(**{"host": "0.0.0.0", "api_keys": None, "insecure": False, **options}))

    assert host() == "127.0.0.1"
    assert host(host="localhost") == "localhost"
    assert host(insecure=True) == host(api_keys="file") == "0.0.0.0"


def test_keys_without_an_endpoint_are_an_error(demo_zoo, file, capsys):
    assert main([str(demo_zoo), "--api-keys", str(file), "--no-openai"]) == 1
    assert "--api-keys is for the OpenAI endpoint, which is left out" in capsys.readouterr().err
