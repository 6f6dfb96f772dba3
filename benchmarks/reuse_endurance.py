"""Does approximate reuse last? New orders of documents, more of them than the pool holds, query after query.

    python -m benchmarks.reuse_endurance [--queries 500] [--documents 64] [--room 40] [--published 16]

The demo base (5M) answers a question behind eight documents drawn anew each time. Of every window of 50
queries: the share of prompt tokens that was taken over, exactly or approximately, and how many times faster
the first token came than by a full prefill, by which every fifth prompt is computed as well (processor time
of the whole process, so that other load counts little). Once as requests come, once with some published.
"""

from __future__ import annotations

import argparse
import random
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.common import machine_facts, print_table, save_report
from benchmarks.families import made_once
from benchmarks.kv_reuse import _make_demo
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.request import KVReuse
from blockzoo.runtime.approx.config import ReuseConfig
from blockzoo.zoo.demo.corpus import standard_library_texts
from blockzoo.zoo.store import Zoo

WINDOW, IN_A_PROMPT, FULL_EVERY = 50, 8, 5
_CHARACTERS = 320  # of a document
_ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def main() -> None:
    """The command line."""
    args = _parser().parse_args()
    machine = machine_facts()
    zoo = made_once(args.workdir / "demo", _make_demo) / "zoo"
    results = {}
    for name, published in (("as requests come", 0), (f"{args.published} published", args.published)):
        results[name] = endure(zoo, args, published)
        rows = [(w["queries"], w["taken over"], w["times faster"]) for w in results[name]["windows"]]
        print_table(name, ("queries", "taken over", "times faster"), rows)
        print(results[name]["last to first"])
    args.shape = "5m"
    print(save_report("reuse_endurance", args, machine, results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reuse_endurance", description=__doc__)
    add = parser.add_argument
    add("--queries", type=int, default=500)
    add("--documents", type=int, default=64)
    add("--room", type=int, default=40, help="documents that the pool holds (40)")
    add("--published", type=int, default=16, help="of them, the second time (16)")
    add("--threads", type=int, default=1, help="compute threads (1)")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    add("--workdir", type=Path, default=Path("out/bench"), help="for the zoo")
    return parser


def endure(zoo: Path, args: argparse.Namespace, published: int) -> dict[str, Any]:
    """All queries on one engine."""
    rng = random.Random(0)
    documents = _documents(args.documents)
    stored = Zoo.open(zoo)
    tokenizer = Tokenizer.from_file(str(stored.tokenizer_dir("base") / "tokenizer.json"))
    lengths = [len(tokenizer.encode(text).ids) for text in documents]
    shape = stored.manifest.models["base"].config
    token_bytes = 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim  # K and V in f32
    tokens = args.room * float(np.mean(lengths)) + 1.5 * IN_A_PROMPT * max(lengths)
    config = EngineConfig(
        precision="f32",
        kv_cache_bytes=int(tokens * token_bytes),
        num_threads=args.threads,
        kv_reuse="approx",
        approximate=ReuseConfig(recompute=0.2),
        max_step_seconds=None,
    )
    engine = LLMEngine(zoo, config)
    for number in range(published):
        engine.publish(f"document {number}", documents[number])
    ours: list[float] = []
    full: dict[int, float] = {}
    taken: list[float] = []
    for query in range(args.queries):
        chosen = rng.sample(documents, IN_A_PROMPT)
        question = f"# {query}: {rng.random()}\ndef f{query}("
        if query % FULL_EVERY == 0:
            full[query], _ = _ask(engine, chosen, question, "off")
        seconds, share = _ask(engine, chosen, question, "approx")
        ours.append(seconds)
        taken.append(share)
    engine.check_integrity()
    windows = [_window(ours, full, taken, start) for start in range(0, args.queries, WINDOW)]
    after, last = (windows[1] if len(windows) > 1 else windows[0]), windows[-1]
    ratios = {key: round(last[key] / after[key], 3) for key in ("taken over", "times faster")}
    return {"windows": windows, "last to first": ratios, "pool_pages": engine.metrics().pages_total}


def _ask(engine: LLMEngine, documents: list[str], question: str, how: KVReuse) -> tuple[float, float]:
    """Processor seconds to the first token, and the share of the prompt that was taken over."""
    before = engine.metrics().approximate_tokens_total
    start = time.process_time()
    engine.add_request("r", "base", question, _ONE, kv_reuse=how, documents=documents)
    cached = length = 0
    while engine.has_unfinished():
        for output in engine.step():
            if output.error is not None:
                raise SystemExit(output.error)
            cached, length = output.num_cached_tokens, output.num_prompt_tokens
    seconds = time.process_time() - start
    return seconds, (cached + engine.metrics().approximate_tokens_total - before) / length


def _window(ours: list[float], full: dict[int, float], taken: list[float], start: int) -> dict[str, Any]:
    end = min(start + WINDOW, len(ours))
    faster = float(np.median([full[i] for i in range(start, end) if i in full])) / float(
        np.median(ours[start:end])
    )
    return {
        "queries": f"{start}-{end}",
        "taken over": round(float(np.mean(taken[start:end])), 3),
        "times faster": round(faster, 2),
    }


def _documents(count: int) -> list[str]:
    texts = (text[1000 : 1000 + _CHARACTERS] for text in standard_library_texts(10**8) if len(text) > 4000)
    return [f"{text}\n" for text in islice(texts, count)]


if __name__ == "__main__":
    main()
