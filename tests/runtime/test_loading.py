"""What a zoo must be to be loaded."""

import json
import shutil
from pathlib import Path

import pytest

from blockzoo.runtime import LLM
from blockzoo.zoo.errors import ManifestError, StoreError
from blockzoo.zoo.store import Zoo


def test_a_tokenizer_that_was_changed_is_not_served(demo_zoo: Path, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(demo_zoo, tmp_path / "zoo"))
    file = Zoo.open(zoo).tokenizer_dir("base") / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(StoreError, match="not what was compiled"):
        LLM(zoo, kv_cache_bytes=16 << 20)


def test_a_tokenizer_outside_the_zoo_is_not_served(demo_zoo: Path, tmp_path: Path) -> None:
    zoo = Path(shutil.copytree(demo_zoo, tmp_path / "zoo"))
    manifest = json.loads((zoo / "manifest.json").read_text())
    manifest["models"]["base"]["tokenizer"] = "../../other/" + manifest["models"]["base"]["tokenizer"]
    (zoo / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=r"models\.base\.tokenizer: .* is no name of a file"):
        LLM(zoo, kv_cache_bytes=16 << 20)
