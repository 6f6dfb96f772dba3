"""Renders chat templates in a process of its own, whose time and memory the kernel bounds.

Run as a script, of which standard input is lines of JSON requests and standard output one line of JSON per
answer. It imports nothing of this package, so that it starts fast and without what surrounds it.

Jinja's sandbox keeps a template from reaching into Python, but not from using it up: `'a' * 10**10`, lists of
lists that double, one call in C that never returns. No check inside the interpreter catches all of that; here
a timer ends the process, and an allocation beyond its address space fails.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

sys.path += sys.argv[1:] if __name__ == "__main__" else []  # where the starting process finds jinja2

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

CPU_SECONDS = 2.0
"""Of one request, in the whole process."""
WALL_SECONDS = 60.0
MEMORY_BYTES = 512 << 20
"""Address space of the process, the interpreter included."""
MAX_OUTPUT_CHARS = 8_000_000
_NEEDLE = "blockzoo-needle"

Messages = list[dict[str, Any]]


class OutputTooLongError(Exception):
    """The text exceeds MAX_OUTPUT_CHARS."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what is trained on; here its body is put out as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's type)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of a type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.runtime.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a keyword, as in jinja
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.runtime.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}, which begins with '_'")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=32)
def compile_template(text: str) -> jinja2.Template:
    """A template as transformers compiles it. Raises jinja2.TemplateSyntaxError."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(text)


def render(text: str, messages: Messages, special_tokens: dict[str, str], variables: dict[str, Any]) -> str:
    """The text that a template makes of messages; `variables` go before special tokens.

    Raises OutputTooLongError, and whatever the template raises.
    """
    # found out without the request's own variables: it counts for others too
    tools = None if variables.get("tools") is None else ()
    reads = _reads(text, tools, tuple(special_tokens.items()))
    fitted = [_fitted_message(message, reads) for message in messages]
    return _render(text, fitted, {**special_tokens, **variables})


def _render(text: str, messages: Messages, variables: dict[str, Any]) -> str:
    parts, length = [], 0
    for part in compile_template(text).generate({**variables, "messages": messages}):
        parts.append(part)
        length += len(part)
        if length > MAX_OUTPUT_CHARS:
            raise OutputTooLongError
    return "".join(parts)


def _fitted_message(message: dict[str, Any], reads: Callable[[str], bool]) -> dict[str, Any]:
    """A message in the form that its template reads, of two that a client may send.

    Content in parts becomes one text, a line per part, where the template would write the list out. The
    arguments of a tool call become the object that they spell where the template writes objects.
    """
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list) and all(_is_text(part) for part in content) and not reads("parts"):
        message = {**message, "content": "\n".join(part["text"] for part in content)}
    if isinstance(calls, list) and any(_spelt(call) is not None for call in calls) and reads("arguments"):
        message = {**message, "tool_calls": [_with_object(call) for call in calls]}
    return message


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _spelt(call: object) -> dict[str, Any] | None:
    """The object that the arguments of a tool call spell, where they are a text that does."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return None
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _with_object(call: Any) -> Any:
    found = _spelt(call)
    return call if found is None else {**call, "function": {**call["function"], "arguments": found}}


@lru_cache(maxsize=32)
def _reads(text: str, tools: object, special_tokens: tuple[tuple[str, str], ...]) -> Callable[[str], bool]:
    """Whether a template reads content in "parts", or "arguments" that are objects: found by trying."""
    variables = {**dict(special_tokens), "tools": tools, "documents": None, "add_generation_prompt": False}
    user = {"role": "user", "content": "Hello"}
    call = {"name": "f", "arguments": {_NEEDLE: "a"}}
    samples: dict[str, Messages] = {
        "parts": [{"role": "user", "content": [{"type": "text", "text": _NEEDLE}]}],
        "arguments": [
            user,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}],
            },
            {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": "b"},
        ],
    }

    @cache
    def reads(what: str) -> bool:
        try:
            seen = _render(text, samples[what], variables)
        except (MemoryError, OutputTooLongError):
            raise
        except Exception:  # the template's, which may raise anything on what it does not read
            return False
        if what == "arguments":
            return f'"{_NEEDLE}"' in seen
        return _NEEDLE in seen and f"'{_NEEDLE}'" not in seen and f'"{_NEEDLE}"' not in seen

    return reads


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"text": ...}, or {"error": a kind, "message": what the template said}."""
    try:
        return {"text": render(**request)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except OutputTooLongError:
        return {"error": "length", "message": ""}
    except MemoryError:
        return {"error": "memory", "message": ""}
    except jinja2.TemplateError as error:
        return {"error": "raised", "message": str(error.message)[:2000]}
    except Exception as error:  # templates are code: whatever Python raises in them
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"[:2000]}


def main() -> None:
    """Answer requests until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    for timer in (signal.SIGPROF, signal.SIGALRM):  # whatever that process had done with them
        signal.signal(timer, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {timer})
    for line in sys.stdin.buffer:
        # both signals end the process, in whatever it is
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        try:
            found = answer(json.loads(line))
            written = json.dumps(found).encode()
        except MemoryError:
            found = {"error": "memory", "message": ""}
            written = json.dumps(found).encode()
        sys.stdout.buffer.write(written + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if found.get("error") == "memory":  # its heap is full of what failed
            return


if __name__ == "__main__":
    main()
