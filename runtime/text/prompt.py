"""From what a request sends to token ids: a prompt, and the documents before it.

Each document is tokenized on its own, so that its tokens are the same in whatever prompt it stands, and those
of the published document of the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from blockzoo.runtime.api.errors import InvalidRequestError
from blockzoo.runtime.text.tokenizer import Tokenizer

MAX_DOCUMENTS = 256


class PromptTokens(NamedTuple):
    """The tokens of a prompt, and the (start, end) of each document among them."""

    token_ids: list[int]
    documents: tuple[tuple[int, int], ...]


def document_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    """A document as it stands at the start of a prompt: its tokens, and how many of them begin any prompt.

    Raises:
        InvalidRequestError: the text is empty or no valid Unicode.
    """
    lead, _ = tokenizer.around
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if not tokens:
        raise InvalidRequestError("a document is empty; expected at least one character")
    return [*lead, *tokens], len(lead)


def assemble(
    tokenizer: Tokenizer, prompt: str | Sequence[int], documents: Sequence[str] = ()
) -> PromptTokens:
    """The tokens of `documents`, in order, and of `prompt` behind them.

    Args:
        prompt: text, or token ids; what the tokenizer puts before a text (such as <s>) is put before the
            documents instead.

    Raises:
        InvalidRequestError: a text is empty or no valid Unicode, or there are too many documents.
    """
    whole = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not documents:
        return PromptTokens(whole, ())
    if isinstance(documents, str) or len(documents) > MAX_DOCUMENTS:
        seen = "a text" if isinstance(documents, str) else f"{len(documents)} texts"
        raise InvalidRequestError(f"documents is {seen}; expected a list of at most {MAX_DOCUMENTS} texts")
    lead = list(tokenizer.around[0])
    tokens, spans = list(lead), []
    for text in documents:
        with_lead, num_lead = document_tokens(tokenizer, text)
        start = len(tokens)
        tokens += with_lead[num_lead:]
        spans.append((start, len(tokens)))
    return PromptTokens(tokens + (whole[len(lead) :] if whole[: len(lead)] == lead else whole), tuple(spans))
