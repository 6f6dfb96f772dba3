"""Inputs of Triton's clients from Python values."""

from __future__ import annotations

import numpy as np

from blockzoo.server_config.tensors import INPUTS

NUMPY = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "STRING": object}
TYPE_OF = {field.name: field.data_type for field in INPUTS}


def tensors(client, **values):
    """Inputs of a Triton client with a leading batch dimension."""
    made = []
    for name, value in values.items():
        value = value if isinstance(value, list) else [value]
        kind = TYPE_OF.get(name, "STRING")
        array = np.array([[v.encode() if isinstance(v, str) else v for v in value]], NUMPY[kind])
        tensor = client.InferInput(name, list(array.shape), "BYTES" if kind == "STRING" else kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made
