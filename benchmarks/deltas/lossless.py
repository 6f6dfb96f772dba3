"""What own blocks of full fine-tunes take on disk without loss, and how long they take to be read again.

    python -m benchmarks.deltas.lossless FOLDER [--model demo|smollm2] [--rates 1e-4 3e-5 1e-5]

All bf16 values of a fine-tune in one file: as they are; by their xor with the base's; by their distance from
the base's in steps of bf16; with high and low bytes apart, and all through the command zstd (one thread).
Reading is timed from a file whose pages were dropped from the page cache, until the values are there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import machine_facts, print_table, save_report
from benchmarks.deltas.train import RATES
from blockzoo.zoo.checkpoint import open_checkpoint

_CHUNK = 1 << 22
Coding = tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], Callable[[np.ndarray, np.ndarray], np.ndarray]]


def values_of(folder: Path) -> np.ndarray:
    """All of a checkpoint's values, uint16."""
    checkpoint = open_checkpoint(folder)
    return np.concatenate([checkpoint.tensor(name).data.ravel() for name in sorted(checkpoint.files)])


def _ranks(bits: np.ndarray) -> np.ndarray:
    """The place of a bf16 value among all: neighbours differ by one."""
    return np.where(bits >> 15, ~bits, bits | np.uint16(0x8000))


def _steps(own: np.ndarray, base: np.ndarray) -> np.ndarray:
    step = (_ranks(own) - _ranks(base)).view(np.int16)
    return (step << 1 ^ step >> 15).view(np.uint16)  # 0, -1, 1, -2, ... as 0, 1, 2, 3, ...


def _from_steps(kept: np.ndarray, base: np.ndarray) -> np.ndarray:
    ranks = _ranks(base) + (kept >> 1 ^ -(kept & np.uint16(1)))
    return np.where(ranks >> 15, ranks & np.uint16(0x7FFF), ~ranks)


def _planes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 2).T)


def _words(planes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(planes.reshape(2, -1).T).view(np.uint16)[:, 0]


CODINGS: dict[str, Coding] = {
    "as they are": (lambda own, base: own, lambda kept, base: kept.view(np.uint16)),
    "xor": (lambda own, base: own ^ base, lambda kept, base: kept.view(np.uint16) ^ base),
    "xor, bytes apart": (
        lambda own, base: _planes(own ^ base),
        lambda kept, base: _words(kept) ^ base,
    ),
    "steps, bytes apart": (
        lambda own, base: _planes(_steps(own, base)),
        lambda kept, base: _from_steps(_words(kept), base),
    ),
}


def _forget(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> bytearray:
    size = path.stat().st_size
    out = bytearray(size)
    view = memoryview(out)
    with open(path, "rb", buffering=0) as file:
        at = 0
        while at < size:
            at += file.readinto(view[at : at + _CHUNK]) or 0
    return out


def measured(own: np.ndarray, base: np.ndarray, folder: Path, level: int, repeats: int) -> dict[str, Any]:
    """By coding, with and without zstd: bytes and seconds to have the values again."""
    found: dict[str, Any] = {}
    for name, (encode, decode) in CODINGS.items():
        plain, packed = folder / "plain", folder / "plain.zst"
        encode(own, base).tofile(plain)
        subprocess.run(["zstd", "-q", "-f", f"-{level}", "-T1", str(plain), "-o", str(packed)], check=True)
        for how, path in (("", plain), (", zstd", packed)):
            seconds = []
            for _ in range(repeats):
                _forget(path)
                start = time.perf_counter()
                if how:
                    command = ["zstd", "-q", "-d", "-c", str(path)]
                    done = subprocess.run(command, capture_output=True, check=True)
                    data: bytes | bytearray = done.stdout
                else:
                    data = _read(path)
                values = decode(np.frombuffer(data, np.uint8), base)
                seconds.append(time.perf_counter() - start)
                assert np.array_equal(values, own)
            size = path.stat().st_size
            found[name + how] = {"bytes": size / own.nbytes, "seconds": float(np.median(seconds))}
            print(name + how, found[name + how], flush=True)
    return found


def main() -> None:
    """Print and keep the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deltas.lossless", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the base and the fine-tunes")
    parser.add_argument("--model", choices=("demo", "smollm2"), default="demo", help="(demo)")
    parser.add_argument("--rates", nargs="+", default=list(RATES))
    parser.add_argument("--level", type=int, default=3, help="of zstd (3)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the report")
    args = parser.parse_args()
    if shutil.which("zstd") is None:
        raise SystemExit("error: the command zstd is missing")
    machine, base = machine_facts(), values_of(args.folder / "base")
    for rate in args.rates:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            own = values_of(args.folder / f"{args.model}-{rate}")
            results = measured(own, base, Path(folder), args.level, args.repeats)
        args.shape = f"{args.model}-{rate}"
        kept = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != "folder"})
        path = save_report("deltas_lossless", kept, machine, results)
        rows = [(k, r["bytes"], r["seconds"]) for k, r in results.items()]
        print_table(f"{args.shape}, {own.nbytes / 1e6:.0f} MB", ("values", "of bf16's bytes", "s"), rows)
    print(path)


if __name__ == "__main__":
    main()
