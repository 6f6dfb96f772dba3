"""Weights and settings as read here against those that transformers and PEFT read from the same folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from blockzoo.build.originals import oracle_for
from blockzoo.build.partition import chain_names
from blockzoo.build.sources import Source
from blockzoo.zoo.tensors import BlockTensor, TensorFile, write_tensor_file

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edit(path: Path, **changes: Any) -> None:
    kept = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value is not ...}))


def rewrite(path: Path, change: Callable[[dict[str, BlockTensor]], dict[str, BlockTensor]]) -> None:
    file = TensorFile(path)
    write_tensor_file(
        path.with_name("new"), change({n: file.tensor(n) for n in file.names}), {"format": "pt"}
    )
    path.with_name("new").rename(path)


def assert_reads_as(model: Any, source: Source) -> None:
    """All weights of the source, LoRAs added, and those of its oracle, are the transformers model's."""
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    judge = oracle_for(source, False, None)
    names = {hf for block in chain_names(source.config) for hf in block.values()}
    assert names <= theirs.keys()
    assert source.config.tie_word_embeddings == ("lm_head.weight" not in names)
    if source.config.tie_word_embeddings:
        np.testing.assert_array_equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])
    for name in names:
        own = source.read(name).to_f32()
        for pair in source.pairs.get(name, ()):
            own = own + np.float32(pair.scale) * (pair.b.to_f32() @ pair.a.to_f32())
        np.testing.assert_allclose(own, theirs[name], rtol=0, atol=1e-6, err_msg=name)
        judged = judge.weight(name)
        assert judged is not None
        np.testing.assert_allclose(judged, theirs[name], rtol=0, atol=1e-6, err_msg=name)
    head = judge.weight(EMBED if judge.config.get("tie_word_embeddings") else HEAD)
    assert head is not None
    np.testing.assert_allclose(head, theirs[HEAD], rtol=0, atol=1e-6)


def from_transformers(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
