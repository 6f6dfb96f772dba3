"""Manifest -> model repository: configuration text, names, settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockzoo.server_config import repository
from blockzoo.server_config.repository import (
    RESERVED_NAMES,
    ServerSettings,
    check_name,
    configurations,
    write_repository,
)
from blockzoo.server_config.serve import main
from blockzoo.zoo.errors import ZooError

SETTINGS = ServerSettings("/zoos/mine", {"max_num_seqs": 8}, 5.0, None)


def test_every_model_has_a_configuration_of_its_name():
    texts = configurations(("chat", "code"), SETTINGS)
    assert set(texts) == {*RESERVED_NAMES, "chat", "code"}
    for name, text in texts.items():
        assert f'name: "{name}"\n' in text
        assert text.count("{") == text.count("}")


def test_only_the_engine_is_decoupled_and_there_is_one_of_it():
    texts = configurations(("chat",), SETTINGS)
    assert [name for name, text in texts.items() if "decoupled: true" in text] == ["blockzoo"]
    assert "count: 1" in texts["blockzoo"]


def test_an_ensemble_maps_its_text_to_the_input_that_names_the_tenant():
    text = configurations(("chat", "code"), SETTINGS)["chat"]
    assert 'input_map { key: "text_input@chat" value: "text_input" }' in text
    assert re.findall(r'model_name: "(\w+)"', text) == ["preprocessing", "blockzoo", "postprocessing"]


def test_preprocessing_has_an_optional_input_per_tenant():
    text = configurations(("chat", "code"), SETTINGS)["preprocessing"]
    assert re.findall(r'name: "(text_input@\w+)".*optional: true', text) == [
        "text_input@chat",
        "text_input@code",
    ]


@pytest.mark.parametrize("zoo", ['/a "quoted" \\path', "/zażółć/🐢", "/new\nline"])
def test_settings_come_through_the_configuration(zoo):
    settings = ServerSettings(zoo, {"kv_cache_bytes": 1 << 30, "precision": "f32"}, 2.5, "/run/x")
    text = configurations(("chat",), settings)["blockzoo"]
    assert text.isascii()
    # what Triton's parser makes of the text: pbtxt strings escape as JSON's do here
    value = json.loads(re.search(r'string_value: (".*") \}', text)[1])
    config = json.dumps({"parameters": {"settings": {"string_value": value}}})
    assert ServerSettings.of_model({"model_config": config}) == settings


@pytest.mark.parametrize("name", ["chat", "Llama-3.1_8B.v2", "7b", "a" * 128])
def test_good_names(name):
    check_name(name)


@pytest.mark.parametrize(
    "name", ["", "a b", "a/b", ".hidden", "-x", "żółw", "a" * 129, "a@b", 'a"b', "..", "a\n"]
)
def test_names_that_triton_cannot_serve(name):
    with pytest.raises(ZooError, match="cannot be a Triton model name; compile it under"):
        check_name(name)


@pytest.mark.parametrize("name", RESERVED_NAMES)
def test_names_that_are_taken(name):
    with pytest.raises(ZooError, match="has the name of a server model"):
        check_name(name)


@pytest.fixture
def tiny_manifest(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    manifest = SimpleNamespace(models={"chat": None, "code": None})
    opened = SimpleNamespace(manifest=manifest, path=Path("/zoos/mine"))
    monkeypatch.setattr(repository, "Zoo", SimpleNamespace(open=lambda path: opened))
    return manifest


def test_the_repository_on_disk(tiny_manifest, tmp_path):
    assert write_repository(tmp_path / "models", SETTINGS) == ("chat", "code")
    files = {str(p.relative_to(tmp_path / "models")) for p in (tmp_path / "models").rglob("*") if p.is_file()}
    assert files == {f"{name}/config.pbtxt" for name in (*RESERVED_NAMES, "chat", "code")} | {
        f"{name}/1/model.py" for name in RESERVED_NAMES
    }
    assert (tmp_path / "models" / "chat" / "1").is_dir()  # an ensemble needs an empty version folder


def test_a_folder_that_holds_something_is_left_alone(tiny_manifest, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ZooError, match="is not empty; name a new folder"):
        write_repository(tmp_path, SETTINGS)


def test_a_zoo_without_models_is_refused(tiny_manifest, tmp_path):
    tiny_manifest.models.clear()
    with pytest.raises(ZooError, match="holds no models; add one with zoo-compile"):
        write_repository(tmp_path / "models", SETTINGS)


def test_write_only_writes_the_repository_and_prints_the_command(demo_zoo, tmp_path, capsys):
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models"), "--kv-cache-gb", "0.5"]) == 0
    out = capsys.readouterr().out
    assert f"--model-repository={tmp_path / 'models'}" in out
    assert '"kv_cache_bytes\\": 536870912' in (tmp_path / "models" / "blockzoo" / "config.pbtxt").read_text()
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models")]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_no_model_batches_in_triton():
    texts = configurations(["chat"], ServerSettings("/zoo")).values()
    assert all("max_batch_size: 1\n" in text for text in texts)
    assert not any("dynamic_batching" in text for text in texts)
