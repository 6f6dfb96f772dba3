"""Chat templates and sampling defaults on their way from folders into the zoo."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.errors import CheckpointError, ManifestError, ZooError
from blockzoo.zoo.manifest import Manifest
from blockzoo.zoo.store import Zoo

FAST = CompileOptions(verify=False, profile=False)
MESSAGES = [{"role": "user", "content": "Hello"}]
CONFIG, FILE, TOOLS = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)
SHOWN = " {{ bos_token }} {{ eos_token }} {{ messages[0].content }}"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of peft


@pytest.fixture
def adapter(checkpoints: dict[str, Path], make_adapter: Callable[..., Any], tmp_path: Path) -> Path:
    make_adapter(checkpoints["llama"], tmp_path / "adapter")
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))
    return tmp_path / "adapter"


def put(folder: Path, files: Mapping[str, Any]) -> None:
    """Write texts, and JSON objects over what is there already."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(content, str):
            content = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content)
        path.write_text(content)


def rendered(zoo: Zoo, model: str, tools: Any = None) -> str | None:
    template = Tokenizer.load(zoo.tokenizer_dir(model)).chat_template
    return None if template is None else template.render(MESSAGES, tools=tools)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # files of the base, files of the adapter, and whose templates the adapter has
    "the base's file": ({FILE: "B" + SHOWN}, {}, "base"),
    "the base's settings": ({CONFIG: {"chat_template": "B" + SHOWN, "eos_token": "</s>"}}, {}, "base"),
    "a file alone": ({CONFIG: {"eos_token": "</s>", "chat_template": "B"}}, {FILE: "A" + SHOWN}, "adapter"),
    "a file where the base has none": ({CONFIG: {"eos_token": "</s>"}}, {FILE: "A" + SHOWN}, "adapter"),
    "settings against a file": ({FILE: "B"}, {CONFIG: {"chat_template": "A" + SHOWN}}, "adapter"),
    "a file against one for tools": ({FILE: "B", TOOLS: "BT"}, {FILE: "A" + SHOWN}, "adapter"),
    "one for tools": ({FILE: "B"}, {FILE: "A" + SHOWN, TOOLS: "AT" + SHOWN}, "adapter"),
    "settings without": (
        {CONFIG: {"chat_template": "B" + SHOWN, "bos_token": "<s>"}},
        {CONFIG: {"eos_token": "<end>"}},
        "base",
    ),
    "other end token": ({FILE: "B" + SHOWN}, {"special_tokens_map.json": {"eos_token": "<end>"}}, "base"),
    "named ones": (
        {CONFIG: {"chat_template": [{"name": n, "template": n + SHOWN} for n in ("default", "tool_use")]}},
        {"added_tokens.json": {"<tool>": 258}},
        "base",
    ),
    "none": ({}, {}, "base"),
}


