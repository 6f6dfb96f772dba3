"""From what a request sends to token ids: a prompt, and the documents before it.

Each document is tokenized on its own, so that its tokens are the same in whatever prompt it stands, and those
of the published document of the same text.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from blockzoo.runtime.api.errors import InvalidRequestError, PromptTooLongError
from blockzoo.runtime.api.request import shown
from blockzoo.runtime.text.tokenizer import Tokenizer

MAX_DOCUMENTS = 256
# A normalizer may compose characters (NFC: at most 9 bytes to 3, NFKC: 4 to 1). Some tokenizers also drop
# text, such as runs of white space, without any bound: of that as much is allowed, and more is refused.
_SHRINKS = 4
Prompt = str | Sequence[int] | npt.NDArray[np.integer]
"""Text, or token ids: integers of any type in a list, or a 1-D array."""


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
    tokens = tokenizer.encode_part(text)
    if not tokens:
        raise InvalidRequestError("a document is empty; expected at least one character")
    return [*lead, *tokens], len(lead)


def max_prompt_bytes(tokenizer: Tokenizer, max_tokens: int) -> int:
    """Bytes of UTF-8 beyond which no text has at most `max_tokens` tokens, so that none need be tokenized to
    know that it is too long."""
    return _SHRINKS * tokenizer.longest_token * max_tokens


def check_size(tokenizer: Tokenizer, texts: Iterable[str], max_tokens: int) -> None:
    """Refuse texts that cannot have as few tokens together. Raises PromptTooLongError."""
    limit = max_prompt_bytes(tokenizer, max_tokens)
    size = 0
    for text in texts:
        if isinstance(text, str):  # anything else is refused where it is tokenized
            size += len(text) if len(text) > limit else len(text.encode("utf-8", "surrogatepass"))
        if size > limit:
            raise PromptTooLongError(
                f"the prompt has over {limit} bytes; the model takes at most {max_tokens} tokens, which hold "
                f"less (the longest has {tokenizer.longest_token} bytes): shorten it"
            )


def assemble(
    tokenizer: Tokenizer,
    vocab_size: int,
    prompt: Prompt,
    documents: Sequence[str] = (),
    max_tokens: int | None = None,
) -> PromptTokens:
    """The tokens of `documents`, in order, and of `prompt` behind them.

    What the tokenizer puts before a text (such as <s>) begins the whole, once, also where the texts have it;
    what it puts behind a text ends the whole. Token ids are taken as they are, but for a second <s> behind
    documents.

    Args:
        vocab_size: of the model: token ids are below it.
        max_tokens: of all together; None: any number. Tokenizing ends where it is passed.

    Raises:
        InvalidRequestError: a text is empty or no valid Unicode, there are too many documents, or what should
            be token ids is something else.
        PromptTooLongError: the documents make it longer than that, or the texts must be. (One of a prompt
            alone is for the caller to count.)
    """
    if isinstance(documents, str) or not isinstance(documents, (Sequence, np.ndarray)):
        seen = type(documents).__name__
        raise InvalidRequestError(f"documents is of type {seen}; expected a list of texts")
    if len(documents) > MAX_DOCUMENTS:
        raise InvalidRequestError(
            f"documents is {len(documents)} texts; expected a list of at most {MAX_DOCUMENTS} texts"
        )
    if max_tokens is not None:
        check_size(tokenizer, [prompt, *documents] if isinstance(prompt, str) else documents, max_tokens)
    whole = tokenizer.encode(prompt) if isinstance(prompt, str) else checked_ids(prompt, vocab_size)
    if not len(documents):
        return PromptTokens(whole, ())
    lead = list(tokenizer.around[0])
    behind = whole[len(lead) :] if whole[: len(lead)] == lead else whole
    tokens, spans = list(lead), []
    for index, text in enumerate(documents, 1):
        with_lead, num_lead = document_tokens(tokenizer, text)
        start = len(tokens)
        tokens += with_lead[num_lead:]
        spans.append((start, len(tokens)))
        if max_tokens is not None and len(tokens) + len(behind) > max_tokens:
            raise PromptTooLongError(
                f"the prompt has {len(tokens) + len(behind)} tokens with {index} of its {len(documents)} "
                f"documents; the model takes at most {max_tokens}, so that one can be generated: shorten it"
            )
    return PromptTokens(tokens + behind, tuple(spans))


def checked_ids(prompt: Sequence[int] | npt.NDArray[np.integer], vocab_size: int) -> list[int]:
    """Token ids as a list of int.

    Raises:
        InvalidRequestError: something else, an id outside [0, vocab_size), or a bool.
    """
    expected = f"expected a text, or a list or 1-D array of whole numbers from 0 to {vocab_size - 1}"
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise InvalidRequestError(
                f"the prompt is an array of {prompt.dtype} of shape {prompt.shape}; {expected}"
            )
        prompt = prompt.tolist()
    elif not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise InvalidRequestError(f"the prompt is of type {type(prompt).__name__}; {expected}")
    for index, token in enumerate(prompt):
        is_int = type(token) is int or (isinstance(token, numbers.Integral) and not isinstance(token, bool))
        if not is_int or not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"prompt[{index}] is {shown(token)} ({type(token).__name__}); {expected}"
            )
    return [int(token) for token in prompt]
