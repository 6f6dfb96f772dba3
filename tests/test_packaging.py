"""The list of packages in pyproject.toml against the tree."""

from __future__ import annotations

import ast
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


def test_every_file_that_is_no_module_is_packaged() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    section = settings.partition("[tool.setuptools.package-data]\n")[2].partition("\n\n")[0]
    patterns: dict[str, list[str]] = ast.literal_eval(
        "{" + re.sub(r"(?m)^(\S+) = (.*)$", r"\1: \2,", section) + "}"
    )
    packaged = {
        path
        for package, globs in patterns.items()
        for pattern in globs
        for path in ROOT.joinpath(*package.split(".")[1:]).glob(
            pattern if package != "*" else f"**/{pattern}"
        )
    }
    present = {
        path
        for top in TOP
        for path in (ROOT / top).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    assert present - packaged == set()


def test_no_package_file_above_the_five() -> None:
    assert not (ROOT / "__init__.py").exists()