@pytest.mark.parametrize("whole", [False, True], ids=["over the base", "tokenizer of its own"])
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_has_its_own_templates_or_its_bases(
    name: str, whole: bool, adapter: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    of_base, of_adapter, owner = CASES[name]
    put(checkpoint, of_base)
    if whole:  # as save_pretrained leaves it beside the weights; templates of the base are left out
        shutil.copy(checkpoint / "tokenizer.json", adapter)
        if (checkpoint / CONFIG).exists():
            kept = json.loads((checkpoint / CONFIG).read_text())
            kept.pop("chat_template", None)
            put(adapter, {CONFIG: kept})
    put(adapter, of_adapter)
    compile_models({"base": checkpoint}, tmp_path / "zoo", FAST)
    compile_models({"notes": adapter}, tmp_path / "zoo", FAST)
    zoo = Zoo.open(tmp_path / "zoo")
    for model in ("base", "notes"):
        zoo.tokenizer_dir(model)
    both = tmp_path / "both"
    shutil.copytree(checkpoint, both)
    if owner == "adapter":
        for file in (FILE, TOOLS):
            (both / file).unlink(missing_ok=True)
    put(both, of_adapter)
    for model, folder in (("base", checkpoint), ("notes", both)):
        oracle = AutoTokenizer.from_pretrained(folder)
        for tools in (None, []):
            expected = None
            if oracle.chat_template is not None:
                expected = oracle.apply_chat_template(
                    MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True
                )
            assert rendered(zoo, model, tools) == expected
    assert (rendered(zoo, "notes") or "")[:1] == {"base": (rendered(zoo, "base") or "")[:1]}.get(owner, "A")


def test_tokens_that_a_class_has_by_itself_are_variables(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    put(checkpoint, {CONFIG: {"tokenizer_class": "GPT2Tokenizer"}, FILE: SHOWN})
    compile_models({"base": checkpoint}, tmp_path / "zoo", FAST)
    expected = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(MESSAGES, tokenize=False)
    assert "<|endoftext|> <|endoftext|>" in expected
    assert rendered(Zoo.open(tmp_path / "zoo"), "base") == expected


def test_a_damaged_template_is_named(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    put(adapter, {CONFIG: {"chat_template": 3}})
    with pytest.raises(CheckpointError, match=r"adapter: chat_template of tokenizer_config.json is .*3"):
        compile_models({"base": checkpoint, "notes": adapter}, tmp_path / "zoo", FAST)
    (checkpoint / FILE).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8"):
        compile_models({"base": checkpoint}, tmp_path / "zoo", FAST)


def test_sampling_defaults_are_kept_and_an_adapter_changes_them(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    of_base = {
        "temperature": 0.7,
        "top_p": 1,
        "top_k": 20.0,
        "max_length": 5,
        "do_sample": True,
        "min_p": None,
    }
    put(checkpoint, {"generation_config.json": of_base})
    compile_models({"base": checkpoint}, tmp_path / "zoo", FAST)
    put(adapter, {"generation_config.json": {"repetition_penalty": 1.1, "top_k": 5}})
    compile_models({"notes": adapter}, tmp_path / "zoo", FAST)
    models = Zoo.open(tmp_path / "zoo").manifest.models
    assert models["base"].generation_defaults == {"temperature": 0.7, "top_p": 1.0, "top_k": 20}
    assert models["notes"].generation_defaults == {
        **{"temperature": 0.7, "top_p": 1.0, "top_k": 5},
        "repetition_penalty": 1.1,
    }
    put(adapter, {"generation_config.json": {"do_sample": False}})
    with pytest.raises(ZooError, match="notes is in the zoo with other content"):
        compile_models({"notes": adapter}, tmp_path / "zoo", FAST)
    compile_models({"greedy": adapter}, tmp_path / "zoo", FAST)
    greedy = Zoo.open(tmp_path / "zoo").manifest.models["greedy"].generation_defaults
    assert greedy is not None
    assert greedy["temperature"] == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1}, "temperature is -1; expected a number from 0 to 100"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": True}, "top_p is True"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"top_k": float("inf")}, "top_k is inf"),
        ({"min_p": float("nan")}, "min_p is nan"),
    ],
)
def test_sampling_defaults_out_of_range_are_named(
    settings: dict[str, Any], said: str, checkpoint: Path, tmp_path: Path
) -> None:
    put(checkpoint, {"generation_config.json": settings})
    with pytest.raises(CheckpointError, match=f"generation_config.json: {said}"):
        compile_models({"base": checkpoint}, tmp_path / "zoo", FAST)


def test_a_manifest_without_them_is_read_and_one_with_bad_ones_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    put(checkpoint, {"generation_config.json": {"temperature": 0.5}})
    compile_models({"base": checkpoint}, tmp_path / "zoo", FAST)
    value = json.loads((tmp_path / "zoo/manifest.json").read_text())
    record = value["models"]["base"]
    assert record.pop("generation_defaults") == {"temperature": 0.5}
    assert Manifest.from_text(json.dumps(value)).models["base"].generation_defaults is None
    record["generation_defaults"] = {"temperature": -1}
    with pytest.raises(ManifestError, match=r"models.base: temperature is -1"):
        Manifest.from_text(json.dumps(value))
