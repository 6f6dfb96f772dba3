"""What it costs streams that spans move from one worker to another.

    python -m benchmarks.span_moves [--shape 110m] [--context 512] [--repeats 5]

Streams of two tenants run over two workers; in the middle, half of one worker's spans go to the other (and in
the next round back). In turns:

    stays   nothing moves
    sent    K and V go along
    anew    sequences are computed anew, as though the link were slow

Told of each: how long a stream was without a token from there on, usually and at most. All tokens must be
those of the side on which nothing moves.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import numpy as np

from benchmarks.common import arguments, machine_facts, print_table, save_report
from benchmarks.families import make_family
from blockzoo.runtime import EngineConfig, EngineThread, RequestOutput, SamplingParams
from blockzoo.runtime.serve.span_moves import Moved

STREAMS, NEW_TOKENS, MOVE_AT = 8, 128, 24
SIDES = {"stays": None, "sent": 2e-9, "anew": 1.0}  # seconds of a byte that the mover believes at first


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=5)
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt (512)")
    parser.set_defaults(precision="f32")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 2)
    tokens = STREAMS * (args.context + NEW_TOKENS)
    config = EngineConfig(
        precision=args.precision,
        workers=2,
        num_threads=1,
        kv_cache_bytes=4 * tokens * family.shape.kv_bytes_per_token,
        max_num_seqs=STREAMS,
        move_spans_every_s=0,
    )
    thread = EngineThread(family.zoo().path, config)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
    try:
        for number in range(args.repeats + 1):
            answers = {}
            for name in SIDES:
                found, answers[name] = _round(thread, tuple(family.tenants), args, number, name)
                if number:  # the first is not counted
                    rounds[name].append(found)
            if any(tokens != answers["stays"] for tokens in answers.values()):
                raise SystemExit("answers differ")
    finally:
        thread.close()
    medians = {name: _medians(found) for name, found in rounds.items()}
    columns = ("side", *medians["sent"])
    print_table("span moves", columns, [(name, *medians[name].values()) for name in SIDES])
    print(save_report("span_moves", args, machine, {**medians, "equal_tokens": True}))


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(float(np.median([found[key] for found in rounds])), 3) for key in rounds[0]}


def _round(
    thread: EngineThread, models: tuple[str, ...], args: argparse.Namespace, number: int, side: str
) -> tuple[dict[str, float], list[list[int]]]:
    """What a round came to, and the tokens of all streams."""
    rng = np.random.default_rng(number)
    vocab = thread.engine._zoo.topology.chains[0].vocab_size
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    streams: list[list[tuple[float, int]]] = [[] for _ in range(STREAMS)]
    half, done = threading.Event(), threading.Semaphore(0)

    def take(stream: int, output: RequestOutput) -> None:
        now = time.perf_counter()
        streams[stream] += [(now, token) for token in output.token_ids]
        if min(map(len, streams)) >= MOVE_AT:
            half.set()
        if output.finished:
            done.release()

    start = time.perf_counter()
    for index in range(STREAMS):
        prompt = rng.integers(2, vocab, args.context).tolist()
        scope = f"{side} {number}"  # nothing is cached of another side's
        thread.submit(
            f"{scope} {index}", models[index % len(models)], prompt, greedy, _for(take, index), scope
        )
    half.wait()
    moved = _move(thread, side)
    for _ in range(STREAMS):
        done.acquire()
    seconds = time.perf_counter() - start
    gaps = np.concatenate([np.diff([at for at, _ in stream[MOVE_AT - 1 :]]) for stream in streams])
    found = {
        "seconds": seconds,
        "usual gap ms": 1e3 * float(np.median(gaps)),
        "longest gap ms": 1e3 * float(gaps.max()),
        "load s": moved.load_seconds if moved else 0.0,
        "still ms": 1e3 * moved.still_seconds if moved else 0.0,
        "pages sent": moved.pages if moved else 0,
        "MB sent": moved.num_bytes / 1e6 if moved else 0.0,
        "computed anew": moved.anew if moved else 0,
    }
    return found, [[token for _, token in stream] for stream in streams]


def _for(take: Any, index: int) -> Any:
    return lambda output: take(index, output)


def _move(thread: EngineThread, side: str) -> Moved | None:
    """Half of the spans of the worker that has more go to the other."""
    byte_s, placement, workers = SIDES[side], thread.engine.placement, thread.engine._zoo.workers
    if byte_s is None or placement is None or workers is None:
        return None
    workers.link_byte_s[:] = [[byte_s] * 2] * 2
    homes = workers.group.plan.homes
    most = max((0, 1), key=homes.count)
    spans = [span for span, home in enumerate(homes) if home == most]
    return placement.move(dict.fromkeys(spans[: len(spans) // 2], 1 - most))


if __name__ == "__main__":
    main()
