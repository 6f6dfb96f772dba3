"""Prompts, stop words and bad words of whole requests against transformers, the oracle, step by step."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Library
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, Completion, SamplingParams

BOS, END = "<s>", "</s>"
QUESTIONS = ("Q: 3+4\nA:", "Q: who keeps the key?\nA:", "def f(x):\n    return", "class A:\n    ")
DOCUMENTS = ("Marlow keeps the jade key.\n", "x = 3\ny = x + 4\n", f"{BOS}import os\n")
SPECIAL = (":", "Q", ",")  # that it generates often
PIECES = ("\n", " ", "re", "e", "=", "# ", "def", "return", "0", "1", "self.", END, "n", *SPECIAL, *SPECIAL)


@pytest.fixture(scope="module")
def checkpoint(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo solver with a tokenizer that puts <s> before a text and counts two more tokens as special."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(demo_family["solver"], folder)
    file = str(folder / "tokenizer.json")
    library = Library.from_file(file)
    library.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, library.token_to_id(BOS))]
    )
    library.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    library.save(file)
    return folder


@pytest.fixture(scope="module")
def llm(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    zoo = tmp_path_factory.mktemp("zoo") / "bos"
    compile_models({"bos": checkpoint}, zoo, CompileOptions(verify=False, profile=False))
    return LLM(zoo, precision="f32", kv_cache_bytes=64 << 20)


class Oracle:
    """Greedy generation with no cache, and the text decoded anew after every token."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._likeliest: dict[tuple[int, ...], list[int]] = {}
        self._end = self.tokenizer.convert_tokens_to_ids(END)
        special = self.tokenizer.added_tokens_decoder.items()
        self._special = {token.content: index for index, token in special if token.special}

    def prompt(self, documents: list[str], text: str) -> list[int]:
        parts = [part.removeprefix(BOS) for part in (*documents, text)]
        bare = [self.tokenizer(part, add_special_tokens=False).input_ids for part in parts]
        return [self.tokenizer.bos_token_id, *(token for ids in bare for token in ids)]

    def next_token(self, ids: list[int], params: SamplingParams, num_generated: int) -> int:
        """The likeliest token that completes no bad word and ends nothing too early."""
        key = tuple(ids)
        if key not in self._likeliest:
            with torch.no_grad():
                logits = self._model(torch.tensor([ids])).logits[0, -1]
            self._likeliest[key] = logits.topk(100).indices.tolist()
        for token in self._likeliest[key]:
            if token == self._end and num_generated < params.min_tokens and not params.ignore_eos:
                continue
            after = self.tokenizer.decode([*ids[-8:], token])
            if not any(after.endswith(word) for word in params.bad_words):
                return token
        raise AssertionError("every likely token is banned")

    def generate(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], str, str]:
        ids: list[int] = []
        while len(ids) < params.max_tokens:
            ids.append(self.next_token(prompt + ids, params, len(ids)))
            is_end = ids[-1] == self._end and not params.ignore_eos
            cut = self._cut(prompt, ids, params, is_end) if len(ids) >= params.min_tokens else None
            if cut is not None:
                return ids, cut, "stop"
            if is_end:
                return ids, self._text(prompt, ids[:-1], params), "stop"
        return ids, self._text(prompt, ids, params), "length"

    def _text(self, prompt: list[int], ids: list[int], params: SamplingParams) -> str:
        before, both = (
            self.tokenizer.decode(i, skip_special_tokens=params.skip_special_tokens)
            for i in (prompt, prompt + ids)
        )
        assert both.startswith(before)
        return both[len(before) :]

    def _cut(self, prompt: list[int], ids: list[int], params: SamplingParams, is_end: bool) -> str | None:
        """The text up to the stop word that the last token completes first."""
        old = self._text(prompt, ids[:-1], params)
        new = old if is_end else self._text(prompt, ids, params)
        found = [
            (end, -len(word), word)
            for word in params.stop
            for end in range(len(old) + 1, len(new) + 1)
            if new[:end].endswith(word)
        ]
        found += [(len(old), 0, word) for word in params.stop if self._special.get(word) == ids[-1]]
        if not found:
            return None
        end, minus_length, word = min(found)
        if self._special.get(word) == ids[-1] and not minus_length:
            return old + word * params.include_stop
        return new[: end + minus_length] + word * params.include_stop


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_random_requests_get_the_oracles_answers(llm: LLM, oracle: Oracle, seed: int) -> None:
    rng = random.Random(seed)
    requests: list[tuple[list[str], str, SamplingParams]] = []
    for documents in (rng.sample(DOCUMENTS, rng.randint(0, 3)) for _ in range(3)):
        for _ in range(8):
            num_tokens = rng.choice([1, 8, 24])
            params = SamplingParams(
                max_tokens=num_tokens,
                temperature=0.0,
                min_tokens=rng.choice([0, 0, rng.randint(0, num_tokens)]),
                stop=tuple(rng.sample(PIECES, rng.choice([0, 1, 1, 3]))),
                bad_words=tuple(rng.sample(("0", "#", "self"), rng.choice([0, 0, 1]))),
                ignore_eos=rng.random() < 0.5,
                include_stop=rng.random() < 0.5,
                skip_special_tokens=rng.random() < 0.7,
            )
            requests.append((documents, BOS * rng.randint(0, 1) + rng.choice(QUESTIONS), params))
    for documents in {tuple(request[0]) for request in requests}:
        asked = [(text, params) for found, text, params in requests if tuple(found) == documents]
        answers: list[Completion] = llm.generate(
            "bos", [text for text, _ in asked], [params for _, params in asked], documents=documents
        )
        for (text, params), answer in zip(asked, answers, strict=True):
            prompt = oracle.prompt(list(documents), text)
            assert answer.num_prompt_tokens == len(prompt)
            expected = oracle.generate(prompt, params)
            found = list(answer.token_ids), answer.text, answer.finish_reason
            assert found == expected, (documents, text, params)
