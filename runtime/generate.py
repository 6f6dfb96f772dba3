"""zoo-generate: one prompt or message, one model, the answer streamed to the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from blockzoo.runtime.api.request import CHAT_TOKENS, SamplingParams
from blockzoo.zoo.console import add_backend_arguments, command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo-generate", description="Complete a prompt with a model of a zoo."
    )
    parser.add_argument("zoo", metavar="ZOO", help="zoo directory")
    parser.add_argument("model", metavar="MODEL", help="name of a model in the zoo")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; '-' reads standard input")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="PROMPT is a message: it goes through the model's chat template, and sampling is as the model's "
        "generation_config.json has it",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    return parser


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """What `sampling_params` reads."""
    parser.add_argument(
        "--max-tokens", type=int, help=f"default: 64; in a chat as the model has it, else {CHAT_TOKENS}"
    )
    parser.add_argument("--temperature", type=float, help="0 is greedy; the default but in a chat")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given repeatedly")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `add_backend_arguments`, and --speculate."""
    add_backend_arguments(parser)
    parser.add_argument(
        "--speculate",
        choices=("auto", "off"),
        default="off",
        help="auto: guess tokens ahead where that is hoped to be faster; answers are the same (default: off)",
    )


def sampling_params(args: argparse.Namespace, defaults: Mapping[str, float | int]) -> SamplingParams:
    """What the command line says, else `defaults`, else as in a chat. Raises InvalidRequestError."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
    said = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    settings: dict[str, Any] = {"max_tokens": CHAT_TOKENS, **defaults, **said}
    return SamplingParams(**settings, stop=tuple(args.stop))


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 after a message on standard error."""
    args = _parser().parse_args(argv)
    from blockzoo.engines.base import EngineError
    from blockzoo.runtime.api.errors import RequestError
    from blockzoo.zoo.errors import ZooError

    try:
        return _generate(args)
    except (RequestError, ZooError, EngineError) as error:
        print(f"zoo-generate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _generate(args: argparse.Namespace) -> int:
    from blockzoo.runtime import EngineConfig, LLMEngine
    from blockzoo.runtime.api.errors import InvalidRequestError, RequestError

    if args.system is not None and not args.chat:
        raise InvalidRequestError("--system is for --chat")
    sampling_params(args, {})  # a setting out of range is told before the engines are loaded
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    config = EngineConfig(
        backend=args.backend,
        device=args.device,
        precision=args.precision,
        int8_activations=args.int8_activations,
        kv_precision=args.kv_precision,
        max_num_seqs=1,
        speculate=args.speculate,
    )
    engine = LLMEngine(args.zoo, config)
    defaults: Mapping[str, float | int] = {"max_tokens": 64, "temperature": 0.0}
    if args.chat:
        defaults = engine.generation_defaults(args.model)
        messages = [] if args.system is None else [{"role": "system", "content": args.system}]
        messages.append({"role": "user", "content": prompt})
        prompt = engine.tokenizer(args.model).chat_template_of(args.model).render(messages)
    engine.add_request("cli", args.model, prompt, sampling_params(args, defaults))
    while engine.has_unfinished():
        for output in engine.step():
            if output.finish_reason == "error":
                raise RequestError(output.error or "the request failed")
            print(output.text, end="", flush=True)
    print()
    return 0
