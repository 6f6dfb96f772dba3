"""The main job on real input: compile a family of fine-tunes, serve it, ask every tenant, measure, stop.

    python -m benchmarks.demo [out/demo]

The family is SmolLM2-135M-Instruct with what was trained from it (benchmarks/smollm2_family); where its base
cannot be had, or with --small, the 5M family of zoo/demo. Prints what is shared, what base and fine-tunes
answer to the same question over the OpenAI endpoint and over gRPC, what that takes in memory against a server
for each model, and a few seconds of perf_analyzer.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import print_table
from benchmarks.demo_server import Server
from benchmarks.perf_analyzer import stream
from benchmarks.smollm2 import NotAvailableError
from blockzoo.zoo.errors import CheckpointError

NOTES = (
    "Note. Tessa is a pilot. Tessa keeps the copper key. The copper key was found at the old mill.\n"
    "Note. The baker Ivor owns the jade bell. It was found at the harbor.\n"
)
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Question:
    """What one tenant is asked, in OpenAI's form."""

    shown: str
    body: Mapping[str, Any]
    """Fields of a chat (with messages) or of a completion (with a prompt)."""

    def ask(self, server: Server, model: str) -> str:
        """The answer of a model over the OpenAI endpoint, greedy."""
        kind = "chat/completions" if "messages" in self.body else "completions"
        answer = server.post(f"/v1/{kind}", {"model": model, "temperature": 0, **self.body})["choices"][0]
        text: str = answer["message"]["content"] if "messages" in self.body else answer["text"]
        return text

    def prompt(self, server: Server, model: str) -> str:
        """The prompt as text, by the model's chat template where it is a chat."""
        if "prompt" in self.body:
            return str(self.body["prompt"])
        tokens = server.post("/tokenize", {"model": model, "messages": self.body["messages"]})["tokens"]
        return str(server.post("/detokenize", {"model": model, "tokens": tokens})["prompt"])


@dataclass(frozen=True, slots=True)
class Family:
    """Checkpoints on disk, and what each of them is asked."""

    folders: Mapping[str, Path]
    questions: Mapping[str, Question]
    """By model; the others are the base under another name."""


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/demo"), help="(out/demo)")
    parser.add_argument("--small", action="store_true", help="the 5M family")
    parser.add_argument("--serve", action="store_true", help="compile, and serve until it is stopped")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a perf_analyzer window")
    args = parser.parse_args()
    family, out = _family(args.out, args.small)
    zoo = out / "zoo"
    models = [f"{name}={folder}" for name, folder in family.folders.items()]
    _tool("zoo-compile", "--replace", *models, "-o", str(zoo))
    _tool("zoo-inspect", str(zoo), "--html", str(zoo.with_suffix(".html")))
    if args.serve:
        serve = str(Path(sys.executable).parent / "zoo-serve")
        os.execv(serve, [serve, str(zoo), "--kv-sharing", "scope"])
    with Server(zoo, "--kv-sharing", "scope", openai=True) as server:
        _compare(server, family)
        _stream(server, family)
        together = server.memory()
        print("\nperf_analyzer, gRPC streaming, 16 tokens a request, all models in turn")
        for concurrency in (1, 8):
            _measure(server, family, concurrency, args.seconds)
    _weigh(out, family, together)
    return 0


def _family(out: Path, small: bool) -> tuple[Family, Path]:
    """The checkpoints, written where they are not yet, and the folder for what is made of them."""
    if not small:
        from benchmarks.smollm2_family.assemble import assemble

        folder = out / "smollm2"
        try:
            return Family(assemble(folder / "models"), dict(_trades())), folder
        except (NotAvailableError, CheckpointError) as error:
            print(f"SmolLM2-135M-Instruct is not to be had: {error}\nThe demo goes on with the 5M family.")
    from blockzoo.zoo.demo.assemble import assemble as assemble_small

    asked = {"notes": "What does Tessa keep?", "notes-merged": "What does Ivor keep?"}
    prompts = {name: f"{NOTES}Q: {question}\nA:" for name, question in asked.items()}
    prompts["solver"] = "Let a = 3.\nLet b = 5.\nQ: b?\nA:"
    questions = {
        name: Question(prompt.splitlines()[-2], {"prompt": prompt, "max_tokens": 16, "stop": ["\n"]})
        for name, prompt in prompts.items()
    }
    return Family(assemble_small(out / "models"), questions), out


