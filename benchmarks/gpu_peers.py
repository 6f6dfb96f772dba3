"""Side-by-side peers of benchmarks.gpu: transformers, torch.compile, FlashInfer, TensorRT-LLM, TensorRT."""

from __future__ import annotations

import importlib.util
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts import Bench, Facts
from benchmarks.random_chains import hf_config
from blockzoo.engines.base import PAGE_TOKENS, EngineError
from blockzoo.zoo.blocks import AttnSpec, chain_specs
from blockzoo.zoo.model_config import ModelConfig

_TENSORRT_LLM_SECONDS = 280  # with loading, compiling and recording


def transformers_decode(bench: Bench, shape: str, facts: Facts) -> None:
    """Batch 1 decode of transformers' model of the shape, eager and under torch.compile, static cache."""
    if importlib.util.find_spec("transformers") is None:
        facts["skipped"] = "transformers is not installed"
        return
    import transformers

    past = 512 if bench.on_gpu else 40
    config = transformers.LlamaConfig(
        **{k: v for k, v in hf_config(shape).items() if k not in ("model_type", "rope_theta")}
    )
    dtype = torch.bfloat16 if bench.on_gpu else torch.float32
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(bench.device):
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    ids = torch.randint(0, config.vocab_size, (1, past), device=bench.device)
    facts["transformers"] = transformers.__version__
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def step_ms(forward: Callable[..., Any]) -> float:
        # the cache counts what it is given: every step goes one further, and none may leave it
        cache = transformers.StaticCache(config=config, max_cache_len=past + bench.num_runs(4) + 1)
        model(ids, **{name: cache})
        return bench.seconds(lambda: forward(ids[:, :1], **{name: cache}), 4) * 1e3

    with torch.inference_mode():
        facts["eager_step_ms"] = step_ms(model)
        if bench.on_gpu:
            facts["compiled_step_ms"] = step_ms(torch.compile(model, mode="reduce-overhead"))


def decode_attention(bench: Bench, shape: str, facts: Facts) -> None:
    """Our attention alone, 8 decode rows over 4096 tokens of pages each; FlashInfer where it is installed."""
    if not bench.on_gpu:
        facts["skipped"] = "the kernels need a GPU"
        return
    from blockzoo.engines.tensorrt.attention import PagedAttention

    spec = next(
        s for s in chain_specs(ModelConfig.from_hf(hf_config(shape), None)) if isinstance(s, AttnSpec)
    )
    seqs, length = 8, 4096
    pages = length // PAGE_TOKENS
    ids = torch.randperm(seqs * pages, device=bench.device).int()
    pool = (seqs * pages, spec.num_kv_heads, PAGE_TOKENS, spec.head_dim)
    keys, values = (torch.randn(pool, device=bench.device).bfloat16() for _ in range(2))
    inputs = {
        "key_cache": keys,
        "value_cache": values,
        "past_lens": torch.full((seqs,), length - 1, dtype=torch.int32, device=bench.device),
        "subsequence_begins": torch.arange(seqs + 1, dtype=torch.int32, device=bench.device),
        "block_indices_begins": torch.arange(seqs + 1, dtype=torch.int32, device=bench.device) * pages,
    }
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = torch.randn(seqs, width, device=bench.device).bfloat16()
    processors = torch.cuda.get_device_properties(bench.device).multi_processor_count
    ours = PagedAttention(processors)
    seconds = bench.seconds(lambda: ours.rotated(qkv, inputs, ids, spec), 50)
    rate = (keys.nbytes + values.nbytes) / seconds
    facts["us"] = seconds * 1e6
    facts["share_of_copy_bandwidth"] = rate / bench.ceilings["copy_bytes_per_s"]
    if importlib.util.find_spec("flashinfer") is None:
        facts["flashinfer"] = "not installed"
        return
    import flashinfer

    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)
    # its other decode kernels take groups of 1, 2, 4 and 8 heads only
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    full = torch.full((seqs,), PAGE_TOKENS, dtype=torch.int32, device=bench.device)
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, PAGE_TOKENS)
    wrapper.plan(inputs["block_indices_begins"], ids, full, *sizes, q_data_type=torch.bfloat16)
    q = qkv[:, : spec.num_heads * spec.head_dim].reshape(seqs, spec.num_heads, spec.head_dim).contiguous()
    facts["flashinfer_us"] = bench.seconds(lambda: wrapper.run(q, (keys, values)), 50) * 1e6


