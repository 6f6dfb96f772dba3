"""The zoo directory: what readers check, what a writer leaves behind."""

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import blockzoo.zoo.writer
from blockzoo.zoo.blocks import EmbedSpec, FfnSpec, HeadSpec, chain_specs, tensor_shapes
from blockzoo.zoo.errors import ManifestError, StoreError
from blockzoo.zoo.fingerprint import block_id
from blockzoo.zoo.manifest import BlockRecord, Manifest, ModelRecord, PlanRecord, SourceRecord
from blockzoo.zoo.model_config import ModelConfig
from blockzoo.zoo.store import Zoo, block_path
from blockzoo.zoo.tensors import BlockTensor, from_f32
from blockzoo.zoo.writer import ZooWriter

CONFIG = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)


def fill(writer: ZooWriter, seed: int = 0) -> Manifest:
    """Store a random one-layer model named m; its manifest, not committed."""
    rng = np.random.default_rng(seed)
    manifest = Manifest(models=dict(writer.manifest.models))
    chain: list[str] = []
    for spec in chain_specs(CONFIG):
        tensors: dict[str, BlockTensor] = {
            name: from_f32(rng.standard_normal(shape), "bf16") for name, shape in tensor_shapes(spec).items()
        }
        tied_to = chain[0] if isinstance(spec, HeadSpec) else None
        chain.append(block_id(spec, tensors, tied_to))
        writer.add_block(chain[-1], tensors, {})
        manifest.plans[spec.kind] = PlanRecord("openvino", spec, "bf16", (), {})
        num_bytes = sum(tensor.data.nbytes for tensor in tensors.values())
        record = BlockRecord(spec, "bf16", num_bytes, tied_to, spec.kind, None, None)
        manifest.blocks[chain[-1]] = record
    tokenizer = writer.add_tokenizer({"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"})
    source = SourceRecord("hf", "m", "bf16", None, None)
    manifest.models["m"] = ModelRecord(CONFIG, tuple(chain), tokenizer, source, None)
    return manifest


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    with ZooWriter(tmp_path / "zoo") as writer:
        writer.commit(fill(writer))
    return tmp_path / "zoo"


def test_round_trip(zoo: Path) -> None:
    opened = Zoo.open(zoo)
    chain = opened.manifest.models["m"].chain
    embed, attn, ffn, head = (opened.read_block(block) for block in chain)
    assert isinstance(embed.spec, EmbedSpec)
    assert isinstance(ffn.spec, FfnSpec)
    assert list(attn.tensors) == ["norm", "q", "k", "v", "o"]
    np.testing.assert_array_equal(head.tensors["weight"].data, embed.tensors["weight"].data)
    assert not attn.tensors["q"].data.flags.owndata
    before = attn.tensors["q"].data.copy()
    attn.drop_pages()
    np.testing.assert_array_equal(attn.tensors["q"].data, before)
    assert sorted(p.name for p in opened.tokenizer_dir("m").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "other"])
def test_damaged_blocks_are_found(zoo: Path, damage: str) -> None:
    opened = Zoo.open(zoo)
    chain = opened.manifest.models["m"].chain
    path = block_path(zoo, chain[1])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        other = block_path(zoo, chain[2]).read_bytes()
        path.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "other": other}[damage])
    with pytest.raises(StoreError, match="missing" if damage == "missing" else "corrupt") as caught:
        opened.read_block(chain[1])
    assert str(path) in str(caught.value)
    opened.read_block(chain[2])


def test_the_checksum_is_verified_once_per_process(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Zoo.open(zoo)
    block = opened.manifest.models["m"].chain[1]
    opened.read_block(block)
    monkeypatch.setattr("blockzoo.zoo.store.compute_block_id", lambda *_: pytest.fail("read again"))
    opened.read_block(block)


def test_blocks_may_be_read_from_many_threads(zoo: Path) -> None:
    opened, problems = Zoo.open(zoo), []

    def read() -> None:
        try:
            for block in opened.manifest.models["m"].chain:
                opened.read_block(block)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_changed_tokenizer_is_found(zoo: Path) -> None:
    file = Zoo.open(zoo).tokenizer_dir("m") / "tokenizer.json"
    file.write_text("[]")
    with pytest.raises(StoreError, match="not what was compiled"):
        Zoo.open(zoo).tokenizer_dir("m")
    file.write_text("{}")
    extra = file.with_name("chat_template.jinja")
    extra.write_text("")
    with pytest.raises(StoreError, match="not what was compiled"):
        Zoo.open(zoo).tokenizer_dir("m")
    extra.unlink()
    os.mkfifo(extra)
    with pytest.raises(StoreError, match="is no regular file"):
        Zoo.open(zoo).tokenizer_dir("m")
    file.unlink()
    with pytest.raises(StoreError, match="missing"):
        Zoo.open(zoo).tokenizer_dir("m")


def test_what_is_no_zoo_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="has no manifest"):
        Zoo.open(tmp_path)
    with pytest.raises(StoreError, match="is not a directory"):
        Zoo.open(tmp_path / "nowhere")


