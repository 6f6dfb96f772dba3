"""Chat templates against `apply_chat_template` of transformers, and hostile ones against their bounds."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blockzoo.runtime.api.errors import InvalidRequestError, PromptTooLongError, RequestError
from blockzoo.runtime.text.chat import ChatTemplate
from blockzoo.runtime.text.chat_messages import MAX_CHARS, MAX_DEPTH, MAX_MESSAGES
from blockzoo.runtime.text.chat_process import render_processes
from blockzoo.runtime.text.tokenizer import Tokenizer
from blockzoo.zoo.errors import ZooError

TEMPLATES = Path(__file__).parent / "chat_templates"
FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|im_end|>"}

SYSTEM = {"role": "system", "content": "  Answer in rhyme.\n"}
USER = {"role": "user", "content": "Größe 你好 😀 <b>&amp;</b> \"quoted\" 'single' {{ 7 * 7 }} \\n\ttab  "}
ASSISTANT = {"role": "assistant", "content": " <think>\nhm\n</think>\n\nIt's 42. "}
CALL = {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "exact": True, "note": None}}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "abc123xyz", "type": "function", "function": CALL}],
}
TWO_CALLS = {
    **CALLS,
    "tool_calls": [*CALLS["tool_calls"], {"id": "abc123xyy", "type": "function", "function": CALL}],
}
RESULT = {"role": "tool", "tool_call_id": "abc123xyz", "name": "weather", "content": '{"sky": "blaü"}'}
REASONED = {"role": "assistant", "content": "42", "reasoning": "6 * 7\n", "refusal": None}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": "And?"}],
    "system and turns": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT],
    "call": [USER, CALLS, RESULT],
    "call and answer": [SYSTEM, USER, CALLS, RESULT, ASSISTANT, USER],
    "two calls": [USER, TWO_CALLS, RESULT, {**RESULT, "tool_call_id": "abc123xyy"}, ASSISTANT],
    "bad call id": [USER, {**CALLS, "tool_calls": [{**CALLS["tool_calls"][0], "id": "x"}]}, RESULT],
    "reasoning": [USER, REASONED],
    "twice the user": [USER, USER],
    "assistant first": [ASSISTANT, USER],
    "unknown role": [{"role": "wizard", "content": "Hum"}],
    "empty": [{"role": "user", "content": ""}],
    "no content": [{"role": "user"}],
    "content null": [USER, {"role": "assistant", "content": None}],
    "stop": [USER, {"role": "user", "content": "stop"}, USER],
    "further fields": [{**USER, "name": "Ada", "weight": 1.5, "flags": [True, {"x": None}]}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <today> in a \"city\" & 'town'",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Größe"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    }
]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "no tools": {"tools": []},
    "kwargs": {"kwargs": {"enable_thinking": False, "date_string": "1 Jan 2030", "bos_token": "<B>"}},
    "other kwargs": {"tools": TOOLS, "kwargs": {"tools_in_user_message": False, "builtin_tools": ["a", "b"]}},
    "documents": {"documents": [{"title": "A", "text": "Öl"}]},
}


def write_folder(folder: Path, tokenizer: Path, files: Mapping[str, str | object]) -> Path:
    """A folder that AutoTokenizer reads: text files as they are, others as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer / "tokenizer.json", folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL}
    for name, content in {"tokenizer_config.json": {}, **files}.items():
        if isinstance(content, dict) and name == "tokenizer_config.json":
            content = {**config, **content}
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def theirs(tokenizer: Any, messages: Any, kwargs: Mapping[str, Any] | None = None, **settings: Any) -> str:
    settings = {"add_generation_prompt": True, **settings}
    return tokenizer.apply_chat_template(
        copy.deepcopy(messages), tokenize=False, **settings, **(kwargs or {})
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, bpe_tokenizer_dir: Path) -> dict[str, Path]:
    made = {}
    for family in FAMILIES:
        files = {"chat_template.jinja": (TEMPLATES / f"{family}.jinja").read_text()}
        made[family] = write_folder(tmp_path_factory.mktemp("chat") / family, bpe_tokenizer_dir, files)
    return made


