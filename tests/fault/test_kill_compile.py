"""A zoo-compile killed at any moment leaves a zoo that loads, as it was or as it was to be."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockzoo.build.cli import main
from blockzoo.zoo.store import Zoo

FAST = ["--no-verify", "--no-profile"]
KILLS = 10


def command(models: dict[str, Path], zoo: Path) -> list[str]:
    given = [f"{name}={path}" for name, path in models.items()]
    return [sys.executable, "-m", "blockzoo.build.cli", *given, "-o", str(zoo), *FAST]


def whole(path: Path) -> set[str]:
    """The models of a zoo of which every block and tokenizer is right."""
    zoo = Zoo.open(path)
    for name, record in zoo.manifest.models.items():
        zoo.tokenizer_dir(name)
        for block in record.chain:
            zoo.read_block(block)
        for adapter in record.adapters.values():
            zoo.read_adapter(adapter)
    return set(zoo.manifest.models)


@pytest.mark.slow
def test_killed_at_random_moments(demo_family: dict[str, Path], tmp_path: Path) -> None:
    first = {"base": demo_family["base"]}
    more = {name: demo_family[name] for name in ("notes", "notes-merged", "solver")}
    start = tmp_path / "start"
    assert main([f"base={demo_family['base']}", "-o", str(start), *FAST]) == 0
    began = time.monotonic()
    assert (
        subprocess.run(command(more, Path(shutil.copytree(start, tmp_path / "done"))), check=False).returncode
        == 0
    )
    duration = time.monotonic() - began
    expected = (tmp_path / "done" / "manifest.json").read_bytes()

    moments = random.Random(0)
    outcomes = []
    zoo = tmp_path / "zoo"
    shutil.copytree(start, zoo)
    for _ in range(KILLS):
        process = subprocess.Popen(command(more, zoo), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # most of a run is imports: aim at the second half, where files are written
        time.sleep(duration * moments.uniform(0.4, 1.0))
        process.kill()
        process.wait()
        outcomes.append(whole(zoo))
        assert outcomes[-1] in ({*first}, {*first, *more})
        if outcomes[-1] != {*first}:  # done before the kill: once more from the start
            shutil.rmtree(zoo)
            shutil.copytree(start, zoo)
    subprocess.run(command(more, zoo), check=True)
    assert whole(zoo) == {*first, *more}
    assert (zoo / "manifest.json").read_bytes() == expected
    manifest = Zoo.open(zoo).manifest
    used = {f"{key}.safetensors" for key in (*manifest.blocks, *manifest.adapters)}
    assert {path.name for path in (zoo / "blocks").iterdir()} == used


def test_killed_between_any_two_writes(demo_family: dict[str, Path], tmp_path: Path) -> None:
    """The moments that chance may miss: die right before each rename in turn."""
    start = tmp_path / "start"
    assert main([f"base={demo_family['base']}", "-o", str(start), *FAST]) == 0
    die = """
import os, pathlib, sys
left, rename = int(sys.argv.pop(1)), pathlib.Path.rename
def dying(self, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return rename(self, target)
pathlib.Path.rename = dying
from blockzoo.build.cli import main
sys.exit(main(sys.argv[1:]))
"""
    zoo = Path(shutil.copytree(start, tmp_path / "zoo"))
    # solver brings four blocks; each run keeps the whole ones and dies at the next, the last at the manifest
    for left in (0, 1, 2, 1):
        arguments = [str(left), f"solver={demo_family['solver']}", "-o", str(zoo), *FAST]
        done = subprocess.run([sys.executable, "-c", die, *arguments], capture_output=True, check=False)
        assert done.returncode == -9, done.stderr
        assert whole(zoo) == {"base"}
    assert len(list((zoo / "blocks").glob("[0-9a-f]*.safetensors"))) == 14 + 4
    assert main([f"solver={demo_family['solver']}", "-o", str(zoo), *FAST]) == 0
    assert whole(zoo) == {"base", "solver"}
    assert not list((zoo / "blocks").glob(".tmp-*"))
