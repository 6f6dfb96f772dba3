"""zoo-generate: one prompt, one model, the answer streamed to the terminal."""

from __future__ import annotations

import argparse
import sys

from blockzoo.zoo.console import command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo-generate", description="Complete a prompt with a model of a zoo."
    )
    parser.add_argument("zoo", metavar="ZOO", help="zoo directory")
    parser.add_argument("model", metavar="MODEL", help="name of a model in the zoo")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; '-' reads standard input")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given repeatedly")
    parser.add_argument(
        "--backend", choices=("openvino", "reference", "tensorrt"), help="what computes (default: openvino)"
    )
    parser.add_argument("--device", help="of the other backends: cpu, cuda or cuda:<n>")
    parser.add_argument("--precision", choices=("f32", "bf16"), help="default: what the CPU does best")
    return parser


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
    from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams
    from blockzoo.runtime.api.errors import RequestError

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        stop=tuple(args.stop),
    )
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    config = EngineConfig(backend=args.backend, device=args.device, precision=args.precision, max_num_seqs=1)
    engine = LLMEngine(args.zoo, config)
    engine.add_request("cli", args.model, prompt, params)
    while engine.has_unfinished():
        for output in engine.step():
            if output.finish_reason == "error":
                raise RequestError(output.error or "the request failed")
            print(output.text, end="", flush=True)
    print()
    return 0
