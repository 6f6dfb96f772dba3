"""The list of packages in pyproject.toml against the tree."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP = ("build", "engines", "runtime", "server_config", "zoo")


def test_every_package_is_listed() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(blockzoo\.[\w.]+)",$', text, re.MULTILINE))
    present = {
        "blockzoo." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in TOP
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert listed == present


def test_no_package_file_above_the_five() -> None:
    assert not (ROOT / "__init__.py").exists()
