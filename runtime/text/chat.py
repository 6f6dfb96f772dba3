"""Chat templates: messages -> the text that a model was trained to answer, as transformers makes it.

Which template counts, what it sees and what it may do follow `apply_chat_template` of transformers 5, but for
two forms of messages that are fitted to the template (`chat_worker`). A template is code from whoever made
the checkpoint: it is rendered in a process of its own, within bounds of time and memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockzoo.runtime.api.errors import InvalidRequestError, OverloadedError
from blockzoo.runtime.api.request import shown
from blockzoo.runtime.text.chat_messages import Continuation, PlainData, checked_list, checked_messages
from blockzoo.runtime.text.chat_process import WAIT_SECONDS, render_processes
from blockzoo.zoo.chat_files import special_tokens, templates
from blockzoo.zoo.errors import CheckpointError, ZooError

_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


class ChatTemplate:
    """The chat template of a tokenizer, or several with names. Thread-safe; renders one text at a time.

    Args:
        templates: texts by name; the one that is used without a name is "default", or with tools "tool_use".
        special_tokens: variables of the template, such as bos_token.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        # one template that takes its whole time each time must not keep the others from theirs
        self._one_at_a_time = threading.Lock()

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template in a folder of tokenizer files; None where there is none. Raises ZooError."""
        try:
            found = templates(folder)
            return cls(found, special_tokens(folder)) if found else None
        except CheckpointError as error:
            raise ZooError(f"{folder}: {error}; compile the model again") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the templates, sorted."""
        return tuple(sorted(self._templates))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        name: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, with its special tokens as text; `Tokenizer.encode` adds what is not there yet, once.

        Args:
            messages: of roles and fields that the template knows, at least one.
            tools: JSON schemas of functions.
            documents: for templates of retrieval models; objects with title and text.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end within the last message, for the model to go on from it.
            name: of a template; None: "tool_use" with tools, else "default".
            kwargs: further variables of the template, as enable_thinking; a special token's name replaces it.

        Raises:
            InvalidRequestError: messages, or another argument, of an unfit form; the template refuses them.
            PromptTooLongError: more than a template is given, or may make.
            OverloadedError: too many texts are being rendered.
        """
        template = self._template(name, tools)
        plain = PlainData()
        checked = checked_messages(messages, plain)
        end = None
        if continue_final_message:
            if add_generation_prompt:
                raise InvalidRequestError(
                    "continue_final_message and add_generation_prompt are both true; an answer either goes "
                    "on with the last message or begins a new one"
                )
            end = Continuation(checked, template)
        variables = {
            "tools": checked_list(tools, "tools", plain),
            "documents": checked_list(documents, "documents", plain),
            "add_generation_prompt": add_generation_prompt,
            **self._checked_kwargs(kwargs or {}, plain),
        }
        if not self._one_at_a_time.acquire(timeout=WAIT_SECONDS):
            raise OverloadedError("too many chats wait for this model's chat template; try again later")
        try:
            text = render_processes().render(template, checked, self._special_tokens, variables)
        finally:
            self._one_at_a_time.release()
        return text if end is None else end.cut(text)

    def _template(self, name: str | None, tools: object) -> str:
        if name is None:
            name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            names = ", ".join(self.names)
            raise InvalidRequestError(f"there is no chat template {name!r}; those of the model are: {names}")
        return self._templates[name]

    def _checked_kwargs(self, kwargs: Mapping[str, Any], plain: PlainData) -> dict[str, Any]:
        found = plain.take(kwargs, "chat_template_kwargs")
        if not isinstance(found, dict):
            raise InvalidRequestError(f"chat_template_kwargs is {shown(kwargs)}; expected an object")
        for name in _GIVEN:
            if name in found:
                raise InvalidRequestError(
                    f"chat_template_kwargs has {name!r}, which is an argument of its own"
                )
        return found
