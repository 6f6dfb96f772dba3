"""A zoo in which most is broken, on a real server: the rest is served, and each place says what is not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE_S

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import block_path

FAST = CompileOptions(verify=False, profile=False, share="exact")
PROMPT = "Note. The baker Tessa owns the jade lamp.\nQ: Who keeps the jade lamp?\nA:"


@pytest.fixture(scope="module")
def zoo(demo_family, tmp_path_factory) -> Path:
    """base is whole; notes is a damaged LoRA, solver has a damaged block, words a damaged tokenizer; loud
    overflows."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("broken")
    words, loud = (shutil.copytree(demo_family["base"], root / name) for name in ("words", "loud"))
    tokenizer = json.loads((words / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["Q"], vocab["Z"] = vocab["Z"], vocab["Q"]
    (words / "tokenizer.json").write_text(json.dumps(tokenizer))
    tensors = load_file(loud / "model.safetensors")
    last = max(name for name in tensors if "down_proj" in name)
    tensors[last] = tensors[last].float() * 0 + 3e38
    save_file(tensors, loud / "model.safetensors", {"format": "pt"})
    family = {name: demo_family[name] for name in ("base", "notes", "solver")}
    compile_models({**family, "words": words, "loud": loud}, root / "zoo", FAST)
    models = Manifest.load(root / "zoo" / "manifest.json").models
    lora = block_path(root / "zoo", models["notes"].adapters[1])
    lora.write_bytes(lora.read_bytes()[:-1] + b"~")
    own = next(i for i in models["solver"].chain if i not in models["base"].chain)
    os.truncate(block_path(root / "zoo", own), 1000)
    os.truncate(root / "zoo" / "tokenizers" / models["words"].tokenizer / "tokenizer.json", 100)
    return root / "zoo"


WHY = {
    "loud": "its first logits are not finite",
    "notes": "corrupt (its content has the id",
    "solver": "corrupt (not a whole safetensors file",
    "words": "the tokenizer files are not what was compiled",
}


def test_what_is_whole_is_served_and_the_rest_is_named_everywhere(serve_zoo, demo_zoo, zoo, tmp_path):
    document = tmp_path / "terms.jsonl"
    text = "The lamp is of jade. " * 20
    document.write_text(json.dumps({"name": "terms", "text": text, "models": ["base", "notes"]}))
    cache = ("--kv-cache-dir", "/proc/blockzoo", "--publish", str(document))
    server = serve_zoo(zoo, "--kv-cache-gb", "0.1", "--precision", "f32", *cache)
    said = "".join(server.err)
    for name, why in WHY.items():
        assert said.count(f"zoo-serve: model {name} is left out: ") == 1
        status, answer = server.post("blockzoo", {"text_input": "x", "model": name, "max_tokens": 1})
        assert (status, f"model '{name}' is left out: " in answer["error"]) == (400, True)
        assert why in said
        assert why in answer["error"]
        assert str(zoo) not in answer["error"]
    assert said.count("kv_cache_dir /proc/blockzoo: KV of published documents is not kept") == 1
    assert server.metrics()["blockzoo_models_left_out"] == 4
    server.wait_for(lambda: all(server.post(n, {"text_input": "x", "max_tokens": 1})[0] == 404 for n in WHY))
    assert not any(name in line for line in server.out for name in WHY if "tenants" in line)

    llm = LLM(demo_zoo, precision="f32", kv_cache_bytes=32 << 20)
    greedy = SamplingParams(max_tokens=16, temperature=0.0)
    (expected,) = llm.generate("base", PROMPT, greedy, progress=False)
    assert server.generate("base", PROMPT)["token_ids"] == list(expected.token_ids)
    assert server.stop() == 3
    assert "not all models were served; left out: loud, notes, solver, words" in "".join(server.err)


def test_strict_does_not_start(zoo):
    ports = [f"--{kind}-port=0" for kind in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "blockzoo.server_config.serve", str(zoo), "--strict", *ports]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert all(f"model {name}: " in done.stderr for name in WHY if name != "loud"), done.stderr
