"""zoo-chat: a chat on the terminal, with any model of a zoo, which may change in the middle."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blockzoo.runtime.generate import add_engine_arguments, add_sampling_arguments, sampling_params

if TYPE_CHECKING:
    from rich.console import Console

    from blockzoo.runtime.api.request import SamplingParams
    from blockzoo.runtime.serve.llm_engine import LLMEngine

_HELP = """\
/model [NAME]   go on with another model, in the same conversation; without NAME: which there are
/system [TEXT]  set the system message; without TEXT: none
/clear          forget the conversation, but for the system message
/stats          tokens and times of the last answer
/help           this
/quit           end, as Ctrl-D does; Ctrl-C ends an answer
//...           a message that begins with a slash"""
_COMMANDS = ("model", "system", "clear", "stats", "help", "quit")
# of what a model writes, a terminal is to act on line breaks and tabs alone
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass
class Answer:
    """An answer, and what it took."""

    model: str
    text: str = ""
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated: int = 0
    first_token_seconds: float | None = None
    seconds: float = 0.0


@dataclass
class Chat:
    """A conversation, with one model at a time.

    Attributes:
        engine: of a zoo.
        model: that answers; see `use`.
        params: of a model, by its name.
        write: shows a piece of an answer.
        interrupted: asked after every step: whether to end the answer.
        template_kwargs: variables of chat templates.
        system: the system message, if any.
        history: messages after it, by turns of user and assistant.
        last: the last answer.
    """

    engine: LLMEngine
    model: str
    params: Callable[[str], SamplingParams]
    write: Callable[[str], object]
    interrupted: Callable[[], bool] = lambda: False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    history: list[dict[str, str]] = field(default_factory=list)
    last: Answer | None = None

    def use(self, model: str) -> None:
        """Go on with another model. Raises RequestError: there is none, or it has no chat template."""
        self.engine.tokenizer(model).chat_template_of(model)
        self.model = model

    def say(self, text: str) -> Answer:
        """Send a message and write the answer as it comes; both enter the history, also a part of an answer.

        Raises:
            RequestError: the message was refused, or the answer failed; the history is as before.
        """
        from blockzoo.runtime.api.errors import RequestError

        began = time.monotonic()
        message = {"role": "user", "content": text}
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        template = self.engine.tokenizer(self.model).chat_template_of(self.model)
        prompt = template.render([*system, *self.history, message], kwargs=self.template_kwargs)
        self.engine.add_request("chat", self.model, prompt, self.params(self.model))
        answer = Answer(self.model)
        try:
            while answer.finish_reason is None:
                aborted = self.engine.abort("chat") if self.interrupted() else None
                for output in self.engine.step() if aborted is None else [aborted]:
                    if output.finish_reason == "error":
                        raise RequestError(output.error or "the answer failed")
                    answer.text += output.text
                    answer.finish_reason = output.finish_reason
                    answer.num_prompt_tokens = output.num_prompt_tokens
                    answer.num_cached_tokens = output.num_cached_tokens
                    answer.num_generated = output.num_generated
                    if answer.first_token_seconds is None and output.token_ids:
                        answer.first_token_seconds = time.monotonic() - began
                    self.write(output.text)
        finally:
            self.engine.abort("chat")
            self.engine.rest()
        answer.seconds = time.monotonic() - began
        self.last = answer
        self.history += [message, {"role": "assistant", "content": answer.text}]
        return answer


def printable(text: str) -> str:
    """A text that a terminal shows and does not act on."""
    return text.translate(_CONTROLS)


