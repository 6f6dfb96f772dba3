"""A span -> its engine."""

from __future__ import annotations

from collections.abc import Callable

from blockzoo.engines.base import Engine, EngineMaker
from blockzoo.runtime.exec.topology import Span
from blockzoo.zoo.blocks import Block


def span_engine(maker: EngineMaker, span: Span, block: Callable[[str], Block]) -> Engine:
    """Compile a span; `block`: by id. Raises EngineError, and what `block` does."""
    return maker.span(
        [block(block_id) for block_id in span.block_ids],
        drops_rows=span.drops_rows,
        lora=dict(span.lora),
        scores=span.scores,
        drafts=span.drafts,
    )