def test_leaving_without_commit_removes_what_was_written(zoo: Path, tmp_path: Path) -> None:
    before = sorted(zoo.rglob("*"))
    with ZooWriter(zoo) as writer:
        fill(writer, seed=1)
        assert len(sorted(zoo.rglob("*"))) > len(before)
    assert sorted(zoo.rglob("*")) == before
    with ZooWriter(tmp_path / "new" / "zoo") as writer:
        fill(writer)
    assert not (tmp_path / "new" / "zoo").exists()


def test_leftovers_of_a_killed_writer_are_reused_or_collected(zoo: Path) -> None:
    with ZooWriter(zoo) as writer:
        manifest = fill(writer, seed=1)
        writer._new.clear()  # a killed writer removes nothing
    leftover = zoo / "blocks" / ".tmp-half.safetensors"
    leftover.write_bytes(b"half")
    stale = zoo / "blocks" / f"{'0' * 64}.safetensors"
    stale.write_bytes(b"old")
    assert Zoo.open(zoo).manifest.models["m"].chain != manifest.models["m"].chain
    kept = {block: block_path(zoo, block).stat().st_ino for block in manifest.blocks}
    with ZooWriter(zoo) as writer:
        freed = writer.commit(fill(writer, seed=1))
    assert {block: block_path(zoo, block).stat().st_ino for block in manifest.blocks} == kept
    assert len(list((zoo / "blocks").iterdir())) == 4
    assert freed > 7


def test_models_can_be_removed_on_a_full_disk(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {path for path in zoo.rglob("*") if path.is_file()}
    room = (zoo / ".reserve").stat()
    assert room.st_size >= 1 << 18
    assert room.st_blocks * 512 >= room.st_size  # not a hole
    write = blockzoo.zoo.writer._write_synced

    def on_a_full_disk(path: Path, content: bytes) -> None:
        if all(path.exists() for path in stored):
            path.write_bytes(b"")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(blockzoo.zoo.writer, "_write_synced", on_a_full_disk)
    with ZooWriter(zoo) as writer:
        assert writer.commit(Manifest()) > 0
    assert not list((zoo / "blocks").iterdir())
    assert not Zoo.open(zoo).manifest.models
    assert (zoo / ".reserve").stat().st_size == room.st_size  # there is room again


def test_one_writer_at_a_time(zoo: Path) -> None:
    with ZooWriter(zoo), pytest.raises(StoreError, match="another zoo-compile"), ZooWriter(zoo):
        pass
    with ZooWriter(zoo):
        pass


def test_a_manifest_that_does_not_fit_is_not_committed(zoo: Path) -> None:
    before = (zoo / "manifest.json").read_bytes()
    with ZooWriter(zoo) as writer:
        manifest = fill(writer, seed=1)
        del manifest.blocks[manifest.models["m"].chain[2]]
        with pytest.raises(ManifestError, match=r"chain\[2\]"):
            writer.commit(manifest)
    assert (zoo / "manifest.json").read_bytes() == before


def test_a_damaged_manifest_is_refused_by_readers_and_writers(zoo: Path) -> None:
    (zoo / "manifest.json").write_text((zoo / "manifest.json").read_text()[:-20])
    with pytest.raises(ManifestError, match="not JSON"):
        Zoo.open(zoo)
    with pytest.raises(ManifestError, match="not JSON"), ZooWriter(zoo):
        pass


def test_the_id_covers_everything() -> None:
    spec = FfnSpec(4, 8, 1e-6, False)
    tensors = {name: from_f32(np.ones(shape), "bf16") for name, shape in tensor_shapes(spec).items()}
    first = block_id(spec, tensors)
    assert block_id(spec, dict(tensors)) == first
    others = [
        block_id(replace(spec, rms_norm_eps=1e-5), tensors),
        block_id(spec, {**tensors, "norm": from_f32(np.zeros(4), "bf16")}),
        block_id(spec, {**tensors, "norm": from_f32(np.ones(4), "f16")}),
        block_id(spec, tensors, tied_to="0" * 64),
    ]
    assert len({first, *others}) == 5
