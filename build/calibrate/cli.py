"""`zoo-calibrate`: how models of a zoo reuse KV approximately, found by trying."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from blockzoo.zoo.console import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 after a message on standard error."""
    args = _parser().parse_args(argv)
    from blockzoo.build.calibrate.report import draw, print_record
    from blockzoo.build.calibrate.search import calibrate
    from blockzoo.build.progress import ProgressPrinter
    from blockzoo.engines.base import EngineError
    from blockzoo.runtime.api.errors import RequestError
    from blockzoo.zoo.errors import ZooError

    progress = ProgressPrinter()
    try:
        found = calibrate(
            args.zoo,
            args.models,
            args.prompts,
            agreement=args.agreement,
            speedup=args.speedup,
            count=args.count,
            length=args.length,
            num_threads=args.threads,
            write=not args.dry_run,
            progress=progress,
        )
        progress.close()
        for model, record in found.items():
            print_record(model, record)
        if args.plot is not None:
            draw(found, args.plot)
            print(f"wrote {args.plot}")
    except ImportError:
        print("zoo-calibrate: error: --plot needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return 2
    except (ZooError, EngineError, RequestError, ValueError, OSError) as error:
        print(f"zoo-calibrate: error: {error}", file=sys.stderr)
        return 2
    finally:
        progress.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo-calibrate",
        description="Find for each model of a zoo the fastest way to reuse KV approximately that keeps it "
        "near enough to itself, and note it in the zoo, for requests with kv_reuse approx.",
    )
    add = parser.add_argument
    add("zoo", metavar="ZOO", help="a zoo written by zoo-compile")
    add("models", metavar="MODEL", nargs="*", help="default: all")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='your own, a line each: {"prompt": TEXT or MESSAGES}, judged with the lines before it known, or '
        'those under "known" (default: built-in ones)',
    )
    add(
        "--agreement",
        type=float,
        default=0.99,
        help="least share of equal likeliest tokens, as a share of what bf16 keeps of them (0.99)",
    )
    add("--speedup", type=float, default=1.5, help="how many times as fast it must be, at least (1.5)")
    add("--count", type=int, default=12, help="of built-in prompts (12)")
    add("--length", type=int, default=600, help="of built-in prompts, in tokens, about (600)")
    add("--plot", type=Path, metavar="FILE.png", help="draw agreement over cost (needs matplotlib)")
    add("--threads", type=int, help="compute threads (default: the backend's choice)")
    add("--dry-run", action="store_true", help="leave the zoo as it is")
    add("--version", action="version", version=f"%(prog)s {version('blockzoo')}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
