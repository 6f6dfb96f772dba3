"""What is read out of adapter folders: what PEFT or `load_adapter` of transformers takes from them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from readings import EMBED, HEAD, assert_reads_as, edit, from_transformers, rewrite

from blockzoo.build.partition import cut
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.build.sources import Source, open_sources
from blockzoo.zoo.errors import CheckpointError, UnsupportedModelError
from blockzoo.zoo.tensors import BlockTensor, from_f32

PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft


@pytest.fixture
def adapter(checkpoints: dict[str, Path], make_adapter: Callable[..., Any], tmp_path: Path) -> Path:
    make_adapter(checkpoints["llama"], tmp_path / "adapter")
    return tmp_path / "adapter"


def from_peft(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(from_transformers(base), adapter).merge_and_unload()


def from_load_adapter(base: Path, adapter: Path) -> Any:
    model = from_transformers(base)
    model.load_adapter(str(adapter))
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    return model


def open_adapted(base: Path, adapter: Path) -> Source:
    return open_sources({"base": base, "notes": f"{adapter}@base"}, None)[1]


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, BlockTensor]], dict[str, BlockTensor]]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


NAMES: dict[str, tuple[Callable[[str], str], Callable[[Path, Path], Any]]] = {
    "as PEFT saves": (lambda n: n, from_peft),
    "adapter's name": (lambda n: n.replace(".weight", ".default.weight"), from_peft),
    "no prefix": (lambda n: n.removeprefix(PREFIX), from_load_adapter),
    "mixed": (lambda n: n.removeprefix(PREFIX) if "layers.1" in n else n, from_load_adapter),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_adapter_tensors_that_are_read(
    case: str, checkpoints: dict[str, Path], adapter: Path
) -> None:
    change, load = NAMES[case]
    rewrite(adapter / "adapter_model.safetensors", renamed(change))
    source = open_adapted(checkpoints["llama"], adapter)
    assert len(source.pairs) == 6
    assert_reads_as(load(checkpoints["llama"], adapter), source)


REFUSED: dict[str, tuple[Callable[[str], str], str]] = {
    "layers": (lambda n: n.replace(PREFIX + "model.", ""), "belong to no weight"),
    "twice": (lambda n: PREFIX + n, "belong to no weight"),
    "transformer": (lambda n: n.replace(PREFIX + "model", "transformer"), "belong to no weight"),
    "another name": (lambda n: n.replace(".weight", ".other.weight"), "no part of a plain LoRA"),
    "no weight": (lambda n: n.removesuffix(".weight"), "no part of a plain LoRA"),
    "kohya": (lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "no part of a plain"),
    "embedding": (lambda n: n.replace("lora_A", "lora_embedding_A"), "no part of a plain LoRA"),
    "A missing": (lambda n: n.replace("lora_A.weight", "A"), "has lora_B, but no lora_A"),
    "B missing": (lambda n: n.replace("lora_B.weight", "B"), "has lora_A, but no lora_B"),
    "empty": (lambda n: n.replace(PREFIX + Q, ""), "no part of a plain LoRA|a LoRA of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_names_of_adapter_tensors_are_refused(
    case: str, checkpoints: dict[str, Path], adapter: Path
) -> None:
    change, said = REFUSED[case]
    rewrite(adapter / "adapter_model.safetensors", renamed(change))
    with pytest.raises(CheckpointError, match=said):
        open_adapted(checkpoints["llama"], adapter)


def test_the_same_tensor_under_two_names_is_refused(checkpoints: dict[str, Path], adapter: Path) -> None:
    def add(tensors: dict[str, BlockTensor]) -> dict[str, BlockTensor]:
        return tensors | {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}

    rewrite(adapter / "adapter_model.safetensors", add)
    with pytest.raises(CheckpointError, match="twice, under different names"):
        open_adapted(checkpoints["llama"], adapter)


TARGETS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "self_attn.v_proj"]},
    "pattern": {"target_modules": r".*self_attn\.(q|v)_proj"},
    "default": {"target_modules": None},
    "more than the file": {"target_modules": ["q_proj", "v_proj", "o_proj"]},
    "all layers": {"layers_to_transform": [0, 1, 2]},
    "no r and alpha": {"r": ..., "lora_alpha": ..., "rank_pattern": {"q_proj": 4, r"layers\.\d+.*": 4}},
    "half a pattern": {"alpha_pattern": {r"model)|((.+)+!": 3}},  # which an anchored match would hang on
    "rank-stabilized": {"use_rslora": True},
    "patterns": {
        "alpha_pattern": {r"layers.[01].self_attn.q_proj": 3, "^model.layers.2.self_attn.v_proj": 5}
    },
}


@pytest.mark.parametrize("case", TARGETS)
def test_settings_of_adapters_mean_what_they_mean_to_peft(
    case: str, checkpoints: dict[str, Path], adapter: Path
) -> None:
    edit(adapter / "adapter_config.json", **TARGETS[case])
    assert_reads_as(from_peft(checkpoints["llama"], adapter), open_adapted(checkpoints["llama"], adapter))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["v_proj"]},
        {"target_modules": r".*\.v_proj"},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 2, "layers_pattern": "layers"},
        {"exclude_modules": ["q_proj"]},
        {"exclude_modules": r".*layers\.1\..*"},
        {"modules_to_save": ["self_attn"]},
    ],
)
def test_tensors_that_peft_would_not_load_are_refused(
    changes: dict[str, Any], checkpoints: dict[str, Path], adapter: Path
) -> None:
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match="leaves out"):
        open_adapted(checkpoints["llama"], adapter)


@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("qwen2", {"bias": "all"}),
        ("llama-bias", {"bias": "lora_only", "target_modules": ["o_proj", "down_proj"]}),
        ("llama", {"modules_to_save": ["norm", "mlp"], "target_modules": ["q_proj", "up_proj"]}),
        ("qwen3", {"modules_to_save": ["lm_head", "q_norm"], "layers_to_transform": [1]}),
        ("mistral", {"exclude_modules": "model.layers.2.*", "target_modules": "all-linear"}),
    ],
)
def test_what_peft_saves_is_read_as_peft_reads_it(
    variant: str,
    settings: dict[str, Any],
    checkpoints: dict[str, Path],
    make_adapter: Callable[..., Any],
    tmp_path: Path,
) -> None:
    make_adapter(checkpoints[variant], tmp_path / "adapter", **settings)

    def train_biases(tensors: dict[str, BlockTensor]) -> dict[str, BlockTensor]:
        bias = {n: from_f32(t.to_f32() + 0.25, "bf16") for n, t in tensors.items() if n.endswith(".bias")}
        return tensors | bias

    rewrite(tmp_path / "adapter/adapter_model.safetensors", train_biases)
    source = open_adapted(checkpoints[variant], tmp_path / "adapter")
    assert_reads_as(from_peft(checkpoints[variant], tmp_path / "adapter"), source)


@pytest.mark.parametrize("saved", [None, ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("given", [(EMBED,), (HEAD,), (EMBED, HEAD)])
@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_part_where_peft_parts_them(
    saved: list[str] | None,
    given: tuple[str, ...],
    equal: bool,
    checkpoints: dict[str, Path],
    adapter: Path,
) -> None:
    values = {EMBED: 1.0, HEAD: 1.0 if equal else 2.0}
    extra = {PREFIX + n: from_f32(np.full((288, 64), values[n], np.float32), "f32") for n in given}
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors | extra)
    edit(adapter / "adapter_config.json", modules_to_save=saved)
    if saved is None and len(given) == 2 and not equal:
        with pytest.raises(CheckpointError, match="which one is meant"):
            open_adapted(checkpoints["llama"], adapter)
        return
    if saved is not None and not all(any(s in n for n in given) for s in saved):
        with pytest.raises(KeyError):
            from_peft(checkpoints["llama"], adapter)
        return
    assert_reads_as(from_peft(checkpoints["llama"], adapter), open_adapted(checkpoints["llama"], adapter))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (f"{PREFIX}{Q}.weight", (64, 64)),  # of a module with a LoRA, which PEFT calls base_layer
        (f"{PREFIX}model.layers.0.self_attn.k_proj.base_layer.weight", (32, 64)),
    ],
)
def test_replaced_tensors_that_peft_would_not_load_are_refused(
    name: str, shape: tuple[int, ...], checkpoints: dict[str, Path], adapter: Path
) -> None:
    extra = {name: from_f32(np.ones(shape, np.float32), "f32")}
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors | extra)
    with pytest.raises(CheckpointError, match="would not be loaded by PEFT"):
        open_adapted(checkpoints["llama"], adapter)


@pytest.mark.parametrize(
    ("name", "shape"), [(f"{Q}.base_layer.weight", (64, 64)), ("model.norm.weight", (64,))]
)
def test_replaced_tensors_are_read_as_peft_reads_them(
    name: str, shape: tuple[int, ...], checkpoints: dict[str, Path], adapter: Path
) -> None:
    extra = {PREFIX + name: from_f32(np.full(shape, 0.5, np.float32), "f32")}
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors | extra)
    assert_reads_as(from_peft(checkpoints["llama"], adapter), open_adapted(checkpoints["llama"], adapter))


def test_a_folder_with_a_checkpoint_and_an_adapter_is_refused(checkpoint: Path, adapter: Path) -> None:
    for file in adapter.glob("adapter_*"):
        shutil.copyfile(file, checkpoint / file.name)
    with pytest.raises(CheckpointError, match="a full checkpoint and an adapter"):
        open_sources({"m": checkpoint}, None)


def test_configurations_of_another_method_are_unsupported_not_broken(
    checkpoints: dict[str, Path], adapter: Path
) -> None:
    edit(adapter / "adapter_config.json", layers_to_transform=[0], layers_pattern=["blocks"])
    with pytest.raises(UnsupportedModelError, match="layers_pattern"):
        open_adapted(checkpoints["llama"], adapter)


@pytest.mark.parametrize("shape", [(), (288,), (288, 32), (0, 64), (288, 64, 1)])
def test_an_embedding_of_another_shape_is_refused(
    shape: tuple[int, ...], checkpoints: dict[str, Path], adapter: Path
) -> None:
    extra = {PREFIX + EMBED: BlockTensor("f32", np.ones(shape, np.float32))}
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors | extra)
    given: dict[str, str | Path] = {"base": checkpoints["llama"], "notes": f"{adapter}@base"}
    with pytest.raises(CheckpointError, match=r"has shape|vocab_size is 0"):
        compile_models(given, adapter.parent / "zoo", CompileOptions(verify=False, profile=False))


PARTS = ["", PREFIX, "model.", "layers.0.", "self_attn.", "q_proj", "mlp.", "up_proj", ".base_layer", "norm"]
PARTS += ["lm_head", "embed_tokens", ".lora_A", ".lora_B", ".lora_", ".default", ".weight", ".bias", ".", "x"]


def test_any_name_and_shape_is_read_or_refused(checkpoints: dict[str, Path], adapter: Path) -> None:
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        names = {"".join(rng.choice(PARTS, rng.integers(1, 8))) for _ in range(rng.integers(1, 4))}
        names |= {f"{PREFIX}{Q}.lora_{which}.weight" for which in "AB" if rng.random() < 0.5}
        names |= {name for name in (PREFIX + EMBED, PREFIX + HEAD) if rng.random() < 0.2}
        shapes: list[tuple[int, ...]] = [(), (0, 64), (4,), (4, 64), (64, 4), (288, 64), (64, 64)]
        tensors = {
            name: BlockTensor("f32", np.ones(shapes[rng.integers(len(shapes))], np.float32)) for name in names
        }
        rewrite(adapter / "adapter_model.safetensors", lambda _, given=tensors: given)
        try:
            source = open_sources({"base": checkpoints["llama"], "notes": f"{adapter}@base"}, None)[1]
            for _ in cut(source.config, source.read, None, "here"):
                pass
        except CheckpointError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_alpha": -float("inf")}, "lora_alpha=-inf"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_alpha": 1e300}, "beyond float32"),
        ({"lora_alpha": True}, "lora_alpha=True"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "lora_alpha=nan"),
        ({"r": 10**400}, r"lora_A \[4, 64\]"),
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": True}, "r=True"),
        ({"r": 1e300}, r"r=1e\+300"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: .* is no regular expression"),
        ({"rank_pattern": {r"([a-z_.0-9]+)+!": 4}}, "rank_pattern: .* takes more than 2 s"),
        ({"target_modules": r"((a+)+)+$|(.+)+!"}, "target_modules: .* takes more than 2 s"),
        ({"target_modules": [["q_proj"]]}, "target_modules must be a list of names"),
        ({"modules_to_save": "q_proj"}, "modules_to_save must be a list of names"),
    ],
)
def test_hostile_settings_of_adapters_are_named_errors(
    changes: dict[str, Any], said: str, checkpoints: dict[str, Path], adapter: Path
) -> None:
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=said):
        open_adapted(checkpoints["llama"], adapter)


def test_a_lora_of_absurd_rank_is_refused(
    checkpoints: dict[str, Path], make_adapter: Callable[..., Any], adapter: Path, tmp_path: Path
) -> None:
    make_adapter(checkpoints["llama"], tmp_path / "large", r=513, target_modules=["v_proj"])
    with pytest.raises(CheckpointError, match="has rank 513, and adapters have at most rank 512"):
        open_adapted(checkpoints["llama"], tmp_path / "large")
    make_adapter(checkpoints["llama"], tmp_path / "fits", r=512, target_modules=["v_proj"])
    assert open_adapted(checkpoints["llama"], tmp_path / "fits").pairs
    with pytest.raises(CheckpointError, match="has rank 516 with those of its base"):
        open_sources(
            {
                "base": checkpoints["llama"],
                "first": f"{adapter}@base",
                "second": f"{tmp_path / 'fits'}@first",
            },
            None,
        )
