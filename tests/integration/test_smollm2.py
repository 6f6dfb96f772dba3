"""A real model in the form that most people have it: SmolLM2-135M-Instruct as GGUF, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from benchmarks.smollm2 import NotAvailableError, smollm2
from blockzoo.build.pipeline import CompileOptions, compile_models
from blockzoo.runtime import LLM, SamplingParams
from blockzoo.zoo.store import Zoo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NEW_TOKENS = 32
ASKED = (
    *("What is the capital of France?", "Write a haiku about the sea.", "Explain gravity to a child."),
    *("List three prime numbers.", "Who wrote Hamlet?", "Translate 'good morning' into Spanish."),
    *("What is 17 times 3?", "Name a colour of the rainbow.", "How do plants make food?", "Tell me a joke."),
)
PLAIN = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    '{"name": "blockzoo", "version": ',
    "La vie est belle, и мир прекрасен, 世界",
    "SELECT name FROM users WHERE",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three laws of thermodynamics are",
    "for (int i = 0; i < n; i++) {\n",
)


@pytest.fixture(scope="module")
def model_file() -> Path:
    try:
        return smollm2()
    except NotAvailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(model_file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name)


@pytest.fixture(scope="module")
def zoo(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "zoo"
    report = compile_models({"chat": model_file}, path, CompileOptions(profile=False))
    verified = report.models[0].verification
    assert verified is not None
    assert verified.figures["f32"].greedy_agreement == 1.0
    return path


def texts() -> Iterator[str]:
    """Mixed scripts, code, blanks and special tokens; pieces of this repository's own files."""
    yield from (*ASKED, *PLAIN)
    yield "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    yield "a<|im_end|>b <|endoftext|> c<repo_name>x<file_sep>\n\n\t  <|im_st"
    yield "नमस्ते दुनिया, مرحبا بالعالم, שלום עולם, 안녕하세요, ประเทศไทย, 👩‍👩‍👧‍👦🇫🇷 e\u0301é\u00a0\u200b"
    root = Path(__file__).parents[2]
    for path in (*sorted(root.glob("build/*.py"))[:6], root / "README.md", root / "Makefile"):
        content = path.read_text()
        yield from (content[i : i + 2000] for i in range(0, len(content), 2000))


def test_token_ids_are_those_of_transformers(zoo: Path, tokenizer: Any) -> None:
    ours = Tokenizer.from_file(str(Zoo.open(zoo).tokenizer_dir("chat") / "tokenizer.json"))
    assert ours.get_vocab_size() == len(tokenizer) == 49152
    for text in texts():
        expected = tokenizer(text).input_ids
        assert ours.encode(text).ids == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == tokenizer.decode(expected)


def test_greedy_tokens_are_those_of_transformers(model_file: Path, zoo: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chats = [[{"role": "user", "content": text}] for text in ASKED]
    asked = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    prompts = [tokenizer(text).input_ids for text in (*asked, *PLAIN)]
    llm = LLM(zoo, precision="f32", kv_cache_bytes=256 << 20)
    greedy = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    answers = llm.generate("chat", prompts, greedy, progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        model_file.parent, gguf_file=model_file.name, dtype=torch.float32
    ).eval()
    for answer in answers:
        prompt, found = list(answer.prompt), answer.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *found[:-1]]])).logits[0, len(prompt) - 1 :]
        assert tuple(logits.argmax(-1).tolist()) == found, tokenizer.decode(prompt)
