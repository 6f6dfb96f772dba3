"""GGUF files as checkpoints, against transformers' reading of them and the folders that they are of."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import K_KINDS, PLAIN, byte_vocabulary, write_gguf
from readings import assert_reads_as

from blockzoo.build.gguf_checkpoint import open_gguf
from blockzoo.build.partition import cut
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import Source, open_sources, parse_models
from blockzoo.zoo.checkpoint import open_checkpoint
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError, ZooError
from blockzoo.zoo.store import Zoo

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 300, "num_hidden_layers": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
NO_WINDOW = {"sliding_window": None}
# variant of the fixture, GGUF architecture, settings
SAME: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("llama", "llama", {}),
    "untied, biases, wide heads": ("llama-bias", "llama", {}),
    "mistral": ("mistral", "llama", NO_WINDOW),
    "qwen2": ("qwen2", "qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("qwen2", "qwen2", {}),
    "qwen3 with biases": ("qwen3", "qwen3", {}),
    "linear": ("llama", "llama", {"rope_parameters": LINEAR}),
    "yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "llama3": ("llama", "llama", {"rope_parameters": LLAMA3, "head_dim": 64}),
    "llama3 of other numbers": (
        "llama",
        "llama",
        {
            "head_dim": 64,
            "rope_parameters": LLAMA3 | {"high_freq_factor": 6.0, "original_max_position_embeddings": 1024},
        },
    ),
}


def open_one(path: Path) -> Source:
    return open_sources({"m": path}, None)[0]


def from_transformers(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture
def make_file(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """(variant, architecture, settings, **settings of write_gguf) -> a GGUF file of a random model."""

    def make(variant: str, arch: str, settings: dict[str, Any], **written: Any) -> Path:
        return write_gguf(tmp_path / "model.gguf", make_model(variant, 7, **settings), arch, **written)

    return make


@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_a_file_shares_every_block_with_the_folder_it_is_of(
    case: str, kind: str, make_model: Callable[..., Any], save: Callable[..., Path], tmp_path: Path
) -> None:
    variant, arch, settings = SAME[case]
    model = make_model(variant, 7, vocab_size=300, **settings)
    folder = save(model, tmp_path / "folder")
    file = write_gguf(tmp_path / "model.gguf", model, arch, kind)
    zoo = tmp_path / "zoo"
    compile_models({"hf": folder, "gguf": file}, zoo, CompileOptions(verify=False, profile=False))
    manifest = Zoo.open(zoo).manifest
    assert manifest.models["gguf"].chain == manifest.models["hf"].chain
    assert manifest.models["gguf"].source.format == "gguf"
    theirs, own = manifest.models["hf"].config, manifest.models["gguf"].config
    assert (own.max_length, own.tie_word_embeddings) == (theirs.max_length, theirs.tie_word_embeddings)


@pytest.mark.parametrize("kind", [*PLAIN, *K_KINDS])
def test_weights_of_every_type_are_those_of_transformers(kind: str, make_file: Callable[..., Path]) -> None:
    file = make_file("llama", "llama", WIDE, kind=kind)
    source = open_one(file)
    assert source.dtype == {"F16": "f16", "BF16": "bf16"}.get(kind, "f32")
    assert_reads_as(from_transformers(file), source)


@pytest.mark.parametrize(
    ("variant", "arch", "settings"),
    [
        ("mistral", "llama", NO_WINDOW),
        ("llama", "llama", {"tie_word_embeddings": False}),
        ("qwen2", "qwen2", {}),
        ("qwen2", "qwen2", {"tie_word_embeddings": False}),
        ("qwen3", "qwen3", {"head_dim": 128, "attention_bias": False}),
    ],
)
def test_greedy_tokens_of_quantized_files_are_those_of_transformers(
    variant: str, arch: str, settings: dict[str, Any], make_file: Callable[..., Path], tmp_path: Path
) -> None:
    import torch

    from blockzoo.runtime import LLM, SamplingParams

    kinds = {"model.embed_tokens.weight": "Q8_0", "model.layers.0.self_attn.q_proj.weight": "Q5_1"}
    file = make_file(variant, arch, {**WIDE, **settings}, kind="Q4_1", kinds=kinds)
    model = from_transformers(file)
    assert_reads_as(model, open_one(file))
    report = compile_models({"m": file}, tmp_path / "zoo", CompileOptions(profile=False))
    verified = report.models[0].verification
    assert verified is not None
    assert verified.figures["f32"].greedy_agreement == 1.0
    llm = LLM(tmp_path / "zoo", precision="f32", kv_cache_bytes=16 << 20)
    rng = np.random.default_rng(5)
    asked = [rng.integers(0, 256, length).tolist() for length in (1, 7, 33, 64)]
    greedy = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    for completion in llm.generate("m", asked, greedy, progress=False):
        given, found = list(completion.prompt), completion.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*given, *found[:-1]]])).logits[0]
        assert tuple(logits[len(given) - 1 :].argmax(-1).tolist()) == found


def test_files_with_equal_tensors_share_blocks(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("llama", 7, **WIDE)
    first = write_gguf(tmp_path / "a.gguf", model, "llama", "Q4_0")
    last = "model.layers.1.mlp.down_proj.weight"
    other = write_gguf(tmp_path / "b.gguf", model, "llama", "Q4_0", kinds={last: "Q6_K"})
    report = compile_models(
        {"a": first, "b": other}, tmp_path / "z", CompileOptions(verify=False, profile=False)
    )
    assert (report.models[1].num_blocks, report.models[1].num_reused) == (6, 5)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_is_never_whole_in_memory(
    dry_run: bool, make_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model("llama", 7, **WIDE | {"num_hidden_layers": 12})
    file = write_gguf(tmp_path / "a.gguf", model, "llama", "Q8_0")
    options = CompileOptions(verify=False, profile=False, dry_run=dry_run)
    compile_models({"a": file}, tmp_path / "warm", options)  # imports, caches
    tracemalloc.start()
    report = compile_models({"b": file}, tmp_path / "zoo", options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.models[0].new_bytes > 20 << 20
    assert peak < report.models[0].new_bytes / 2


def test_what_a_dry_run_says_of_files_is_what_happens(make_model: Callable[..., Any], tmp_path: Path) -> None:
    files = {
        name: write_gguf(tmp_path / f"{name}.gguf", make_model("llama", seed, **WIDE), "llama", "Q8_0")
        for name, seed in (("a", 7), ("b", 8), ("c", 7))
    }
    said, done = (
        compile_models(files, tmp_path / "zoo", CompileOptions(verify=False, profile=False, dry_run=dry))
        for dry in (True, False)
    )
    for dry, stored in zip(said.models, done.models, strict=True):
        assert (dry.num_reused, dry.num_recovered, dry.new_bytes) == (
            stored.num_reused,
            stored.num_recovered,
            stored.new_bytes,
        )


def test_a_lora_over_a_file(
    checkpoints: dict[str, Path],
    make_adapter: Callable[..., Any],
    make_model: Callable[..., Any],
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    file = write_gguf(
        tmp_path / "model.gguf",
        make_model("llama", 0),
        "llama",
        "Q8_0",
        extra={"llama.vocab_size": None},
        vocabulary=cut_vocabulary(288),
    )
    make_adapter(checkpoints["llama"], tmp_path / "lora")
    sources = open_sources({"chat": file, "lora": f"{tmp_path / 'lora'}@chat"}, None)
    merged = PeftModel.from_pretrained(from_transformers(file), tmp_path / "lora").merge_and_unload()
    assert_reads_as(merged, sources[1])
    models = {"chat": file, "lora": f"{tmp_path / 'lora'}@chat"}
    report = compile_models(models, tmp_path / "zoo", CompileOptions(profile=False))
    lora = report.models[1]
    assert lora.num_reused == lora.num_blocks
    assert lora.verification is not None
    assert lora.verification.figures["f32"].greedy_agreement == 1.0
    more = compile_models(
        {"again": f"{tmp_path / 'lora'}@chat"}, tmp_path / "zoo", CompileOptions(profile=False)
    )
    assert more.models[0].num_reused == lora.num_blocks


def cut_vocabulary(size: int) -> dict[str, Any]:
    given = byte_vocabulary()
    return given | {key: given[key][:size] for key in ("tokens", "token_type")}


def test_end_tokens_context_and_names(make_file: Callable[..., Path]) -> None:
    eot = byte_vocabulary()["tokens"].index("<|eot|>")
    extra = {"tokenizer.ggml.eot_token_id": eot, "tokenizer.ggml.eom_token_id": eot + 1}
    file = make_file("llama", "llama", {"vocab_size": 300}, extra=extra)
    source = open_one(file)
    assert source.end_ids == (byte_vocabulary()["eos_token_id"], eot, eot + 1)
    assert source.config.bos_token_id == byte_vocabulary()["bos_token_id"]
    assert source.config.max_position_embeddings == 512
    assert list(parse_models([str(file)])) == ["model"]
    with pytest.raises(ZooError, match="is for PEFT adapters"):
        open_sources({"m": f"{file}@base"}, None)


def test_the_chat_template_goes_into_the_zoo(make_file: Callable[..., Path], tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m.content }}</s>\n{% endfor %}"
    extra = {"tokenizer.chat_template": template}
    file = make_file("llama", "llama", {"vocab_size": 300}, extra=extra)
    compile_models({"m": file}, tmp_path / "zoo", CompileOptions(verify=False, profile=False))
    folder = Zoo.open(tmp_path / "zoo").tokenizer_dir("m")
    assert (folder / "chat_template.jinja").read_text() == template


def test_infinite_scales_are_told(make_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf_files

    def infinite(values: np.ndarray, kind: str) -> np.ndarray:
        blocks = packed(values, kind)
        if kind == "Q8_0":
            blocks[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        return blocks

    packed = gguf_files.packed
    monkeypatch.setattr(gguf_files, "packed", infinite)
    source = open_one(make_file("llama", "llama", {"vocab_size": 300}, kind="Q8_0"))
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        list(cut(source.config, source.read, None, "m"))


def test_what_the_file_leaves_out_is_as_in_llama_cpp(make_file: Callable[..., Path]) -> None:
    names = ("vocab_size", "rope.freq_base", "rope.dimension_count", "attention.head_count_kv")
    absent = {f"llama.{name}": None for name in (*names, "attention.key_length", "attention.value_length")}
    settings = {"vocab_size": 300, "num_key_value_heads": 4}
    file = make_file("llama", "llama", settings, extra=absent)
    config = open_gguf(file).config
    assert (config.vocab_size, config.head_dim, config.num_kv_heads) == (300, 16, 4)
    assert config.rope.theta == 10000.0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixture": ({"llama.expert_count": 8}, "llama.expert_count=8"),
    "window": ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window=4096"),
    "longrope": ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope'"),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8"),
    "values of another width": ({"llama.attention.value_length": 32}, "value_length is 32"),
    "bidirectional": ({"llama.attention.causal": False}, "attention.causal"),
    "attention factor": ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor without yarn"),
    "split oddly": ({"split.count": [1, 2]}, "split model"),
    "many factors": ({"llama.rope.scaling.type": ["a", "b"]}, "scaling"),
    "split": ({"split.count": 3}, "one of 3 parts .* llama-gguf-split --merge"),
    "adapter": ({"general.type": "adapter"}, "general.type 'adapter'"),
    "tokenizer": ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert'"),
    "normalizer": ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "chatglm-bpe"}, "tokenizer.ggml.pre 'chatglm-bpe'"),
}
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"llama.block_count": None}, "metadata llama.block_count: it is missing, expected a whole"),
    "layers in words": ({"llama.block_count": "three"}, "llama.block_count: seen 'three', expected a whole"),
    "heads per layer": ({"llama.attention.head_count": [4, 4, 4]}, "attention.head_count: seen .* a whole"),
    "zero": ({"llama.embedding_length": 0}, "seen 0, expected a whole number from 1"),
    "more layers than tensors": ({"llama.block_count": 4}, "layers.3.* is missing"),
    "a million layers": ({"llama.block_count": 1000000}, "at most 4096"),
    "no context": ({"llama.context_length": None}, "context_length"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon: it is missing"),
    "infinite": ({"llama.rope.freq_base": float("inf")}, "freq_base: seen inf"),
    "width": ({"llama.embedding_length": 128, "llama.attention.key_length": None}, "has shape"),
    "vocabulary": ({"llama.vocab_size": 2**31 - 1}, "has shape"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
    "merge": ({"tokenizer.ggml.merges": ["a b c"]}, "merge 'a b c'"),
    "merge of unknown tokens": ({"tokenizer.ggml.merges": ["ab cd"]}, "vocabulary is not usable"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "has 2 entries for 300 tokens"),
    "end token": ({"tokenizer.ggml.eos_token_id": 300}, "eos_token_id is 300, and there are 300"),
    "template": ({"tokenizer.chat_template": 3}, "chat_template: seen 3, expected a text"),
    "alignment": ({"general.alignment": 24}, "general.alignment is 24"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(case: str, make_file: Callable[..., Path]) -> None:
    extra, said = REFUSED[case]
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        open_one(make_file("llama", "llama", {"vocab_size": 300}, extra=extra))
    assert "model.gguf" in str(caught.value)


@pytest.mark.parametrize("case", DAMAGED)
def test_metadata_that_does_not_fit_is_told(
    case: str, make_file: Callable[..., Path], tmp_path: Path
) -> None:
    extra, said = DAMAGED[case]
    file = make_file("llama", "llama", {"vocab_size": 300}, extra=extra)
    with pytest.raises(CheckpointError, match=said) as caught:
        compile_models({"m": file}, tmp_path / "zoo", CompileOptions(verify=False, profile=False))
    assert "model.gguf" in str(caught.value)


def test_other_architectures_types_and_parts_are_refused_by_name(
    make_file: Callable[..., Path], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="architecture 'gemma2' is not supported"):
        open_one(make_file("llama", "llama", {}, extra={"general.architecture": "gemma2"}))
    model = make_model("llama", 7, **WIDE)
    path = tmp_path / "model-00001-of-00002.gguf"
    with pytest.raises(UnsupportedModelError, match="part of a split model"):
        open_one(write_gguf(path, model, "llama"))
    assert open_one(path.rename(tmp_path / "model-00001-of-00001.gguf"))


def test_yarn_with_numbers_of_its_own(make_file: Callable[..., Path]) -> None:
    extra = {
        "qwen2.rope.scaling.attn_factor": 0.5,
        "qwen2.rope.scaling.yarn_beta_fast": 16.0,
        "qwen2.rope.scaling.yarn_beta_slow": 2.0,
    }
    rope = open_gguf(make_file("qwen2", "qwen2", {"rope_parameters": YARN}, extra=extra)).config.rope
    assert (rope.beta_fast, rope.beta_slow, rope.factor) == (16.0, 2.0, 4.0)
    assert rope.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4.0) + 1))


def test_frequency_factors_of_another_kind_are_refused(
    make_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf_files

    monkeypatch.setattr(
        gguf_files, "llama3_factors", lambda rope, dim: np.geomspace(1, 9, dim // 2, dtype="f4")
    )
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight is no llama3 scaling"):
        open_one(make_file("llama", "llama", {"rope_parameters": LLAMA3, "head_dim": 64}))


def test_a_folder_names_the_file_to_give(checkpoint: Path, make_file: Callable[..., Path]) -> None:
    make_file("llama", "llama", {}).rename(checkpoint / "model.gguf")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"found model\.gguf: give that file"):
        open_checkpoint(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"found model\.gguf: give that file"):
        open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf: expected a GGUF file"):
        open_one(checkpoint / "nowhere.gguf")
