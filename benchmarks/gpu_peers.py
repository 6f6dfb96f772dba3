"""Side-by-side peers of benchmarks.gpu: transformers, torch.compile, FlashInfer, TensorRT-RTX."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.random_chains import hf_config
from blockzoo.engines.base import PAGE_TOKENS, EngineError
from blockzoo.zoo.blocks import AttnSpec, chain_specs
from blockzoo.zoo.model_config import ModelConfig

Facts = dict[str, Any]


def transformers_decode(bench: Any, shape: str) -> Facts:
    """Batch 1 decode of transformers' model of the shape, eager and under torch.compile, static cache."""
    if importlib.util.find_spec("transformers") is None:
        return {"skipped": "transformers is not installed"}
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
    cache = transformers.StaticCache(config=config, max_cache_len=past + 64)
    facts: Facts = {"transformers": transformers.__version__}
    with torch.inference_mode():
        model(ids, past_key_values=cache, cache_position=torch.arange(past, device=bench.device))
        at = torch.tensor([past], device=bench.device)

        def step(forward: Callable[..., Any]) -> Any:
            return forward(ids[:, :1], past_key_values=cache, cache_position=at, position_ids=at[None])

        facts["eager_step_ms"] = bench.seconds(lambda: step(model), 4) * 1e3
        if bench.on_gpu:
            compiled = torch.compile(model, mode="reduce-overhead")
            facts["compiled_step_ms"] = bench.seconds(lambda: step(compiled), 4) * 1e3
    return facts


def decode_attention(bench: Any, shape: str) -> Facts:
    """Our attention alone, 8 decode rows over 4096 tokens of pages each; FlashInfer where it is installed."""
    if not bench.on_gpu:
        return {"skipped": "the kernels need a GPU"}
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
    facts = {"us": seconds * 1e6, "share_of_copy_bandwidth": rate / bench.ceilings["copy_bytes_per_s"]}
    if importlib.util.find_spec("flashinfer") is None:
        return facts | {"flashinfer": "not installed"}
    import flashinfer

    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=bench.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND")
    full = torch.full((seqs,), PAGE_TOKENS, dtype=torch.int32, device=bench.device)
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, PAGE_TOKENS)
    wrapper.plan(inputs["block_indices_begins"], ids, full, *sizes, q_data_type=torch.bfloat16)
    q = qkv[:, : spec.num_heads * spec.head_dim].reshape(seqs, spec.num_heads, spec.head_dim).contiguous()
    theirs = bench.seconds(lambda: wrapper.run(q, (keys, values)), 50)
    return facts | {"flashinfer_us": theirs * 1e6}


def tensorrt_plans(bench: Any, shape: str) -> Facts:
    """Decode and prefill through TensorRT plans built for this card."""
    if not bench.on_gpu:
        return {"skipped": "TensorRT runs plans on an NVIDIA GPU only"}
    if importlib.util.find_spec("onnx") is None:
        return {"skipped": "onnx is not installed: plans are built from ONNX networks"}
    from benchmarks.gpu_plans import plans

    return plans(bench, shape)


def tensorrt_rtx_trial(bench: Any, shape: str) -> Facts:
    """Whether TensorRT-RTX builds and loads a plan for this card: its own words when it does not."""
    if not bench.on_gpu:
        return {"skipped": "needs a GPU"}
    missing = [name for name in ("tensorrt_rtx", "onnx") if importlib.util.find_spec(name) is None]
    if missing:
        return {"skipped": f"{' and '.join(missing)} not installed"}
    from blockzoo.engines.tensorrt.builder import PlanBuilder
    from blockzoo.engines.tensorrt.plans import plan_requests
    from blockzoo.engines.tensorrt.shim import load_tensorrt, native_target
    from blockzoo.zoo.blocks import FfnSpec

    library = load_tensorrt("tensorrt_rtx")
    config = hf_config(shape)
    spec = FfnSpec(config["hidden_size"], config["intermediate_size"], 1e-5, False)
    facts: Facts = {"library": library.title, "gpu": native_target()}
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
    return facts


PEERS: dict[str, Callable[[Any, str], Facts]] = {
    "transformers": transformers_decode,
    "attention": decode_attention,
    "plans": tensorrt_plans,
    "tensorrt_rtx": tensorrt_rtx_trial,
}
