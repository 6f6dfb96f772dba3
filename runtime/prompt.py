"""From what a request sends to token ids: a prompt, and the documents before it.

Each document is tokenized on its own, so that its tokens are the same in whatever prompt it stands, and those
of the published document of the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as AnySequence
from typing import NamedTuple

from blockzoo.runtime.errors import InvalidRequestError, PromptTooLongError
from blockzoo.runtime.tokenizer import Tokenizer

MAX_DOCUMENTS = 256
# A normalizer may compose characters (NFC: at most 9 bytes to 3, NFKC: 4 to 1). Some tokenizers also drop
# text, such as runs of white space, without any bound: of that as much is allowed, and more is refused.
_SHRINKS = 4


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
    prompt: str | AnySequence[int],
    documents: AnySequence[str] = (),
    max_tokens: int | None = None,
) -> PromptTokens:
    """The tokens of `documents`, in order, and of `prompt` behind them.

    Args:
        prompt: text, or token ids; what the tokenizer puts before a text (such as <s>) is put before the
            documents instead.
        max_tokens: of all together; None: any number. Tokenizing ends where it is passed.

    Raises:
        InvalidRequestError: a text is empty or no valid Unicode, or there are too many documents.
        PromptTooLongError: the documents make it longer than that, or the texts must be. (One of a prompt
            alone is for the caller to count.)
    """
    if isinstance(documents, str) or len(documents) > MAX_DOCUMENTS:
        seen = "a text" if isinstance(documents, str) else f"{len(documents)} texts"
        raise InvalidRequestError(f"documents is {seen}; expected a list of at most {MAX_DOCUMENTS} texts")
    if max_tokens is not None:
        check_size(tokenizer, [prompt, *documents] if isinstance(prompt, str) else documents, max_tokens)
    whole = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not documents:
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
