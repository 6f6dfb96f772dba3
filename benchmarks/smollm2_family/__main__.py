"""`python -m benchmarks.smollm2_family OUT_DIR`: writes the family as Hugging Face folders."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.smollm2 import NotAvailableError
from blockzoo.zoo.errors import CheckpointError

from .assemble import assemble


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_family", description=assemble.__doc__)
    parser.add_argument("out_dir", type=Path, help="folder to write the models into")
    args = parser.parse_args()
    try:
        folders = assemble(args.out_dir)
    except (NotAvailableError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    for name, folder in folders.items():
        print(f"{name:15} {folder}")


if __name__ == "__main__":
    main()
