"""Published documents on a real server: in every scope and tenant, from disk at the next start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from patience import PATIENCE_S

from blockzoo.server_config.serve import main

DOCUMENT = "def parse(line):\n    key, value = line.split('=')\n    return key.strip(), int(value)\n\n" * 3
QUESTION = "def main():\n    print(parse("


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    file = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    file.write_text(json.dumps({"name": "parser", "text": DOCUMENT, "models": ["base", "solver"]}) + "\n")
    return file


@pytest.mark.parametrize("workers", [(), pytest.param(("--workers", "2"), marks=pytest.mark.slow)])
def test_documents_are_published_and_kept_for_the_next_start(
    serve_zoo, demo_zoo, documents, tmp_path, workers
):
    options = ("--publish", str(documents), "--kv-cache-dir", str(tmp_path), "--threads", "1", *workers)
    first = serve_zoo(demo_zoo, *options)
    answers = {}
    for tenant in ("base", "solver", "notes"):
        for scope in ("red", "blue"):
            answer = first.generate(tenant, QUESTION, documents=[DOCUMENT], kv_scope=scope)
            plain = first.generate(tenant, QUESTION, documents=[DOCUMENT], kv_reuse="off")
            found = answer["num_cached_tokens"]
            assert found == 0 if tenant == "notes" else 0 < found < answer["num_prompt_tokens"]
            assert answer["token_ids"] == plain["token_ids"]
        answers[tenant] = answer["token_ids"]
    first.wait_for(lambda: first.metrics().get("blockzoo_document_hit_tokens_total"))
    metrics = first.metrics()
    assert metrics["blockzoo_documents"] == 1
    assert metrics["blockzoo_document_computes_total"] == 2
    waits = {name for name in metrics if name.startswith("blockzoo_wait_p99_seconds{cached_percent=")}
    assert len(waits) >= 2  # of those that found nothing, of those that found a document
    first.stop()

    damaged, *_ = sorted(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    second = serve_zoo(demo_zoo, *options)
    assert any(f"{damaged}: ignored, its KV is computed anew" in line for line in second.err)
    for tenant in answers:
        answer = second.generate(tenant, QUESTION, documents=[DOCUMENT], kv_scope="green")
        assert answer["token_ids"] == answers[tenant]
    second.wait_for(lambda: second.metrics().get("blockzoo_document_rejects_total") == 1)
    assert second.metrics()["blockzoo_document_loads_total"] >= 1
    body = {"model": "base", "text_input": QUESTION, "documents": ["a"] * 300}
    status, answer = second.post("blockzoo", body)
    assert status == 400
    assert "documents has 300 texts; expected at most 256" in answer["error"]


def test_what_loading_warns_of_reaches_who_starts_the_server(serve_zoo, demo_zoo):
    served = serve_zoo(demo_zoo, "--kv-cache-gb", "0.001", "--threads", "1")
    warned = [line for line in served.err if "the KV pool holds" in line]
    assert len(warned) == 1
    assert warned[0].startswith("zoo-serve: ")
    assert "notes-merged" in warned[0]
    assert "--kv-cache-gb" in warned[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--publish", "none.jsonl"], "none.jsonl cannot be read: No such file"),
        (["--publish", "{documents}", "--publish", "{documents}"], "there is a document 'parser' already"),
        (["--published-kv-share", "2"], "published_kv_share is 2.0; expected 0 to 1"),
    ],
)
def test_bad_options_are_refused_at_once(demo_zoo, documents, capsys, options, match):
    assert main([str(demo_zoo), *(option.format(documents=documents) for option in options)]) == 1
    assert match in capsys.readouterr().err


def test_what_cannot_be_published_ends_the_start(demo_zoo, documents):
    options = ["--publish", str(documents), "--published-kv-share", "0.0001", "--threads", "1"]
    ports = [f"--{kind}-port=0" for kind in ("http", "grpc", "metrics", "openai")]
    command = [sys.executable, "-m", "blockzoo.server_config.serve", str(demo_zoo), *options, *ports]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert run.returncode == 1
    assert "could not load blockzoo: InvalidRequestError: document 'parser' needs" in run.stderr
    assert "raise published_kv_share" in run.stderr
