"""A served zoo under mixed clients for SOAK_MINUTES (30): nothing wrong, nothing lost, nothing piles up.

SOAK_JSON names the file for the report. Some ten requests a second, so that two cores suffice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from guests import Changes, make_variants, zoo_compile
from processes import Held, MemoryWatch, held_by_role, save_json
from traffic import DOCUMENTS, Answers, Guest, Traffic, make_prompts

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
WARM_UP_S = min(60.0, MINUTES * 6)
TENANTS = ("base", "base-sharded", "notes", "notes-merged", "solver")
REST_WITHIN_S = 60.0
ANSWERED_WITHIN_S = 300.0  # on a machine that has other work; the report has the slowest
# Of the last quarter over the third: medians of what the allocator happens to hold. What Triton itself leaks
# when the stream of an ensemble is closed early (14 kB each, 2.51) stays below.
GROWTH_ALLOWED, GROWTH_ALLOWED_MIB = 0.02, 8.0
THREADS_ALLOWED = 2  # of a pool that gRPC has within tritonserver, and lets grow and shrink


def settled(server, before: dict[str, Held], timeout_s: float = 20.0) -> dict[str, Held]:
    """What processes hold once threads and files are as before, or the time is over: probes come and go."""
    deadline = time.monotonic() + timeout_s
    while True:
        now = held_by_role(server)
        back = all(
            now[role].files <= one.files and now[role].threads <= one.threads + THREADS_ALLOWED
            for role, one in before.items()
        )
        if back or time.monotonic() > deadline:
            return now
        time.sleep(0.1)


def at_rest(server) -> bool:
    metrics = server.metrics()
    return all(metrics[f"blockzoo_{n}"] == 0 for n in ("requests_running", "requests_waiting", "pages_used"))


@pytest.fixture
def soaked(serve_zoo, demo_zoo, demo_family, tmp_path):
    """A server of its own zoo, quiet answers for its tenants and for the variants of guests."""
    variants = make_variants(demo_family["notes"], tmp_path)
    zoo, known = tmp_path / "zoo", tmp_path / "known"
    shutil.copytree(demo_zoo, zoo)
    shutil.copytree(demo_zoo, known)
    zoo_compile(known, *(f"{name}={folder}@base" for name, folder in variants.items()))
    answers = Answers(known, [*TENANTS, *variants], make_prompts(32))
    documents = tmp_path / "documents.jsonl"
    lines = [
        {"name": "code", "text": DOCUMENTS[0]},
        {"name": "notes", "text": DOCUMENTS[1], "models": ["notes"]},
    ]
    documents.write_text("".join(json.dumps(line) + "\n" for line in lines))
    server = serve_zoo(
        zoo,
        *("--precision", "f32", "--enable-lora", "--kv-sharing", "scope", "--publish", str(documents)),
        *("--kv-cache-gb", "0.04", "--max-model-len", "1024", "--max-num-seqs", "24", "--threads", "2"),
    )
    return server, zoo, answers, variants


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_soak(soaked, tmp_path: Path) -> None:
    server, zoo, answers, variants = soaked
    prompts = answers.prompts
    told_apart = [len({tuple(answers.of(v, p).tokens) for v in variants}) == len(variants) for p in prompts]
    assert sum(told_apart) > len(prompts) / 2, "the variants of a guest must differ"
    guests = {name: Guest(None, True) for name in ("guest-a", "guest-b")}

    def traffic(seed: int) -> Traffic:
        return Traffic(
            *(server, answers, TENANTS),
            guests=guests,
            variants=list(variants),
            limit_s=ANSWERED_WITHIN_S,
            seed=seed,
        )

    changes = Changes(server, zoo, guests, variants, every_s=max(5.0, min(25.0, MINUTES * 2)))
    for name in guests:  # Triton loads preprocessing anew for names that it has not had
        changes.change(name, "variant0")
    with traffic(1) as warm_up:
        for variant in [*list(variants)[1:], "variant0"]:  # all that is kept of any of them is there by now
            time.sleep(WARM_UP_S / 3)
            for name in guests:
                changes.change(name, variant)
    server.wait_for(lambda: at_rest(server), REST_WITHIN_S)
    before, pids = held_by_role(server), server.processes()
    metrics_before = server.metrics()

    began = time.monotonic()
    watch = MemoryWatch(server, every_s=max(0.5, min(5.0, MINUTES / 2)))
    watch.start()
    changes.start()
    bursts = 0
    with traffic(2) as main:
        while time.monotonic() - began < MINUTES * 60:
            time.sleep(min(60.0, MINUTES * 12))
            bursts += 1
            main.burst(40, bursts)
            print(f"{time.monotonic() - began:.0f} s: {dict(main.outcomes())}", flush=True)
    changes.stop()
    watch.stop()
    minutes = (time.monotonic() - began) / 60
    for name in guests:  # as they were
        if guests[name].variant != "variant0":
            changes.change(name, "variant0")
    server.wait_for(lambda: at_rest(server), REST_WITHIN_S)
    after, metrics = settled(server, before), server.metrics()

    ended = sum(value for name, value in metrics.items() if name.startswith("blockzoo_requests_total{"))
    unfit = [*warm_up.not_well(), *main.not_well()]
    told = [line for line in server.err if "guest" not in line]
    memory = watch.quarters()
    report = {
        "minutes": round(minutes, 1),
        "requests": len(main.sent),
        "outcomes": dict(main.outcomes()),
        "by_kind": main.table(),
        "bursts_of_40": bursts,
        "unfit": [sent._asdict() | {"said": sent.said[:500]} for sent in unfit[:50]],
        "adapters": dict(changes.counts) | {"problems": changes.problems},
        "adapters_served_after_s": {
            "median": sorted(changes.seconds)[len(changes.seconds) // 2],
            "max": max(changes.seconds),
        },
        "resident_mib_medians_of_quarters": memory,
        "threads_and_files_before": {role: one[1:] for role, one in before.items()},
        "threads_and_files_after": {role: one[1:] for role, one in after.items()},
        "slowest_s": round(max(sent.ended - sent.began for sent in main.sent), 2),
        "metrics": {name: value for name, value in metrics.items() if "_bucket" not in name},
        "told": told,
    }
    save_json("SOAK_JSON", tmp_path / "soak.json", report)

    assert not unfit, unfit[:5]
    assert not changes.problems, changes.problems
    assert main.outcomes()["right"] > 30 * minutes, "too few to mean anything"
    assert ended == metrics["blockzoo_requests_arrived_total"]
    assert (
        metrics["blockzoo_pages_free"] + metrics["blockzoo_pages_cached"] == metrics["blockzoo_pages_total"]
    )
    for name in ("documents", "document_pages", "pages_total"):
        assert metrics[f"blockzoo_{name}"] == metrics_before[f"blockzoo_{name}"], name
    assert server.processes() == pids, "a process was replaced"
    for role in pids:
        assert after[role].threads <= before[role].threads + THREADS_ALLOWED, (
            role,
            before[role],
            after[role],
        )
        assert after[role].files <= before[role].files, (role, before[role], after[role])
    third, last = memory["all"][2:]
    assert last <= third * (1 + GROWTH_ALLOWED) + GROWTH_ALLOWED_MIB, memory
    assert told == []
