import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from blockzoo.zoo.demo.assemble import WEIGHTS, assemble
from blockzoo.zoo.demo.tensors import read_tensors, write_tensors
from blockzoo.zoo.tensors import bf16_to_f32, f32_to_bf16

MEGABYTE = 10**6
FAMILY = ("base", "notes", "notes-merged", "solver", "base-sharded")


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return assemble(tmp_path_factory.mktemp("family"))


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_tensors(path)
    return found


def differing_layers(one, other):
    assert one.keys() == other.keys()
    names = [name for name in one if not np.array_equal(one[name], other[name])]
    return {int(name.split(".")[2]) if ".layers." in name else name for name in names}


def test_the_committed_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) <= 9 * MEGABYTE


def test_family_has_its_five_models(family):
    assert tuple(family) == FAMILY
    for name, folder in family.items():
        expected = {"adapter_config.json"} if name == "notes" else {"config.json", "generation_config.json"}
        assert expected <= {path.name for path in folder.iterdir()}


def test_solver_differs_in_exactly_the_last_two_layers(family):
    num_layers = json.loads((family["base"] / "config.json").read_text())["num_hidden_layers"]
    found = differing_layers(tensors_of(family["base"]), tensors_of(family["solver"]))
    assert found == {num_layers - 2, num_layers - 1}


def test_base_sharded_is_base_in_another_layout(family):
    base, sharded = tensors_of(family["base"]), tensors_of(family["base-sharded"])
    assert not differing_layers(base, sharded)
    index = json.loads((family["base-sharded"] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base)
    assert len(set(index["weight_map"].values())) == 3
    with safe_open(family["base-sharded"] / "model-00001-of-00003.safetensors", "np") as first:
        assert sorted(base)[-1] in first.offset_keys()[:1]


@pytest.mark.parametrize("name", ["base", "solver", "base-sharded"])
def test_transformers_loads_the_checkpoint_it_was_given(family, name):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(family[name], output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    stored = tensors_of(family[name])
    for key, value in model.named_parameters():
        assert np.array_equal(value.detach().view(torch.uint16).numpy(), stored[key]), key


def test_tokenizer_loads_and_round_trips(family):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(family["base"])
    text = "def f(x):\n    return x + 17  # é\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft reads it
def test_notes_merged_is_what_peft_merges(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(family["base"], dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, family["notes"])
    assert model.peft_config["default"].base_model_name_or_path == "base"
    theirs = dict(model.merge_and_unload().named_parameters())
    ours, before = tensors_of(family["notes-merged"]), tensors_of(family["base"])
    changed = {name for name in ours if not np.array_equal(ours[name], before[name])}
    assert {name.split(".")[-2] for name in changed} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    for name, tensor in ours.items():
        exact = theirs[name].detach().numpy()
        # half a unit in the last of bf16's 8 significant bits, and a little for the order of the sums in f32
        np.testing.assert_allclose(bf16_to_f32(tensor), exact, rtol=2**-8, atol=1e-6, err_msg=name)


def test_assemble_twice_changes_nothing(tmp_path):
    before = {
        path: path.stat().st_mtime_ns for folder in assemble(tmp_path).values() for path in folder.iterdir()
    }
    assemble(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({path.parent.name for path in before})


def test_assemble_keeps_what_it_did_not_write(tmp_path):
    (tmp_path / "solver").mkdir()
    (tmp_path / "solver" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="solver exists and is not what would be written"):
        assemble(tmp_path)
    assert (tmp_path / "solver" / "mine.txt").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_failure_half_way_leaves_no_folder(tmp_path):
    weights = shutil.copytree(WEIGHTS, tmp_path / "weights")
    (weights / "tokenizer.json.xz").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        assemble(tmp_path / "out", weights)
    assert list((tmp_path / "out").iterdir()) == []


def test_command_line_needs_no_torch(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['demo', sys.argv[1]];"
        "runpy.run_module('blockzoo.zoo.demo', run_name='__main__');"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=200
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(FAMILY)
    done = subprocess.run(
        [sys.executable, "-m", "blockzoo.zoo.demo", str(WEIGHTS / "config.json")],
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_bf16_rounding_matches_torch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 2.0**-130]  # ties both ways, a signed zero, a subnormal
    ours = f32_to_bf16(values)
    assert np.array_equal(ours, torch.from_numpy(values).bfloat16().view(torch.uint16).numpy())
    assert np.array_equal(f32_to_bf16(bf16_to_f32(ours)), ours)


def test_tensor_files_keep_order_and_refuse_other_dtypes(tmp_path):
    path = tmp_path / "x.safetensors"
    written = {"b": np.arange(6, dtype=np.uint16).reshape(2, 3), "a": np.ones(5, np.float32)}
    write_tensors(path, written)
    found = read_tensors(path)
    assert all(np.array_equal(found[name], written[name]) for name in written)
    with safe_open(path, "np") as file:
        assert file.offset_keys() == ["b", "a"]
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"'))
    with pytest.raises(ValueError, match="a is I32; expected one of"):
        read_tensors(path)
