import random
import re
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from blockzoo.zoo.demo import corpus, tasks
from blockzoo.zoo.demo.assemble import assemble, tokenizer_json
from blockzoo.zoo.demo.collect import collect

TINY = [
    "--batch-tokens",
    "512",
    "--hidden-size",
    "64",
    "--layers",
    "3",
    "--vocab-size",
    "320",
    "--threads",
    "1",
]
TINY += ["--text-bytes", "60000"]

# torch's and peft's own warnings while they load, save and wrap
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_buffer(tokenizer_json())


@pytest.fixture(scope="module")
def row_makers(tokenizer):
    text = np.arange(2, 2000, dtype=np.int32)
    return {stage: corpus.RowMaker(tokenizer, text, stage) for stage in ("base", "notes", "solver")}


def test_every_answer_token_is_weighted_and_nothing_else(row_makers, tokenizer):
    mixture = corpus.Mixture(200, 0, 0, 1, max_notes=3, num_wordings=3, max_statements=1, max_hops=0)
    batch = row_makers["notes"].batch(random.Random(0), mixture, 8)
    assert batch.tokens.shape == batch.weights.shape == (8, 201)
    for tokens, weights in zip(batch.tokens, batch.weights, strict=True):
        answers = tokenizer.decode(
            tokens[weights == corpus.ANSWER_WEIGHT].tolist(), skip_special_tokens=False
        )
        for answer in answers.removesuffix(corpus.EOS).split(corpus.EOS):
            assert re.match(r" \w+ (is a|keeps the) | The .* is with ", answer)
            assert answer.endswith(".")
        asked = tokenizer.decode(tokens[weights == np.float32(corpus.PROMPT_WEIGHT)].tolist())
        assert asked.count("A:") == answers.count(corpus.EOS) > 0
        assert "is with" not in asked


@pytest.mark.parametrize("stage", ["base", "notes", "solver"])
def test_every_point_of_the_curriculum_makes_rows(row_makers, stage):
    for progress in np.linspace(0, 0.999, 12):
        mixture = corpus.curriculum(stage, progress)
        batch = row_makers[stage].batch(random.Random(0), mixture, 8)
        assert batch.tokens.shape == (8, mixture.length + 1)
        assert (batch.weights.sum(1) > 0).all()


def test_copy_and_recall_rows_weigh_what_was_told_before(row_makers):
    mixture = corpus.Mixture(64, 0, 1, 0, max_notes=1, num_wordings=1, max_statements=1, max_hops=0)
    batch = row_makers["base"].batch(random.Random(0), mixture, 32)
    kinds = set()
    for tokens, weights in zip(batch.tokens.tolist(), batch.weights, strict=True):
        first = int(np.flatnonzero(weights)[0])
        if weights[first] == 1:
            kinds.add("copy")
            assert tokens[first:] == tokens[:-first]
        else:
            kinds.add("recall")
            assert {tokens[answer] for answer in np.flatnonzero(weights)} <= set(tokens[:first])
    assert kinds == {"copy", "recall"}


def test_held_out_text_is_not_trained_on():
    trained = set(corpus.standard_library_texts(30_000_000))
    held_out = list(corpus.standard_library_texts(30_000_000, held_out=True))
    assert len(held_out) > 3
    assert not trained & set(held_out)


def test_tokenizer_round_trips_and_splits_digits():
    texts = tasks.sample_texts(random.Random(0), 20)
    trained = corpus.train_tokenizer(iter(texts), 320)
    assert trained.get_vocab_size() == 320
    assert [trained.token_to_id(token) for token in (corpus.BOS, corpus.EOS)] == [
        corpus.BOS_ID,
        corpus.EOS_ID,
    ]
    assert trained.decode(trained.encode("x = 123 é\n").ids) == "x = 123 é\n"
    assert trained.encode("123").tokens == ["1", "2", "3"]


@pytest.mark.slow
def test_three_steps_of_each_stage_then_assemble(tmp_path, capsys):
    pytest.importorskip("torch")
    train = pytest.importorskip("blockzoo.zoo.demo.train")
    trained = tmp_path / "trained"
    train.main(["--out", str(trained), "--steps", "3", *TINY])
    collect(trained, tmp_path / "weights")
    family = assemble(tmp_path / "family", tmp_path / "weights")
    assert sorted(path.name for path in family["notes"].iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert (family["notes-merged"] / "model.safetensors").read_bytes() != (
        family["base"] / "model.safetensors"
    ).read_bytes()
    evaluate = sys.modules["blockzoo.zoo.demo.evaluate"]
    capsys.readouterr()
    evaluate.main([str(family["base"].parent), "--documents", "1", "--threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | `base` | `notes` | `solver` |"
    assert len(lines) == 2 + 7


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    torch = pytest.importorskip("torch")
    train = pytest.importorskip("blockzoo.zoo.demo.train")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(["--out", str(whole), "--stage", "base", "--steps", "4", *TINY])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "weighted_loss", stop_after(2, train.weighted_loss))
        patch.setattr(train, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--out", str(parts), "--stage", "base", "--steps", "4", *TINY])
    train.main(["--out", str(parts), "--stage", "base", "--steps", "4", "--resume", *TINY])
    one, other = (torch.load(folder / "base.state", weights_only=True) for folder in (whole, parts))
    assert one["step"] == other["step"] == 4
    assert one["num_tokens"] == other["num_tokens"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name


def stop_after(count, loss):
    """The loss function, which stops the run like Ctrl-C on its call after the first `count`."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        if len(calls) > count:
            raise KeyboardInterrupt
        return loss(*arguments)

    return counted


@pytest.mark.parametrize("length", [0, 300])
def test_values_of_assignments_are_weighted_whether_shown_or_asked(tokenizer, length):
    from blockzoo.zoo.demo.train_chains import Level, RowMaker

    rows = RowMaker(tokenizer, 60000)
    batch = rows.batch(random.Random(1), Level(length, 4, 1.0), 4000)
    assert batch.tokens.shape == batch.weights.shape == batch.is_answer.shape
    chains = 0
    for tokens, weights, is_answer in zip(*batch, strict=True):
        assert len(np.unique(weights)) <= 3  # full, little, none
        if not is_answer.any():  # facts, text
            continue
        chains += 1
        text = tokenizer.decode(tokens.tolist())
        asked = text[text.index("Q: ") :]
        answers = re.findall(r"Q: (.)\?\nA: (\d)\n", asked)
        assert "".join(value for _, value in answers) == tokenizer.decode(tokens[is_answer].tolist())
        shown = re.findall(r"Let (.) = [^\n]*\.(\d)\n", text)
        assert set(shown) <= set(answers)
        values = "".join(value for _, value in shown + answers)
        assert values == tokenizer.decode(tokens[weights == 1.0].tolist())
    assert chains


@pytest.mark.slow
def test_chains_are_trained_from_the_base(tmp_path, capsys):
    from blockzoo.zoo.demo.train_chains import main

    sizes = ["--minutes", "0.02", "--batch-tokens", "256", "--text-bytes", "60000", "--documents", "2"]
    main([str(tmp_path), *sizes])
    assert "right, in 1024 tokens: {'facts': " in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}
