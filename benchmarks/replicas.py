"""What replicas keep of the prefix cache, and what a killed one loses.

    python -m benchmarks.replicas

Three servers of the same tenants on one Ray, with the same memory for KV in all: one replica, two to which
requests go by what they hold, two that take turns. Requests begin with one of as many documents as fill most
of that memory, in random order; the servers take turns, with new documents each time. Then streams over one
replica and over a server without Ray, in turn. Then, again and again, a replica of the second server is
killed with -9 while streams run.

    python -m benchmarks.replicas --engines

The same requests to as many engines in this process, between which the router's own bookkeeping chooses: what
the choice comes to, without Ray.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.demo_server import Server
from benchmarks.families import SHAPES, Family, make_family
from blockzoo.runtime import SamplingParams
from blockzoo.server_config.openai.engine import EngineRequest
from blockzoo.server_config.replicas.host import EngineHost, ReplicaSettings
from blockzoo.server_config.replicas.local_ray import local_ray
from blockzoo.server_config.replicas.prefixes import Holdings, Lane, Prompt

Ask = Callable[[dict[str, Any]], tuple[int, int]]
"""A request -> the tokens of its prompt, and those of them that were cached."""
_PAGE_TOKENS = 32
_SEQS = 8  # at once in a replica
_FILL = 0.75  # of the memory for KV, by the documents of a round
_SIDES = {  # replicas and how requests are routed
    "one": (1, "held"),
    "held": (2, "held"),
    "round-robin": (2, "round-robin"),
}


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], shape="tiny", repeats=5)
    parser.add_argument("--kv-gb", type=float, default=0.032, help="of each server, all its replicas")
    parser.add_argument("--document-tokens", type=int, default=512)
    parser.add_argument("--asks", type=int, default=4, help="requests about each document, on average")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--engines", action="store_true", help="without Ray: engines in this process")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 4)
    zoo = family.zoo().path
    if args.engines:
        return _without_ray(zoo, family, args, machine)
    replicas = sum(number for number, _ in _SIDES.values())
    with local_ray(replicas) as ray, ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                Server(zoo, f"--ray-address={ray}", *_options(args, *side), openai=True, quiet=True)
            )
            for name, side in _SIDES.items()
        }
        tokens = _metrics(servers["one"])["pages_total"] * _PAGE_TOKENS / SHAPES[args.shape].num_layers
        asks = {name: partial(_post, server) for name, server in servers.items()}
        rounds = [_round(asks, int(tokens), family, args, number) for number in range(1 + args.repeats)][1:]
        alone = stack.enter_context(Server(zoo, *_alone(args), openai=True, quiet=True))
        costs = [_cost(servers["one"], alone, family, args, number) for number in range(args.repeats)]
        kills = [_kill(servers["held"], family, args, number) for number in range(args.kills)]
    ratio = _spread([each["one"] / each["alone"] for each in costs])
    results = {
        "hits": _hits(rounds),
        "rounds": rounds,
        "streamed_tokens_per_s": costs,
        "streams_of_a_server_without_ray": ratio,
        "kills": kills,
    }
    _print(results)
    print("wrote", save_report("replicas", args, machine, results))
    return 0


def _options(args: argparse.Namespace, replicas: int, routing: str) -> list[str]:
    options = _alone(args, replicas)
    return [*options, f"--replicas={replicas}", f"--routing={routing}"]


def _alone(args: argparse.Namespace, replicas: int = 1) -> list[str]:
    options = {
        "kv-cache-gb": args.kv_gb / replicas,
        "threads": args.threads or 1,
        "max-num-seqs": _SEQS,
    }
    options |= {} if args.precision is None else {"precision": args.precision}
    return [f"--{name}={value}" for name, value in options.items()]


# ---- what is held


def _round(
    asks: Mapping[str, Ask], kv_tokens: int, family: Family, args: argparse.Namespace, number: int
) -> dict[str, Any]:
    """Figures of each side for documents that none has seen; each holds the KV of so many tokens."""
    rng = random.Random(number)
    documents = [
        _words(rng, args.document_tokens) for _ in range(int(_FILL * kv_tokens / args.document_tokens))
    ]
    asked = [
        (index, _words(rng, 16)) for index in rng.choices(range(len(documents)), k=args.asks * len(documents))
    ]
    requests = [
        {"model": family.tenants[index % len(family.tenants)], "prompt": documents[index] + question}
        for index, question in asked
    ]
    first = [_is_first(asked, place) for place in range(len(asked))]
    names = list(_SIDES)
    shift = number % len(names)
    return {name: _ask_all(asks[name], requests, first, args) for name in names[shift:] + names[:shift]}


def _is_first(asked: Sequence[tuple[int, str]], place: int) -> bool:
    return all(index != asked[place][0] for index, _ in asked[:place])


def _post(server: Server, request: dict[str, Any]) -> tuple[int, int]:
    body = {**request, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    usage = server.post("/v1/completions", body)["usage"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def _ask_all(
    ask: Ask, requests: list[dict[str, Any]], first: list[bool], args: argparse.Namespace
) -> dict[str, Any]:
    began = time.monotonic()
    with ThreadPoolExecutor(args.concurrency) as pool:
        counts = list(pool.map(ask, requests))
    seconds = time.monotonic() - began
    cached = sum(cached for _, cached in counts)
    return {
        "requests": len(requests),
        "documents": sum(first),
        "prompt_tokens": sum(prompt for prompt, _ in counts),
        "cached_tokens": cached,
        "hit_rate": cached / (len(requests) * args.document_tokens),
        "requests_per_s": len(requests) / seconds,
    }


def _hits(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _SIDES:
        rates = [each[name]["hit_rate"] for each in rounds]
        to_one = [each[name]["hit_rate"] / each["one"]["hit_rate"] for each in rounds]
        speed = [each[name]["requests_per_s"] / each["one"]["requests_per_s"] for each in rounds]
        found[name] = {
            "hit_rate": _spread(rates),
            "of_one_replica": _spread(to_one),
            "requests_per_s_of_one_replica": _spread(speed),
        }
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(float(np.median(values)), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


# ---- without Ray


class _Engines:
    """Engines of this process, and who chooses between them."""

    def __init__(self, zoo: Path, number: int, routing: str, args: argparse.Namespace) -> None:
        settings = {
            "kv_cache_bytes": int(args.kv_gb * 2**30 / number),
            "num_threads": args.threads or 1,
            "max_num_seqs": _SEQS,
        }
        self.hosts = [EngineHost(ReplicaSettings(str(zoo), settings)) for _ in range(number)]
        self._in_turn, self._turn = routing == "round-robin", 0
        self._holdings, self._lock = Holdings(), threading.Lock()
        for index, host in enumerate(self.hosts):
            self._set_capacity(index, host)

    def ask(self, request: dict[str, Any]) -> tuple[int, int]:
        """As `Ask`."""
        lanes = (Lane(f"model {request['model']}", 1.0),)
        told = self.hosts[0].state().chars_per_token
        prompt = Prompt(None, lanes, [request["prompt"]], told)
        with self._lock:
            for place, host in enumerate(self.hosts):
                self._set_capacity(place, host)
            self._turn += 1
            name = str(self._turn)
            order = random.sample(range(len(self.hosts)), len(self.hosts))
            index = self._turn % len(order) if self._in_turn else self._holdings.rank(order, prompt)[0]
            self._holdings.send(name, index, prompt)
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        asked = EngineRequest(request["model"], request["prompt"], params, stream=False)
        last = asyncio.run(self._last(self.hosts[index], asked, name))
        with self._lock:
            self._holdings.end(name)
        return last.num_prompt_tokens, last.num_cached_tokens

    def _set_capacity(self, index: int, host: EngineHost) -> None:
        state = host.state()
        self._holdings.set_capacity(index, state.kv_tokens, state.chars_per_token)

    async def _last(self, host: EngineHost, request: EngineRequest, name: str) -> Any:
        return [item async for item in host.generate(request, name)][-1]


def _without_ray(zoo: Path, family: Family, args: argparse.Namespace, machine: dict[str, Any]) -> int:
    sides = {name: _Engines(zoo, *side, args) for name, side in _SIDES.items()}
    tokens = sides["one"].hosts[0].state().kv_tokens
    asks = {name: side.ask for name, side in sides.items()}
    rounds = [_round(asks, tokens, family, args, number) for number in range(1 + args.repeats)][1:]
    for side in sides.values():
        for host in side.hosts:
            host.close()
    results = {"hits": _hits(rounds), "rounds": rounds}
    _print(results)
    print("wrote", save_report("replicas_engines", args, machine, results))
    return 0


# ---- what Ray costs


def _cost(
    one: Server, alone: Server, family: Family, args: argparse.Namespace, number: int
) -> dict[str, float]:
    """Tokens a second that as many streams get as run at once."""
    rng = random.Random(2000 + number)
    requests = [
        {"model": rng.choice(family.tenants), "prompt": _words(rng, 32), "max_tokens": 200}
        for _ in range(2 * _SEQS)
    ]
    sides = [("one", one), ("alone", alone)]
    found = {}
    for name, server in sides[:: 1 if number % 2 else -1]:
        began = time.monotonic()
        with ThreadPoolExecutor(_SEQS) as pool:
            ends = list(pool.map(partial(_stream, server), requests))
        assert set(ends) == {"whole"}, ends
        found[name] = 200 * len(requests) / (time.monotonic() - began)
    return found


# ---- what a killed replica loses


def _kill(server: Server, family: Family, args: argparse.Namespace, number: int) -> dict[str, Any]:
    """Kill a replica while streams run and others wait; what came of them."""
    rng = random.Random(1000 + number)
    requests = [
        {"model": rng.choice(family.tenants), "prompt": _words(rng, 64), "max_tokens": 100} for _ in range(48)
    ]
    victim = _replicas(server.pid)[0]
    with ThreadPoolExecutor(len(requests)) as pool:
        running = [pool.submit(_stream, server, each) for each in requests]
        while _metrics(server)["generated_tokens_total"] < 1 or _metrics(server)["requests_running"] < 8:
            time.sleep(0.05)
        time.sleep(1.0)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        outcomes = Counter(each.result() for each in running)
    while _metrics(server)["replicas"] < 2:
        time.sleep(0.2)
    return {"sent": len(requests), **outcomes, "seconds_to_two_replicas": round(time.monotonic() - killed, 1)}


def _stream(server: Server, body: dict[str, Any]) -> str:
    """What came of a stream, in a word."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.openai}/v1/completions",
        json.dumps({**body, "stream": True, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            text = response.read().decode()
    except urllib.error.HTTPError:
        return "lost before they began"
    if "[DONE]" not in text:
        return "cut off in silence"
    if '"finish_reason":"length"' in text:
        return "whole"
    return "told that their replica was lost" if '"code":"replica_lost"' in text else "failed otherwise"


def _replicas(launcher: int) -> list[int]:
    """Process ids of a server's replicas, whose names have that of its application."""
    commands: dict[int, str] = {}
    front = ""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                command = (folder / "cmdline").read_bytes().decode()
            except OSError:
                continue
            commands[int(folder.name)] = command
            front = command if parent == launcher and "openai.server" in command else front
    application = re.search("--replicas=(blockzoo-[0-9a-f]+)", front)
    assert application is not None, "the endpoint's process names it"
    return [pid for pid, name in commands.items() if name.startswith(f"ray::ServeReplica:{application[1]}")]


def _metrics(server: Server) -> dict[str, float]:
    """The endpoint's figures without labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.openai}/metrics", timeout=30) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^blockzoo_(\w+) (\S+)$", text, re.MULTILINE)}


def _words(rng: random.Random, tokens: int) -> str:
    """Text of so many tokens: letters, each one of its own."""
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=tokens))


def _print(results: dict[str, Any]) -> None:
    rows = [
        (
            name,
            *(f"{each['median']:.3f} ({each['min']:.3f} to {each['max']:.3f})" for each in figures.values()),
        )
        for name, figures in results["hits"].items()
    ]
    columns = ("requests go to", "hit rate", "of one replica's", "requests/s of one replica's")
    print_table("documents found in the cache; median (range)", columns, rows)
    if "streams_of_a_server_without_ray" in results:
        print("streams, of those of a server without Ray:", results["streams_of_a_server_without_ray"])
    for each in results.get("kills", ()):
        print(json.dumps(each))


if __name__ == "__main__":
    sys.exit(main())