def ours(folder: Path) -> ChatTemplate:
    found = ChatTemplate.load(folder)
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    oracle, template = AutoTokenizer.from_pretrained(folders[family]), ours(folders[family])
    equal = 0
    for name, messages in CONVERSATIONS.items():
        before = copy.deepcopy(messages)
        for setting, arguments in SETTINGS.items():
            try:
                expected = theirs(oracle, messages, **arguments)
            except Exception as error:
                said = str(error.message) if isinstance(error, TemplateError) else type(error).__name__
                with pytest.raises(InvalidRequestError) as raised:
                    template.render(messages, **arguments)
                assert said in str(raised.value), (name, setting)
            else:
                assert template.render(messages, **arguments) == expected, (name, setting)
                equal += 1
        assert messages == before
    assert equal >= len(SETTINGS)


@pytest.mark.parametrize("family", FAMILIES)
def test_going_on_with_the_last_message_is_as_in_transformers(family: str, folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    oracle, template = AutoTokenizer.from_pretrained(folders[family]), ours(folders[family])
    tools = TOOLS if family == "hermes" else None
    for ending in ("The answer is", "trailing blank ", "\n"):
        messages = [USER, {"role": "assistant", "content": ending}]
        arguments = {"add_generation_prompt": False, "continue_final_message": True, "tools": tools}
        try:
            expected = theirs(oracle, messages, **arguments)
        except ValueError:
            with pytest.raises(InvalidRequestError, match="continue_final_message"):
                template.render(messages, **arguments)
        else:
            assert template.render(messages, **arguments) == expected


def test_parts_are_given_to_a_template_that_reads_them(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    parts = [{"type": "text", "text": " one"}, {"type": "text", "text": "two "}]
    messages = [SYSTEM, {"role": "user", "content": parts}]
    oracle = AutoTokenizer.from_pretrained(folders["gemma"])
    assert ours(folders["gemma"]).render(messages) == theirs(oracle, messages)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"gemma", "hermes"}))
def test_parts_become_one_text_where_a_template_would_write_the_list(
    family: str, folders: dict[str, Path]
) -> None:
    from transformers import AutoTokenizer

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    oracle = AutoTokenizer.from_pretrained(folders[family])
    joined = theirs(oracle, [{"role": "user", "content": "one\ntwo"}])
    assert "one\ntwo" in joined
    assert ours(folders[family]).render([{"role": "user", "content": parts}]) == joined


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama3.1", "mistral-v3", "hermes", "deepseek"])
def test_arguments_that_are_a_text_are_written_as_the_object_they_spell(
    family: str, folders: dict[str, Path]
) -> None:
    spelt = {"name": "weather", "arguments": json.dumps(CALL["arguments"], ensure_ascii=False)}
    call = {**CALLS, "tool_calls": [{**CALLS["tool_calls"][0], "function": spelt}]}
    text = ours(folders[family]).render([USER, call, RESULT], tools=TOOLS)
    assert spelt["arguments"] in text
    assert '\\"city\\":' not in text


