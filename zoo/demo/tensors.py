"""Safetensors files as raw numpy arrays: bf16 stays the uint16 it is stored as, the order is the caller's.

The library's numpy interface refuses bf16 and sorts what it writes; the demo needs neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import cast

import numpy as np
from safetensors import deserialize

STORED_AS: dict[str, np.dtype] = {"BF16": np.dtype("<u2"), "F32": np.dtype("<f4")}
NAME_OF = {dtype: name for name, dtype in STORED_AS.items()}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file, sorted by name: bf16 as uint16, f32 as float32, any other is a ValueError."""
    tensors: dict[str, np.ndarray] = {}
    for name, record in sorted(deserialize(path.read_bytes()), key=itemgetter(0)):
        dtype = str(record["dtype"])
        if dtype not in STORED_AS:
            raise ValueError(f"{path}: {name} is {dtype}; expected one of {sorted(STORED_AS)}")
        shape, data = cast(list[int], record["shape"]), cast(bytes, record["data"])
        tensors[name] = np.frombuffer(data, STORED_AS[dtype]).reshape(shape)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes uint16 arrays as BF16 and float32 ones as F32, their bytes in the order of the mapping."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAME_OF[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor).tobytes())
