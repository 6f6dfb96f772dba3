"""Published documents: what publishing costs, computed or from disk, and what it saves until the first token.

    python -m benchmarks.published [--shape 110m|0.5b] [--repeats N] [--length N]

Two tenants share all but their last two layers; every round has a new document, for both:

    computed      publish it: a prefill in each chain, the second from where the two part
    kept          the same, and write it to the folder of --kv-cache-dir
    loaded        publish it at the next start: read from that folder
    cold          first token of the document and a question, nothing known
    published     the same behind the published document, in a scope that has asked nothing before

All take turns in one process. The tokens behind the loaded document must be those of the cold run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import Samples, arguments, machine_facts, print_table, save_report
from benchmarks.families import Family, make_family
from blockzoo.runtime import LLMEngine, SamplingParams
from blockzoo.runtime.serve.config import EngineConfig

LENGTH, QUESTION = 2048, 32
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PUBLISHING, ASKING = ("computed", "kept", "loaded"), ("cold", "published")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], shape="110m", repeats=5)
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a document ({LENGTH})")
    args = parser.parse_args()
    machine = machine_facts()
    family = make_family(args.workdir, args.shape, 2)
    with tempfile.TemporaryDirectory() as folder:
        results = run(family, args, Path(folder))
    columns = ("", "median ms", "p10", "p90", "ratio")
    rows = [
        (name, side["median_ms"], side["p10_ms"], side["p90_ms"], side["ratio"])
        for name, side in results["sides"].items()
    ]
    print_table(f"a document of {results['document_tokens']} tokens for two tenants", columns, rows)
    print(
        f"{results['disk_bytes_per_document'] / 2**20:.1f} MiB a document on disk, "
        f"{results['disk_bytes_per_token']:.0f} bytes a token; "
        f"tokens equal to the cold run in {results['rounds_equal']} of {results['rounds']} rounds"
    )
    print(save_report("published", args, machine, results))


class Bench:
    """Engines that know nothing, publish, publish and keep, and load."""

    def __init__(self, family: Family, args: argparse.Namespace, folder: Path) -> None:
        self._family, self._args, self.folder = family, args, folder
        self.cold = self._engine(prefix_caching=False)
        self.computed = self._engine()
        self.kept, self.loaded = (self._engine(kv_cache_dir=str(folder)) for _ in range(2))
        self._rng = np.random.default_rng(0)

    def _engine(self, **settings: Any) -> LLMEngine:
        length = self._args.length
        config = EngineConfig(
            precision=self._args.precision,
            num_threads=self._args.threads,
            kv_cache_bytes=6 * length * self._family.shape.kv_bytes_per_token * 2,
            max_model_len=length + 4 * QUESTION,
            max_num_seqs=4,
            published_kv_share=1.0,
            **settings,
        )
        return LLMEngine(self._family.zoo().path, config)

    def round(self) -> Round:
        """Publish and ask about a new document."""
        for engine in (self.computed, self.kept, self.loaded):
            for known in engine.documents:
                engine.withdraw(known.name)
        for file in self.folder.iterdir():
            file.unlink()
        text, question = self._text(self._args.length), self._text(QUESTION)
        seconds = {name: getattr(self, name).publish("document", text).seconds for name in PUBLISHING}
        (document,) = self.loaded.documents
        if document.num_loaded != len(self._family.tenants):
            raise SystemExit("the document was not loaded from disk")
        seconds["cold"], expected = self._ask(self.cold, text, question)
        seconds["published"], found = self._ask(self.loaded, text, question)
        disk_bytes = sum(file.stat().st_size for file in self.folder.iterdir())
        return Round(seconds, found == expected, document.num_tokens, disk_bytes)

    def _text(self, num_tokens: int) -> str:
        """Text that takes nearly as many tokens: a random one, cut."""
        tokenizer = self.cold.tokenizer(self._family.tenants[0])
        text = tokenizer.decode(self._rng.integers(2, self._family.shape.vocab_size, num_tokens).tolist())
        while (size := len(tokenizer.encode(text))) > num_tokens:
            text = text[: len(text) * num_tokens // size]
        return text

    def _ask(self, engine: LLMEngine, text: str, question: str) -> tuple[float, list[int]]:
        """Seconds to the first token of the second tenant, in a scope that only publishing has filled."""
        start, first = time.perf_counter(), 0.0
        found: list[int] = []
        model = self._family.tenants[1]
        engine.add_request("r", model, question, GREEDY, "a scope", documents=[text])
        while engine.has_unfinished():
            for output in engine.step():
                first = first or time.perf_counter() - start
                found += output.token_ids
        return first, found


class Round(NamedTuple):
    """Seconds by side; whether the published answer is the cold one; the document's size."""

    seconds: dict[str, float]
    equal: bool
    num_tokens: int
    disk_bytes: int


def run(family: Family, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides in turn in each round."""
    bench = Bench(family, args, folder)
    rounds = [bench.round() for _ in range(args.repeats + 1)][1:]  # the first one warms up
    samples = {
        name: Samples(tuple((each.seconds[name],) for each in rounds)) for name in (*PUBLISHING, *ASKING)
    }
    base = {name: group[0] for group in (PUBLISHING, ASKING) for name in group}
    return {
        "precision": bench.loaded.engine_facts["precision"],
        "document_tokens": rounds[-1].num_tokens,
        "sides": {
            name: taken.summary() | {"ratio": taken.ratio_to(samples[base[name]])["ratio"]}
            for name, taken in samples.items()
        },
        "disk_bytes_per_document": rounds[-1].disk_bytes,
        "disk_bytes_per_token": rounds[-1].disk_bytes / rounds[-1].num_tokens,
        "rounds": len(rounds),
        "rounds_equal": sum(each.equal for each in rounds),
    }


if __name__ == "__main__":
    main()