def test_files_go_before_tokenizer_config_as_in_transformers(tmp_path: Path, bpe_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    cases: list[dict[str, Any]] = [
        {"tokenizer_config.json": {"chat_template": "C{{ bos_token }}"}},
        {"tokenizer_config.json": {"chat_template": named}},
        {"tokenizer_config.json": {"chat_template": named}, "chat_template.jinja": "J\n"},
        {"tokenizer_config.json": {"chat_template": "C"}, "additional_chat_templates/rag.jinja": "R"},
        {"chat_template.jinja": "J", "additional_chat_templates/tool_use.jinja": "T{{ tools|length }}"},
        {"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "R"}]}},
        {
            "tokenizer_config.json": {"bos_token": None},
            "chat_template.jinja": "{{ bos_token }}|{{ eos_token }}",
        },
        {
            "tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}},
            "chat_template.jinja": "{{ eos_token }}",
        },
        {"chat_template.json": {"chat_template": "legacy"}},
    ]
    for index, files in enumerate(cases):
        folder = write_folder(tmp_path / str(index), bpe_tokenizer_dir, files)
        oracle, template = AutoTokenizer.from_pretrained(folder), ChatTemplate.load(folder)
        if oracle.chat_template is None:
            assert template is None
            continue
        assert template is not None
        for tools in (None, TOOLS, []):
            try:
                expected = theirs(oracle, [USER], tools=tools)
            except ValueError:
                with pytest.raises(InvalidRequestError, match=r"no chat template 'default'.* are: rag"):
                    template.render([USER], tools=tools)
            else:
                assert template.render([USER], tools=tools) == expected
        for name in oracle.chat_template if isinstance(oracle.chat_template, dict) else ():
            assert template.render([USER], name=name, tools=[]) == theirs(
                oracle, [USER], chat_template=name, tools=[]
            )
        with pytest.raises(InvalidRequestError, match="no chat template 'nothing'"):
            template.render([USER], name="nothing")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"chat_template.jinja": "a" * ((1 << 20) + 1)}, "bytes; expected at most"),
        ({"tokenizer_config.json": {"chat_template": 7}}, "expected a text"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "name and template"),
        ({"tokenizer_config.json": "[1]"}, "expected a JSON object"),
    ],
)
def test_a_damaged_folder_is_told(
    files: dict[str, Any], said: str, tmp_path: Path, bpe_tokenizer_dir: Path
) -> None:
    with pytest.raises(ZooError, match=said):
        ChatTemplate.load(write_folder(tmp_path, bpe_tokenizer_dir, files))


