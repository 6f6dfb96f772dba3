"""Files of prompts, and the built-in ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockzoo.build.calibrate.prompts import Case, PromptsError, built_in, read_prompts


def test_prompts_are_texts_or_messages_with_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "one"}\n\n{"prompt": [{"role": "user", "content": "two"}], "known": ["one", "more"]}\n'
    )
    two = [{"role": "user", "content": "two"}]
    assert read_prompts(path) == [Case("one"), Case(two, ("one", "more"))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[]", 'line 2: expected {"prompt": ...}'),
        ('{"prompt": "a", "knwon": []}', 'line 2: expected {"prompt": ...}'),
        ('{"prompt": ""}', "line 2: a prompt is ''"),
        ('{"prompt": [{"role": "user"}]}', "line 2: a prompt is"),
        ('{"prompt": "a", "known": "b"}', "line 2: \"known\" is 'b'"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(PromptsError) as error:
        read_prompts(path)
    assert said in str(error.value)


def test_a_file_without_prompts_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(PromptsError, match="0 prompts"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(PromptsError, match="cannot be read"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize("chat", [True, False])
def test_built_in_prompts_share_most_words_with_what_is_known(chat: bool) -> None:
    cases = built_in(6, 2000, chat)
    assert cases == built_in(6, 2000, chat)
    for case in cases:
        prompts = [case.prompt, *(case.known or ())]
        text, *known = (p if isinstance(p, str) else p[0]["content"] for p in prompts)
        lines = [line for line in text.split("\n") if len(line) > 20]
        shared = sum(len(line) for line in lines if any(line in other for other in known))
        assert shared > 0.7 * len(text)
        assert len(text) > 1500