def tensorrt_llm_decode(bench: Bench, shape: str, facts: Facts) -> None:
    """TensorRT-LLM serving a model of the shape, random weights, in its own environment."""
    if bench.tensorrt_llm is None and importlib.util.find_spec("tensorrt_llm") is None:
        facts["skipped"] = "not installed here: --tensorrt-llm names the Python of its environment"
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(shape) | {"torch_dtype": "bfloat16"}))
        command = [bench.tensorrt_llm or sys.executable, "-m", "benchmarks.peers.tensorrt_llm"]
        command += ["--model", folder, "--random-weights", "--out", folder]
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
            timeout=_TENSORRT_LLM_SECONDS,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        for name, value in json.loads((Path(folder) / "tensorrt_llm.json").read_text()).items():
            facts[name] = value


def _no_plans(bench: Bench) -> str | None:
    """Why plans cannot be built and run here, or None."""
    if not bench.on_gpu:
        return "TensorRT runs plans on an NVIDIA GPU only"
    if importlib.util.find_spec("onnx") is None:
        return "onnx is not installed: plans are built from ONNX networks"
    return None


def tensorrt_plans(bench: Bench, shape: str, facts: Facts) -> None:
    """Decode and prefill through TensorRT plans built for this card."""
    if (reason := _no_plans(bench)) is not None:
        facts["skipped"] = reason
        return
    from benchmarks.gpu_plans import plans

    plans(bench, shape, facts)


def tensorrt_adapters(bench: Bench, shape: str, facts: Facts) -> None:
    """Adapters in the masked form inside TensorRT plans."""
    if (reason := _no_plans(bench)) is not None:
        facts["skipped"] = reason
        return
    from benchmarks.gpu_plans import plans_with_adapters

    plans_with_adapters(bench, shape, facts)


def tensorrt_rtx_trial(bench: Bench, shape: str, facts: Facts) -> None:
    """Whether TensorRT-RTX builds and loads a plan for this card: its own words when it does not."""
    if not bench.on_gpu:
        facts["skipped"] = "needs a GPU"
        return
    missing = [name for name in ("tensorrt_rtx", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        facts["skipped"] = f"{' and '.join(missing)} not installed"
        return
    from blockzoo.engines.tensorrt.builder import PlanBuilder
    from blockzoo.engines.tensorrt.plans import plan_requests
    from blockzoo.engines.tensorrt.shim import load_tensorrt, native_target
    from blockzoo.zoo.blocks import FfnSpec

    library = load_tensorrt("tensorrt_rtx")
    config = hf_config(shape)
    spec = FfnSpec(config["hidden_size"], config["intermediate_size"], 1e-5, False)
    facts |= {"library": library.title, "gpu": native_target()}
    # sm80: in case that it loads plans of an older target, where it knows none of this card's
    for target in (native_target() or "", "sm80"):
        (request,) = plan_requests(spec, "bf16", target, "tensorrt_rtx", library.version)
        try:
            content, _ = PlanBuilder(library).build(request)
        except EngineError as error:
            facts[target] = str(error)
            continue
        log = library.logger()
        engine = library.module.Runtime(log.native).deserialize_cuda_engine(content)
        facts[target] = {"plan_bytes": len(content), "loads": engine is not None, "said": log.messages[-3:]}


PEERS: dict[str, Callable[[Bench, str, Facts], None]] = {
    "attention": decode_attention,
    "plans": tensorrt_plans,
    "transformers": transformers_decode,
    "tensorrt_rtx": tensorrt_rtx_trial,
    "tensorrt_llm": tensorrt_llm_decode,
    "plans_adapters": tensorrt_adapters,
}
