"""Regular expressions that came with an adapter, against the names of modules.

Python's `re` may run for ages on a hostile pattern. Names and paths, which is what PEFT itself writes, cannot
repeat and are matched at once; anything else in a process of its own with little time and memory.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

from blockzoo.zoo.errors import CheckpointError

How = Literal["match", "fullmatch"]
CPU_SECONDS = 2
_WALL_SECONDS = 60  # for a machine that is busy with other things
_PLAIN = re.compile(r"[\w.^$-]*(\\\.[\w.^$-]*)*")
_PROGRAM = f"""\
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
sources, how, names = json.load(sys.stdin)
patterns = [re.compile(source) for source in sources]
print(json.dumps([next((i for i, p in enumerate(patterns) if getattr(p, how)(n)), None) for n in names]))
"""


def first_match(patterns: Sequence[str], how: How, names: Sequence[str]) -> list[int | None]:
    """For each name the number of the first pattern for which `re`'s function `how` finds a match.

    Raises CheckpointError for what is no pattern, and for one that takes too long.
    """
    if not all(map(_PLAIN.fullmatch, patterns)):
        return _apart(patterns, how, names)
    compiled = [re.compile(pattern) for pattern in patterns]
    return [next((i for i, p in enumerate(compiled) if getattr(p, how)(name)), None) for name in names]


def _apart(patterns: Sequence[str], how: str, names: Sequence[str]) -> list[int | None]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROGRAM],
            input=json.dumps([list(patterns), how, list(names)]),
            capture_output=True,
            text=True,
            timeout=_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _too_slow(patterns) from None
    if done.returncode == 0:
        return list(json.loads(done.stdout))
    if done.returncode > 0:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise CheckpointError(f"{_named(patterns)} is no regular expression that can be used ({reason:.200})")
    raise _too_slow(patterns)


def _too_slow(patterns: Sequence[str]) -> CheckpointError:
    return CheckpointError(
        f"{_named(patterns)} takes more than {CPU_SECONDS} s to match against module names: "
        "write a simpler one, or the modules' names"
    )


def _named(patterns: Sequence[str]) -> str:
    return f"{patterns[0]!r:.100}" + (f" (or one of {len(patterns) - 1} more)" if len(patterns) > 1 else "")
