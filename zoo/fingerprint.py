"""Canonical block tensors -> block id: equal weights under an equal operator are one block."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from blockzoo.zoo.blocks import AdapterSpec, BlockSpec
from blockzoo.zoo.strict_json import encode
from blockzoo.zoo.tensors import BlockTensor


def block_id(
    spec: BlockSpec | AdapterSpec, tensors: Mapping[str, BlockTensor], tied_to: str | None = None
) -> str:
    """sha256 hex of (kind, operator spec, names, dtypes, shapes, tensor bytes) in canonical order.

    `tensors`: named and ordered as by `blocks.tensor_shapes`; `tied_to`: a tied head's embed block id.
    """
    described = {
        "spec": encode(spec),
        "tied_to": tied_to,
        "tensors": [_described(name, tensor) for name, tensor in tensors.items()],
    }
    digest = hashlib.sha256(canonical_json(described))
    for tensor in tensors.values():
        for array in tensor.arrays:
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _described(name: str, tensor: BlockTensor) -> list[Any]:
    groups = [] if tensor.scales is None else [tensor.scales.shape[1]]
    offsets = [] if tensor.offsets is None else ["offsets"]
    turned = ["rotated"] if tensor.rotated else []
    return [name, tensor.dtype, list(tensor.shape), *groups, *offsets, *turned]


def canonical_json(value: Any) -> bytes:
    """JSON bytes that are equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def files_id(files: Mapping[str, bytes]) -> str:
    """sha256 hex of named file contents, in whatever order they are given."""
    contents = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return hashlib.sha256(canonical_json(contents)).hexdigest()
