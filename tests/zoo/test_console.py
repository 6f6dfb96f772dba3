"""Console commands whose reader goes away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockzoo.zoo.console import READER_GONE, command

MODULES = ("build.cli", "build.inspect", "runtime.generate", "server_config.serve")


def run_with_reader_gone(
    arguments: list[str], with_stderr: bool = False
) -> subprocess.CompletedProcess[bytes]:
    """Run Python with a standard output (and error) that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, *arguments],
            stdout=writer,
            stderr=writer if with_stderr else subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            timeout=120,
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("with_stderr", [False, True])
def test_help_to_a_reader_that_is_gone(module: str, with_stderr: bool) -> None:
    program = f"import sys; from blockzoo.{module} import main; sys.exit(main(['--help']))"
    done = run_with_reader_gone(["-c", program], with_stderr)
    assert done.returncode == READER_GONE
    assert not done.stderr


def test_a_report_to_a_reader_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(
        '{"schema_version": 2, "models": {}, "blocks": {}, "plans": {}, "tensorrt_plans": {}, "adapters": {}}'
    )
    done = run_with_reader_gone(["-m", "blockzoo.build.inspect", str(tmp_path), "--json"])
    assert (done.returncode, done.stderr) == (READER_GONE, b"")


def test_no_output_at_all() -> None:
    program = "import sys; from blockzoo.build.cli import main; sys.exit(main(['--help']))"
    shell = ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program]
    done = subprocess.run(shell, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0
    assert b"Traceback" not in done.stderr


def test_other_broken_pipes_are_told() -> None:
    @command
    def main() -> int:
        raise BrokenPipeError("of a child")

    with pytest.raises(BrokenPipeError, match="of a child"):
        main()


def test_what_a_command_returns_is_handed_on() -> None:
    @command
    def main(status: int) -> int:
        return status

    assert main(3) == 3