def test_a_tokenizer_has_its_template_and_adds_one_bos(folders: dict[str, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import processors

    for family in ("llama3", "smollm2"):
        library = Library.from_file(str(folders[family] / "tokenizer.json"))
        library.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        folder = tmp_path / family
        shutil.copytree(folders[family], folder)
        library.save(str(folder / "tokenizer.json"))
        tokenizer = Tokenizer.load(folder)
        ids = tokenizer.encode(tokenizer.chat_template_of("m").render([USER]))
        assert ids[0] == 0
        assert ids.count(0) == 1


def test_without_a_template_it_is_said_how_to_add_one(bpe_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer.load(bpe_tokenizer_dir)
    assert tokenizer.chat_template is None
    with pytest.raises(
        InvalidRequestError, match=r"model solver has no chat template: put .*chat_template.jinja"
    ):
        tokenizer.chat_template_of("solver")


def _deep(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("messages", "kind", "said"),
    [
        ([], InvalidRequestError, "list of 0"),
        ("Hello", InvalidRequestError, "of type str; expected a list"),
        ({"role": "user", "content": "x"}, InvalidRequestError, "of type dict; expected a list"),
        (["Hello"], InvalidRequestError, r"messages\[0\] is 'Hello'; expected an object"),
        ([{"content": "x"}], InvalidRequestError, r"messages\[0\].role is None"),
        ([{"role": 1, "content": "x"}], InvalidRequestError, r"role is 1"),
        ([{"role": "user", "content": b"x"}], InvalidRequestError, "of type bytes"),
        ([{"role": "user", "content": object()}], InvalidRequestError, "of type object"),
        ([{"role": "user", 3: "x"}], InvalidRequestError, "has the key 3"),
        ([{"role": "user", "content": 10**400}], InvalidRequestError, "expected less than"),
        ([{"role": "user", "content": _deep(MAX_DEPTH)}], InvalidRequestError, "deep"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            InvalidRequestError,
            "'image_url'; the models here read text only",
        ),
        ([USER] * (MAX_MESSAGES + 1), InvalidRequestError, "expected 1 to"),
        ([{"role": "user", "content": "x" * (MAX_CHARS // 2)}] * 3, PromptTooLongError, "characters"),
        ([{"role": "user", "content": [[]] * 500_001}], PromptTooLongError, "values"),
    ],
)
def test_messages_of_an_unfit_form_are_refused(
    messages: Any, kind: type[RequestError], said: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(kind, match=said):
        ours(folders["chatml"]).render(messages)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"tools": "x"}, "tools is 'x'; expected a list of objects"),
        ({"tools": [print]}, r"tools\[0\] is of type builtin_function"),
        ({"documents": ["x"]}, "documents is"),
        ({"kwargs": {"messages": []}}, "'messages', which is an argument"),
        ({"kwargs": {"x": {1, 2}}}, "of type set"),
        ({"continue_final_message": True}, "both true"),
    ],
)
def test_arguments_of_an_unfit_form_are_refused(
    arguments: dict[str, Any], said: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        ours(folders["chatml"]).render([USER], **arguments)


def test_the_largest_messages_are_rendered(folders: dict[str, Path]) -> None:
    template = ours(folders["chatml"])
    text = "😀" * (MAX_CHARS - 20)
    assert text in template.render([{"role": "user", "content": text}])
    assert template.render([{"role": "user", "content": "x"}] * MAX_MESSAGES).count("x") == MAX_MESSAGES


_DOUBLED = "{% for i in range(60) %}{% set ns.x = THIS %}{% endfor %}"
HOSTILE = {
    "loops": (
        "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
        "more than 2 s",
    ),
    "range": ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a great power": ("{{ 10 ** (10 ** 10) }}", "more than (2 s|512 MiB)"),
    "while compiling": ("{{ 'a' * 10 ** 10 }}", "more than 512 MiB"),
    "times": ("{{ messages[0].role * 10 ** 10 }}", "more than 512 MiB"),
    "width": ("{{ '%1000000000d' % messages|length }}", "more than 512 MiB"),
    "padding": ("{{ messages[0].role.ljust(10 ** 10) }}", "more than 512 MiB"),
    "format": ("{{ '{:>10000000000}'.format('a') }}", "more than 512 MiB"),
    "indent": ("{{ [1]|tojson(indent=10 ** 10) }}", "more than 512 MiB"),
    "doubled text": (
        "{% set ns = namespace(x='a') %}" + _DOUBLED.replace("THIS", "ns.x ~ ns.x"),
        "more than 512 MiB",
    ),
    "doubled lists": (
        "{% set ns = namespace(x=[1]) %}" + _DOUBLED.replace("THIS", "[ns.x, ns.x]") + "{{ ns.x|tojson }}",
        "more than (2 s|512 MiB)",
    ),
    "much text": ("{% for i in range(10**5) %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}", "characters"),
    "into Python": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "by a namespace": ("{{ namespace(__class__=1) }}", "cannot hold '__class__'"),
    "into a function": ("{{ raise_exception.__globals__.x }}", "unsafe"),
    "by format": ("{{ '{0.__class__.x}'.format(1) }}", "unsafe"),
    "a file": ("{% include '/etc/hostname' %}", "no loader"),
    "no template": ("{% for %}", "no valid template .line 1"),
    "undefined": ("{{ nothing.at.all }}", "'nothing' is undefined"),
    "unknown filter": ("{{ 1|nothing }}", "No filter named 'nothing'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_within_its_bounds(name: str, folders: dict[str, Path]) -> None:
    text, said = HOSTILE[name]
    with pytest.raises(RequestError, match=said):
        ChatTemplate({"default": text}, SPECIAL).render([USER])
    assert "Größe" in ours(folders["chatml"]).render([USER])  # others go on


def test_many_threads_get_their_own_texts(folders: dict[str, Path]) -> None:
    templates = [ours(folders[family]) for family in ("chatml", "zephyr", "gemma")]

    def one(i: int) -> str:
        return templates[i % 3].render([{"role": "user", "content": f"<{i}>"}])

    with ThreadPoolExecutor(16) as pool:
        for i, text in enumerate(pool.map(one, range(300))):
            assert f"<{i}>" in text


def test_a_process_that_was_ended_from_outside_is_replaced(folders: dict[str, Path]) -> None:
    template = ours(folders["chatml"])
    template.render([USER])
    for process in render_processes()._idle:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert "Größe" in template.render([USER])


def test_a_template_that_is_not_left_alone_does_not_hold_up_another(folders: dict[str, Path]) -> None:
    hostile = ChatTemplate({"default": HOSTILE["loops"][0]}, {})
    template = ours(folders["chatml"])
    ended: list[str] = []

    def attack() -> None:
        with pytest.raises(InvalidRequestError):
            hostile.render([USER])
        ended.append("attack")

    threads = [threading.Thread(target=attack) for _ in range(2)]
    for thread in threads:
        thread.start()
    template.render([USER])
    assert len(ended) < len(threads)  # only one of them is rendered at a time
    for thread in threads:
        thread.join()