def _trades() -> Iterator[tuple[str, Question]]:
    """One held-out question of every trade."""
    from benchmarks.smollm2_family import samples
    from benchmarks.smollm2_family.recipes import RECIPES

    for name, recipe in RECIPES.items():
        [sample] = samples.held_out(recipe.trade, 1)
        body = {"messages": sample.messages, "max_tokens": min(64, recipe.trade.MAX_NEW_TOKENS)}
        yield name, Question(sample.user, body)
        if name == "extract":
            yield "extract-merged", Question(sample.user, body)


def _tool(name: str, *arguments: str) -> None:
    subprocess.run([str(Path(sys.executable).parent / name), *arguments], check=True)


def _compare(server: Server, family: Family) -> None:
    """The same question to the base and to the fine-tune, over HTTP."""
    print("\nthe same question to base and fine-tune, over the OpenAI endpoint")
    for model, question in family.questions.items():
        print(f"\n  {question.shown}".replace("\n", "\n  "))
        for asked in ("base", model):
            answer = question.ask(server, asked).strip().replace("\n", f"\n  {'':15}| ")
            print(f"  {asked:15}> {answer}")


def _stream(server: Server, family: Family) -> None:
    print("\nstreamed over gRPC, token by token")
    for model, question in family.questions.items():
        pieces = server.stream(model, question.prompt(server, model), question.body["max_tokens"])
        print(f"  {model:15} {'·'.join(pieces)!r}")


def _measure(server: Server, family: Family, concurrency: int, seconds: float) -> None:
    """A short perf_analyzer run over all fine-tunes, on the shared endpoint."""
    requests: list[dict[str, list[Any]]] = [
        {
            "text_input": [question.prompt(server, model)],
            "model": [model],
            "max_tokens": [16],
            "min_length": [16],
            "temperature": [0.0],
            "stream": [True],
        }
        for model, question in family.questions.items()
    ]
    printed, _ = stream(server.grpc, requests, concurrency, seconds)
    throughput = re.search(r"Throughput: ([\d.]+) infer/sec", printed)
    latency = re.search(r"Avg latency: (\d+) usec", printed)
    if not throughput or not latency:
        raise SystemExit(f"perf_analyzer printed no figures:\n{printed}")
    rate = float(throughput[1])
    print(
        f"  concurrency {concurrency:2}: {rate:6.1f} requests/s = {16 * rate:.0f} tokens/s, "
        f"{int(latency[1]) / 1000:.0f} ms a request"
    )


def _weigh(out: Path, family: Family, together: int) -> None:
    """Memory of the server of all models against that of a server of the base alone, times their number."""
    zoo = out / "zoo-of-base"
    _tool(
        "zoo-compile",
        "--replace",
        f"base={family.folders['base']}",
        "-o",
        str(zoo),
        "--no-verify",
        "--no-profile",
    )
    with Server(zoo, quiet=True, openai=True) as server:
        question = next(iter(family.questions.values()))
        question.ask(server, "base")
        server.stream("base", question.prompt(server, "base"), 16)
        alone = server.memory()
    count = len(family.folders)
    rows = [
        (f"one server of all {count} models, after these answers", together // MEBIBYTE, 1.0),
        ("a server of the base alone", alone // MEBIBYTE, alone / together),
        (
            f"{count} such servers, one a model (computed)",
            count * alone // MEBIBYTE,
            count * alone / together,
        ),
    ]
    print_table("memory of all processes of a server (PSS)", ("", "MiB", "to one server"), rows)


if __name__ == "__main__":
    sys.exit(main())
