"""Files of model folders that others made: regular files that lie in the folder, and JSON objects in them."""

import json
from pathlib import Path
from typing import Any

from blockzoo.zoo.errors import CheckpointError


def find_file(folder: Path, name: str) -> Path | None:
    """The path of a folder's file, None where there is none; nothing is opened.

    Raises CheckpointError for what reading could hang on (pipes, devices, sockets) and for links that lead
    out of the folder: what they name may be another user's. The blobs of a snapshot in the Hugging Face
    cache belong to it.
    """
    path = folder / name
    try:
        found, root = path.resolve(strict=True), folder.resolve(strict=True)
        regular = found.is_file()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to {path.readlink()}, which does not exist") from None
        return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle; ValueError: NUL
        raise CheckpointError(f"{path!s:.200}: not readable ({error})") from error
    own = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(found.is_relative_to(place) for place in own):
        raise CheckpointError(f"{path} is a link that leads out of its folder: copy the file in its place")
    if not regular:
        raise CheckpointError(f"{path} is no regular file (it is a folder, pipe, device or socket)")
    return path


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """An object from a folder's JSON file. Raises CheckpointError when it is missing or something else."""
    path = find_file(folder, name)
    if path is None:
        raise CheckpointError(f"{folder}: {name} is missing")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, seen {type(value).__name__}")
    return value
