"""Manifest -> model repository: configuration text, names, settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockzoo.runtime import EngineConfig
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


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ([], "127.0.0.1:8001"),
        (["--grpc-port", "9001", "--host", "0.0.0.0"], "127.0.0.1:9001"),
        (["--host", "10.0.0.5"], "10.0.0.5:8001"),
    ],
)
def test_the_models_are_told_where_the_servers_grpc_is(demo_zoo, tmp_path, options, target):
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models"), *options]) == 0
    assert (
        f'\\"grpc\\": \\"{target}\\"' in (tmp_path / "models" / "blockzoo_unary" / "config.pbtxt").read_text()
    )


def test_a_repository_cannot_be_written_for_any_free_port(demo_zoo, tmp_path, capsys):
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models"), "--grpc-port", "0"]) == 1
    said = capsys.readouterr().err
    assert "--grpc-port is 0; --write-only needs the port that the server will have" in said


def test_no_model_batches_in_triton():
    texts = configurations(["chat"], ServerSettings("/zoo")).values()
    assert all("max_batch_size: 1\n" in text for text in texts)
    assert not any("dynamic_batching" in text for text in texts)


def test_weights_of_tenants_reach_the_engine_and_unknown_ones_are_named(demo_zoo, tmp_path, capsys):
    options = ["--tenant-weight", "base=2", "--tenant-weight", "a=b=0.5", "--max-step-seconds", "0.2"]
    options += ["--kv-reuse", "on-request", "--kv-recompute", "0.25", "--kv-guard", "0.1"]
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models"), *options]) == 0
    said = capsys.readouterr().err
    assert "--tenant-weight a=b: " in said
    assert "--tenant-weight base" not in said
    text = (tmp_path / "models" / "blockzoo" / "config.pbtxt").read_text()
    settings = ServerSettings.of_model(
        {"model_config": json.dumps({"parameters": {"settings": {"string_value": _settings_text(text)}}})}
    )
    engine = EngineConfig(**settings.engine)
    assert engine.tenant_weights == {"base": 2.0, "a=b": 0.5}
    assert engine.max_step_seconds == 0.2
    assert (engine.kv_reuse, engine.approximate.recompute) == ("exact", 0.25)
    assert engine.approximate.guard == 0.1


@pytest.mark.parametrize("wrong", ["base", "=2", "base=", "base=two"])
def test_a_weight_that_is_none_is_refused(demo_zoo, wrong, capsys):
    with pytest.raises(SystemExit):
        main([str(demo_zoo), "--tenant-weight", wrong])
    assert "expected a model and a number, as legal=2" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["base=0", "base=nan", "base=1e9"])
def test_a_weight_out_of_range_is_refused(demo_zoo, tmp_path, wrong, capsys):
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models"), "--tenant-weight", wrong]) == 1
    assert "tenant_weights['base'] is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--kv-recompute", "0.2"], "add one of them"),
        (["--kv-reuse", "exact", "--kv-recompute", "0.2"], "add one of them"),
        (["--kv-reuse", "approx", "--kv-recompute", "20"], "recompute is 20.0; expected 0 to 1"),
        (["--kv-reuse", "approx", "--kv-recompute", "nan"], "recompute is nan; expected 0 to 1"),
        (["--kv-guard", "0.2"], "add one of them"),
        (["--kv-reuse", "approx", "--kv-guard", "nan"], "guard is nan; expected at least 0"),
    ],
)
def test_a_share_to_compute_anew_that_is_none_is_refused(demo_zoo, tmp_path, options, told, capsys):
    assert main([str(demo_zoo), "--write-only", str(tmp_path / "models"), *options]) == 1
    assert told in capsys.readouterr().err


def _settings_text(config: str) -> str:
    """The parameter `settings` of a config.pbtxt."""
    quoted = config.split('key: "settings" value: { string_value: ')[1].split(" } }\n")[0]
    return json.loads(quoted)
