"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "zoo": {"zoo"},
    "engines": {"engines", "zoo"},
    "build": {"build", "engines", "zoo"},
    "runtime": {"runtime", "engines", "zoo"},
    "build/calibrate": {"build", "runtime", "engines", "zoo"},
    "build/chats": {"build", "runtime", "zoo"},  # chat templates are rendered as they are served
    "server_config": {"server_config", "runtime", "zoo"},
}
ROOMS_MAY_IMPORT = {  # folders of runtime/
    "api": {"api"},
    "approx": {"approx"},
    "text": {"text", "api"},
    "sampling": {"sampling", "api"},
    "draft": {"draft", "sampling", "api"},
    "kv": {"kv", "approx", "api"},
    "exec": {"exec", "kv", "approx", "api"},
    "workers": {"workers", "exec", "kv", "approx", "api"},
    "serve": {"serve", "workers", "exec", "kv", "approx", "draft", "sampling", "text", "api"},
}
INTS_ONLY = ("kv/*", "serve/scheduler", "exec/topology", "exec/runs", "exec/batch")
HEAVY = {"torch", "transformers", "openvino", "tensorrt", "peft"}


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a file, relative ones resolved."""
    package = ["blockzoo", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *([node.module] if node.module else [])]))
    return found


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_downwards_only(layer: str) -> None:
    apart = [ROOT / other for other in MAY_IMPORT if other.startswith(f"{layer}/")]
    files = [path for path in sorted((ROOT / layer).rglob("*.py")) if not {*apart} & {*path.parents}]
    assert files
    for path in files:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("blockzoo.")}
        assert ours <= MAY_IMPORT[layer], f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[layer]}"


def test_every_room_of_the_runtime_is_listed() -> None:
    rooms = {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}
    assert rooms == ROOMS_MAY_IMPORT.keys()
    loose = {path.stem for path in (ROOT / "runtime").glob("*.py")}
    assert loose == {"__init__", "llm", "generate", "chat_cli"}, "a module belongs into a room"


@pytest.mark.parametrize("room", ROOMS_MAY_IMPORT)
def test_rooms_of_the_runtime_import_downwards_only(room: str) -> None:
    for path in sorted((ROOT / "runtime" / room).glob("*.py")):
        parts = [name.split(".") for name in imports(path) if name.startswith("blockzoo.runtime")]
        ours = {name[2] if len(name) > 2 else "the top" for name in parts}
        assert ours <= ROOMS_MAY_IMPORT[room], f"{path.name} imports {ours - ROOMS_MAY_IMPORT[room]}"


def test_zoo_needs_no_backend() -> None:
    for path in (ROOT / "zoo").rglob("*.py"):
        if path.name in (
            "train.py",
            "train_chains.py",
            "evaluate.py",
        ):  # the demo family's recipe, never imported by others
            continue
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY, path


@pytest.mark.parametrize("module", INTS_ONLY)
def test_scheduling_needs_no_engine(module: str) -> None:
    for path in (ROOT / "runtime").glob(f"{module}.py"):
        names = imports(path) - {"blockzoo.engines.arrays", "blockzoo.engines.base"}  # protocols, constants
        heavy = {n for n in names if n.startswith("blockzoo.engines") or n.split(".")[0] in HEAVY}
        assert not heavy, f"{path.name} imports {heavy}"


def test_no_torch_on_the_serving_path() -> None:
    for layer in ("engines/openvino", "runtime", "server_config"):
        for path in (ROOT / layer).rglob("*.py"):
            assert not {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}, path


def test_the_map_names_every_module() -> None:
    drawn = (ROOT / "docs" / "structure.md").read_text()
    modules = {path for top in MAY_IMPORT for path in (ROOT / top).rglob("*.py") if path.stem != "__init__"}
    own = {path for path in modules if not {"demo", "models"} & set(path.parts)}  # folders of one line each
    assert not {str(path.relative_to(ROOT)) for path in own if f"`{path.name}`" not in drawn}
