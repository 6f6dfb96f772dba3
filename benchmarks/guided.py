"""What a JSON schema costs: decode steps of eight guided answers against eight free ones, SmolLM2-135M.

    python -m benchmarks.guided

One engine, the same prompts, greedy; the sides take turns. Only steps count in which all eight decode. The
schema is of the kind that applications ask for: an object with texts, numbers, choices and a list of objects.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import Samples, arguments, interleave, machine_facts, print_table, save_report
from benchmarks.families import made_once
from benchmarks.smollm2 import NotAvailableError, smollm2
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
from blockzoo.runtime.api.request import GuidedDecoding

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 8, "maxLength": 80},
        "priority": {"enum": ["low", "normal", "high", "urgent"]},
        "customer": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 4, "maxLength": 40},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "premium": {"type": "boolean"},
            },
            "required": ["name", "age", "premium"],
            "additionalProperties": False,
        },
        "lines": {
            "type": "array",
            "minItems": 8,
            "maxItems": 8,
            "items": {
                "type": "object",
                "properties": {
                    "article": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                    "text": {"type": "string", "minLength": 8, "maxLength": 60},
                    "price": {"type": "number"},
                },
                "required": ["article", "text", "price"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["title", "priority", "customer", "lines"],
    "additionalProperties": False,
}
TOPICS = (
    "a bicycle",
    "a radio",
    "two chairs",
    "a lamp",
    "garden tools",
    "a camera",
    "three books",
    "a kettle",
)


def main() -> int:
    """Run the benchmark."""
    parser = arguments(__doc__.splitlines()[0], shape="smollm2", repeats=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=96, help="tokens of an answer (96)")
    args = parser.parse_args()
    machine = machine_facts()
    try:
        model = smollm2()
    except NotAvailableError as error:
        raise SystemExit(f"error: {error}") from None
    zoo = made_once(args.workdir / "smollm2-zoo", lambda folder: _compile(model, folder))
    config = EngineConfig(
        precision=args.precision,
        num_threads=args.threads,
        kv_cache_bytes=1 << 30,
        max_num_seqs=args.batch,
    )
    bench = Bench(LLMEngine(zoo, config), args.batch, args.steps)
    guided = GuidedDecoding("json_schema", json.dumps(SCHEMA))
    sides = {"free": lambda: bench.steps(None), "guided": lambda: bench.steps(guided)}
    samples = interleave(sides, args.repeats)
    results = _results(samples, bench)
    columns = ("side", "step ms", "p10", "p90", "steps", "choosing tokens ms", "ratio", "p10", "p90")
    rows = [
        (
            side,
            *results[side]["step"].values(),
            results[side]["choosing_ms"],
            *results[side]["to_free"].values(),
        )
        for side in sides
    ]
    print_table(f"batch {args.batch}, {args.steps} tokens", columns, rows)
    print("wrote", save_report("guided", args, machine, results))
    return 0


def _compile(model: Path, folder: Path) -> None:
    compile_models({"chat": model}, folder, CompileOptions(profile=False))


class Bench:
    """One engine and what its steps take.

    Attributes:
        choosing: by side, seconds that each step took from logits to tokens.
    """

    def __init__(self, engine: LLMEngine, batch: int, num_tokens: int) -> None:
        self._engine, self._batch, self._num_tokens = engine, batch, num_tokens
        self.choosing: dict[bool, list[float]] = {False: [], True: []}
        template = engine.tokenizer("chat").chat_template_of("chat")
        asked = [f"Write the order of {TOPICS[i % 8]}, number {i}, as JSON." for i in range(batch)]
        self._prompts = [template.render([{"role": "user", "content": text}]) for text in asked]

    def steps(self, guided: GuidedDecoding | None) -> list[float]:
        """Seconds of the steps in which all decode."""
        params = SamplingParams(
            max_tokens=self._num_tokens, temperature=0.0, guided=guided, ignore_eos=guided is None
        )
        for number, prompt in enumerate(self._prompts):
            self._engine.add_request(str(number), "chat", prompt, params)
        seconds: list[float] = []
        begun: set[str] = set()
        choosing = self._time_choosing()
        while self._engine.has_unfinished():
            all_decode = len(begun) == self._batch
            choosing.clear()
            start = time.perf_counter()
            outputs = self._engine.step()
            elapsed = time.perf_counter() - start
            begun |= {output.request_id for output in outputs}
            if any(output.finished for output in outputs):
                if any(output.finish_reason != "length" for output in outputs):
                    raise SystemExit("an answer ended early: ask for fewer steps")
                continue
            if all_decode:
                seconds.append(elapsed)
                self.choosing[guided is not None].append(sum(choosing))
        return seconds

    def _time_choosing(self) -> list[float]:
        """A list to which the engine's sampler adds the seconds of each of its calls."""
        taken: list[float] = []
        follow = type(self._engine._sampler).follow

        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            found = list(follow(self._engine._sampler, *args))
            taken.append(time.perf_counter() - start)
            return iter(found)

        self._engine._sampler.follow = timed  # type: ignore[assignment, method-assign]
        return taken


def _results(samples: dict[str, Samples], bench: Bench) -> dict[str, Any]:
    free = samples["free"]
    return {
        side: {
            "step": own.summary(),
            "choosing_ms": float(f"{1e3 * sorted(taken)[len(taken) // 2]:.4g}"),
            "to_free": own.ratio_to(free),
        }
        for side, own in samples.items()
        for taken in (bench.choosing[side == "guided"],)
    }


if __name__ == "__main__":
    sys.exit(main())