class Terminal:
    """What is typed, and what is told beside the answers, on standard error."""

    def __init__(self, chat: Chat, console: Console) -> None:
        self.chat, self.console = chat, console
        self.failed = False

    def handle(self, line: str) -> bool:
        """Do what a line says; False: it ends the chat."""
        from blockzoo.runtime.api.errors import RequestError

        line = line.strip()
        if not line:
            return True
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].partition(" ")
                return self._command(name, rest.strip())
            answer = self.chat.say(line[1:] if line.startswith("//") else line)
            if answer.finish_reason in ("abort", "length"):
                why = "ended" if answer.finish_reason == "abort" else "at the most tokens (--max-tokens)"
                self.tell(f"[{why}]")
        except RequestError as error:
            self.failed = True
            self.tell(f"{error}")
            if type(error).__name__ == "PromptTooLongError" and self.chat.history:
                self.tell("the conversation is part of the prompt; /clear forgets it")
        return True

    def tell(self, text: str) -> None:
        """A line that is no answer."""
        self.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def _command(self, name: str, rest: str) -> bool:
        chat = self.chat
        if name == "quit":
            return False
        if name == "help":
            self.tell(_HELP)
        elif name == "model" and rest:
            chat.use(rest)
            self.tell(f"{rest} goes on")
        elif name == "model":
            for model in chat.engine.models:
                lacks = chat.engine.tokenizer(model).chat_template is None
                mark = "*" if model == chat.model else " "
                self.tell(f"{mark} {model}{' (no chat template)' if lacks else ''}")
        elif name == "system":
            chat.system = rest or None
            self.tell("the system message is set" if rest else "there is no system message")
        elif name == "clear":
            chat.history.clear()
            self.tell("the conversation is forgotten")
        elif name == "stats":
            self._stats()
        else:
            close = difflib.get_close_matches(name, _COMMANDS, n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help shows those there are"
            self.failed = True
            self.tell(f"there is no command /{name}; {hint}")
        return True

    def _stats(self) -> None:
        from rich.table import Table

        last = self.chat.last
        if last is None:
            self.tell("there is no answer yet")
            return
        table = Table(show_header=False, box=None, style="dim")
        context = last.num_prompt_tokens + last.num_generated
        first = last.first_token_seconds
        after = last.seconds - (first or 0.0)
        rows = {
            "model": last.model,
            "prompt": f"{last.num_prompt_tokens} tokens, {last.num_cached_tokens} of them from the cache",
            "answer": f"{last.num_generated} tokens, ended by {last.finish_reason}",
            "first token": "none" if first is None else f"{first * 1e3:.0f} ms",
            "then": f"{(last.num_generated - 1) / after:.1f} tokens/s" if last.num_generated > 1 else "",
            "context": f"{context} of {self.chat.engine.max_model_len(last.model)} tokens",
            "turns": str(len(self.chat.history) // 2),
        }
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table, highlight=False, markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zoo-chat",
        description="Chat with a model of a zoo. Sampling is as the model's generation_config.json has it, "
        "where nothing else is said.",
        epilog=f"In the chat:\n{_HELP}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("zoo", metavar="ZOO", help="zoo directory")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="default: the first with a chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    add_sampling_arguments(parser)
    add_engine_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 after a message on standard error, or 1 where a piped line failed."""
    args = _parser().parse_args(argv)
    from blockzoo.engines.base import EngineError
    from blockzoo.runtime.api.errors import RequestError
    from blockzoo.zoo.errors import ZooError

    try:
        return _run(args)
    except (RequestError, ZooError, EngineError) as error:
        print(f"zoo-chat: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who reads the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from blockzoo.runtime import EngineConfig, LLMEngine

    sampling_params(args, {})  # a setting out of range is told before the engines are loaded
    kwargs = _json_object(args.chat_template_kwargs)
    console = Console(stderr=True)
    config = EngineConfig(
        backend=args.backend,
        device=args.device,
        precision=args.precision,
        int8_activations=args.int8_activations,
        kv_precision=args.kv_precision,
        max_num_seqs=1,
        kv_sharing="scope",  # all models' users are one here
    )
    with console.status("loading") if console.is_terminal else contextlib.nullcontext():
        engine = LLMEngine(args.zoo, config)
    typed, shown = sys.stdin.isatty(), sys.stdout.isatty()
    stop = _Interrupts()
    chat = Chat(
        engine,
        args.model or _first_model(engine),
        lambda model: sampling_params(args, engine.generation_defaults(model)),
        lambda text: print(printable(text) if shown else text, end="", flush=True),
        lambda: stop.seen,
        kwargs,
        args.system,
    )
    chat.use(chat.model)
    terminal = Terminal(chat, console)
    if typed:
        terminal.tell(f"{chat.model}, one of {len(engine.models)}; /help shows what else can be typed")
    for line in _lines(typed, (lambda: f"{chat.model}> ") if shown else str):
        num_answers = len(chat.history)
        with stop.caught():
            if not terminal.handle(line):
                break
        if len(chat.history) > num_answers:
            print(flush=True)
    return 1 if terminal.failed and not typed else 0


def _lines(typed: bool, prompt: Callable[[], str]) -> Iterator[str]:
    """What is typed or piped in, a line each."""
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not typed:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() a history and editing)
    while True:
        try:
            yield input(prompt())
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit ends)")


class _Interrupts:
    """Ctrl-C noted instead of raised: within a step an exception would leave the engine in the middle."""

    seen = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        self.seen = False
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, *_: object) -> None:
        self.seen = True


def _json_object(text: str) -> dict[str, Any]:
    from blockzoo.runtime.api.errors import InvalidRequestError

    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise InvalidRequestError(f"--chat-template-kwargs is {text!r:.80}; expected a JSON object")


def _first_model(engine: LLMEngine) -> str:
    from blockzoo.runtime.api.errors import InvalidRequestError

    for model in engine.models:
        if engine.tokenizer(model).chat_template is not None:
            return model
    raise InvalidRequestError(
        "no model of this zoo has a chat template: put one as chat_template.jinja into a model's folder and "
        "compile it again (zoo-generate completes plain texts)"
    )


if __name__ == "__main__":
    sys.exit(main())
