"""zoo-chat, zoo-generate --chat and LLM.chat on the demo family with small chat templates."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockzoo.runtime import LLM, SamplingParams, chat_cli, generate
from blockzoo.runtime.api.errors import InvalidRequestError, UnknownModelError
from blockzoo.runtime.chat_cli import Chat

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'user' %}"
    "Q: {{ m.content }}\n{% else %}A: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% if loud %}!{% endif %}{% endif %}"
)
OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
TOOL_TEMPLATE = "{{ tools|length }} tools. {{ messages[0].content }}"
DEFAULTS = {"temperature": 0.0, "repetition_penalty": 1.3, "top_k": 7}
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def zoo(demo_family: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and its LoRA notes with templates of their own, solver without."""
    from blockzoo.build.pipeline import CompileOptions, compile_models

    root = tmp_path_factory.mktemp("chat")
    folders = {name: root / name for name in ("base", "notes", "solver")}
    for name, folder in folders.items():
        shutil.copytree(demo_family[name], folder)
    (folders["base"] / "chat_template.jinja").write_text(TEMPLATE)
    (folders["base"] / "additional_chat_templates").mkdir()
    (folders["base"] / "additional_chat_templates/tool_use.jinja").write_text(TOOL_TEMPLATE)
    (folders["notes"] / "chat_template.jinja").write_text(OTHER)
    config = json.loads((folders["base"] / "generation_config.json").read_text())
    (folders["base"] / "generation_config.json").write_text(json.dumps(config | DEFAULTS))
    (folders["notes"] / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    compile_models(folders, root / "zoo", CompileOptions(verify=False, profile=False))
    return root / "zoo"


@pytest.fixture(scope="module")
def llm(zoo: Path) -> LLM:
    return LLM(zoo, precision="f32", kv_cache_bytes=16 << 20)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_answers_what_the_template_makes(llm: LLM) -> None:
    conversations = [user("one"), [{"role": "system", "content": "Be brief."}, *user("two")]]
    answers = llm.chat("base", conversations, GREEDY, progress=False)
    assert [answer.prompt for answer in answers] == ["Q: one\nA:", "Be brief.\nQ: two\nA:"]
    prompts = [str(answer.prompt) for answer in answers]
    expected = llm.generate("base", prompts, GREEDY, progress=False)
    assert [answer.token_ids for answer in answers] == [done.token_ids for done in expected]
    (single,) = llm.chat("base", user("one"), GREEDY, progress=False)
    assert single.token_ids == answers[0].token_ids
    both = llm.chat(["base", "notes"], [user("x"), user("x")], GREEDY, progress=False)
    assert [answer.prompt for answer in both] == ["Q: x\nA:", "<user>x<answer>"]


def test_chat_passes_on_tools_variables_and_the_last_message(llm: LLM) -> None:
    def prompt(**arguments: Any) -> object:
        return llm.chat("base", user("x"), GREEDY, progress=False, **arguments)[0].prompt

    assert prompt(tools=[{"type": "function", "function": {"name": "f"}}]) == "1 tools. x"
    assert prompt(chat_template_kwargs={"loud": True}) == "Q: x\nA:!"
    messages = [*user("x"), {"role": "assistant", "content": "It is"}]
    (answer,) = llm.chat("base", messages, GREEDY, continue_final_message=True, progress=False)
    assert answer.prompt == "Q: x\nA: It is"


def test_chat_samples_as_the_model_says(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockzoo.runtime.llm.CHAT_TOKENS", 40)
    assert llm.engine.generation_defaults("base") == DEFAULTS
    assert llm.engine.generation_defaults("notes") == {**DEFAULTS, "top_k": 3}
    assert llm.engine.generation_defaults("solver") == {}
    (answer,) = llm.chat("base", user("Count: 1 2 3"), progress=False)
    params = SamplingParams(max_tokens=40, **DEFAULTS)  # type: ignore[arg-type]
    (expected,) = llm.generate("base", "Q: Count: 1 2 3\nA:", params, progress=False)
    assert answer.token_ids == expected.token_ids
    plain = SamplingParams(max_tokens=40, temperature=0.0)
    (other,) = llm.generate("base", "Q: Count: 1 2 3\nA:", plain, progress=False)
    assert answer.token_ids != other.token_ids


def test_chat_without_a_template_or_messages_is_refused(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="model solver has no chat template"):
        llm.chat("solver", user("x"), GREEDY)
    with pytest.raises(InvalidRequestError, match="messages is a list of 0"):
        llm.chat("base", [], GREEDY)
    with pytest.raises(InvalidRequestError, match="of type str"):
        llm.chat("base", "x", GREEDY)  # type: ignore[arg-type]
    with pytest.raises(UnknownModelError):
        llm.chat("nobody", user("x"), GREEDY)
    with pytest.raises(InvalidRequestError, match="model has 1 entries for 2"):
        llm.chat(["base"], [user("x"), user("y")], GREEDY)


@pytest.fixture
def chat(llm: LLM) -> Iterator[Chat]:
    yield Chat(llm.engine, "base", lambda model: GREEDY, lambda text: None)
    assert not llm.engine.has_unfinished()
    llm.engine.check_integrity()


def test_the_conversation_goes_on_and_other_models_join_it(chat: Chat, llm: LLM) -> None:
    written: list[str] = []
    chat.write = written.append
    chat.system = "Be brief. " * 20
    one = chat.say("one")
    assert "".join(written) == one.text
    two = chat.say("two")
    assert two.num_cached_tokens >= (one.num_prompt_tokens + one.num_generated) // 16 * 16 - 16 > 0
    chat.use("notes")
    three = chat.say("three")
    assert (three.model, len(chat.history)) == ("notes", 6)
    turns = [("system", chat.system), ("user", "one"), ("assistant", one.text), ("user", "two")]
    turns += [("assistant", two.text), ("user", "three")]
    prompt = "".join(f"<{role}>{text}" for role, text in turns) + "<answer>"
    (expected,) = llm.generate("notes", prompt, GREEDY, progress=False)
    assert three.text == expected.text
    with pytest.raises(InvalidRequestError, match="solver has no chat template"):
        chat.use("solver")
    with pytest.raises(UnknownModelError):
        chat.use("bas")
    assert chat.model == "notes"


def test_an_interrupt_ends_the_answer_and_keeps_what_there_is(chat: Chat) -> None:
    written: list[str] = []
    chat.params = lambda model: SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
    chat.write = written.append
    chat.interrupted = lambda: len(written) >= 3
    answer = chat.say("one")
    assert (answer.finish_reason, answer.num_generated) == ("abort", 3)
    assert chat.history[-1] == {"role": "assistant", "content": answer.text}
    chat.interrupted = lambda: True
    assert chat.say("two").text == ""
    chat.interrupted = lambda: False
    chat.params = lambda model: GREEDY
    assert chat.say("three").num_generated == 6


def test_a_message_that_is_refused_leaves_the_conversation(chat: Chat) -> None:
    chat.say("one")
    before = list(chat.history)
    for text in ("word " * 100_000, "\ud800"):
        with pytest.raises(ValueError, match=r"tokens|surrogates"):
            chat.say(text)
        assert chat.history == before
    chat.say("two")


def piped(zoo: Path, *arguments: str, lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blockzoo.runtime.chat_cli", str(zoo), *arguments]
    return subprocess.run(
        command,
        input=lines,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "COLUMNS": "100"},
    )


def test_piped_lines_give_answers_alone_on_standard_output(zoo: Path, llm: LLM) -> None:
    lines = (
        "one\n\n/system Be brief.\n/stats\n/model notes\ntwo\n/stats\n/model\n/clear\n//three\n/quit\nnever\n"
    )
    options = ["--precision", "f32", "--max-tokens", "6", "--temperature", "0", "--repetition-penalty", "1"]
    done = piped(zoo, *options, "--top-k", "0", lines=lines)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    params = SamplingParams(max_tokens=6, temperature=0.0)
    (one,) = llm.chat("base", user("one"), params, progress=False)
    system = {"role": "system", "content": "Be brief."}
    turns = [system, *user("one"), {"role": "assistant", "content": one.text}, *user("two")]
    (two,) = llm.chat("notes", turns, params, progress=False)
    (three,) = llm.chat("notes", [system, *user("/three")], params, progress=False)
    assert done.stdout == f"{one.text}\n{two.text}\n{three.text}\n"
    for said in ("notes goes on", "of them from the cache", "solver (no chat template)", "* notes"):
        assert said in done.stderr
    assert f"{two.num_prompt_tokens} tokens" in done.stderr


def test_what_cannot_be_done_is_told(zoo: Path) -> None:
    done = piped(zoo, "base", "--max-tokens", "2", lines="/model solver\n/sats\none\n")
    assert done.returncode == 1
    assert done.stdout.count("\n") >= 1
    assert "solver has no chat template: put one as chat_template.jinja" in done.stderr
    assert "no command /sats; did you mean /stats?" in done.stderr
    done = piped(zoo, "solver", lines="one\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert "zoo-chat: model solver has no chat template" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--chat-template-kwargs", "[1]"], "expected a JSON object"),
        (["nobody"], "no model 'nobody'"),
    ],
)
def test_bad_arguments_are_told(
    arguments: list[str], said: str, zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat_cli.main([str(zoo), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_zoo_without_templates_says_so(demo_zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat_cli.main([str(demo_zoo)]) == 2
    assert "no model of this zoo has a chat template" in capsys.readouterr().err


class _Typist:
    """A terminal with zoo-chat in it."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "blockzoo.runtime.chat_cli", *arguments]
        # a session of its own, with the terminal as its own: Ctrl-C reaches it as a key
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(slave)
        self.seen = ""

    def interrupt(self, answer: str) -> None:
        """Ctrl-C until there is an answer: one that comes right before readline waits is seen behind it."""
        for _ in range(20):
            self.type("\x03")
            if select.select([self._master], [], [], 5.0)[0]:
                break
        self.wait_for(answer)

    def wait_for(self, text: str) -> str:
        """Everything up to `text`, which is taken."""
        end = time.monotonic() + 100
        while text not in self.seen:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:
                pytest.fail(f"ended before {text!r}: {self.seen!r}")
        found, _, self.seen = self.seen.partition(text)
        return found

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._master)


def _take_terminal() -> None:
    import fcntl
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the tests may have been started without

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_on_a_terminal_keys_end_answers_and_the_chat(zoo: Path) -> None:
    typist = _Typist(
        str(zoo), "base", "--max-tokens", "40", "--temperature", "0", "--repetition-penalty", "1"
    )
    typist.wait_for("base> ")
    typist.interrupt("(Ctrl-D or /quit ends)")  # at the prompt
    typist.wait_for("base> ")
    typist.type("/model notes\n")
    typist.wait_for("notes goes on")
    typist.wait_for("notes> ")
    typist.type("Hello\n")
    typist.wait_for("notes> ")
    typist.type("/stats\n")
    typist.wait_for("turns")
    typist.wait_for("notes> ")
    typist.type("\x04")
    assert typist.close() == 0


def test_ctrl_c_ends_an_answer_between_two_steps(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say, seen = Chat.say, []

    def interrupted_say(self: Chat, text: str) -> Any:
        self.params = lambda model: SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True)
        write = self.write

        def press(piece: str) -> None:
            write(piece)
            signal.raise_signal(signal.SIGINT)

        self.write = press
        seen.append(say(self, text))
        return seen[-1]

    monkeypatch.setattr(Chat, "say", interrupted_say)
    monkeypatch.setattr(chat_cli, "_lines", lambda *_: iter(["one", "two"]))
    assert chat_cli.main([str(zoo), "base"]) == 0
    assert [(answer.finish_reason, answer.num_generated) for answer in seen] == [("abort", 1)] * 2
    assert capsys.readouterr().err.count("[ended]") == 2


def test_a_terminal_does_not_act_on_what_a_model_writes() -> None:
    assert chat_cli.printable("a\x1b[2J\r\n\tb\x9b\x7fé😀") == "a\ufffd[2J\ufffd\n\tb\ufffd\ufffdé😀"


def test_generate_takes_a_message(zoo: Path, llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--precision", "f32", "--max-tokens", "6"]
    assert generate.main([str(zoo), "base", "one", "--chat", "--system", "Be brief.", *options]) == 0
    messages = [{"role": "system", "content": "Be brief."}, *user("one")]
    params = SamplingParams(max_tokens=6, **DEFAULTS)  # type: ignore[arg-type]
    (expected,) = llm.chat("base", messages, params, progress=False)
    assert capsys.readouterr().out == f"{expected.text}\n"
    assert generate.main([str(zoo), "base", "one", *options]) == 0
    (plain,) = llm.generate("base", "one", SamplingParams(max_tokens=6, temperature=0.0), progress=False)
    assert capsys.readouterr().out == f"{plain.text}\n"
    assert generate.main([str(zoo), "solver", "one", "--chat", *options]) == 2
    assert "model solver has no chat template" in capsys.readouterr().err
    assert generate.main([str(zoo), "base", "one", "--system", "x", *options]) == 2
    assert "--system is for --chat" in capsys.readouterr().err
