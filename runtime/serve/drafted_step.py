"""A step that may have drafted rows: whose, how many, and what it has given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blockzoo.runtime.draft.row_choice import MOST_DRAFTED, Hopes, Option
from blockzoo.runtime.draft.step_cost import StepKind
from blockzoo.runtime.draft.tenants import Tenant
from blockzoo.runtime.serve.request_builder import Request


@dataclass(slots=True)
class DraftedStep:
    """A step that may have drafted rows.

    Attributes:
        requests: all that get a token.
        planning: seconds for guesses, runs of surrogates among them.
        seconds: of the step itself.
        hoped: of the drafted rows of each of the requests, how many were hoped to come true.
        is_priced: whether drafts have to do with what it took: it had some, or the step before, so that its
            shape is another one.
    """

    kind: StepKind
    requests: Sequence[Request]
    drafted: int = 0
    planning: float = 0.0
    seconds: float = 0.0
    hoped: Sequence[float] = ()
    is_priced: bool = False
    _generated: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._generated = tuple(request.num_generated for request in self.requests)

    def gains(self) -> dict[Tenant, tuple[float, float]]:
        """By tenant, of each of its requests: what was hoped for, and what has come, beyond the token that
        comes anyway."""
        found: dict[Tenant, list[tuple[float, int]]] = {}
        hoped = self.hoped or [0.0] * len(self.requests)
        for request, before, hope in zip(self.requests, self._generated, hoped, strict=True):
            found.setdefault(tenant_of(request), []).append((hope, request.num_generated - before - 1))
        return {
            tenant: (sum(hope for hope, _ in each) / len(each), sum(came for _, came in each) / len(each))
            for tenant, each in found.items()
        }


def tenant_of(request: Request) -> Tenant:
    """Whose a request is."""
    return request.model.name, request.seq.tenant


def may_draft(request: Request) -> bool:
    """Whether tokens may run behind the last one: not while approximate KV is being refreshed, as what is
    refreshed when would change, and with it the answer; nor before a guard has looked at what follows."""
    seq, approx = request.seq, request.seq.approx
    calm = approx is None or not (approx.first_pass or approx.is_guarded or approx.stale.size)
    ends = seq.num_uncomputed == 1 and not seq.lacks_prompt_logits  # a prompt may come token by token
    return request.params.speculate and calm and ends and num_left(request) > 0


def num_left(request: Request) -> int:
    """Tokens that may be drafted: of its last token nobody needs the KV."""
    return request.max_tokens - request.num_generated - 1


def scope_of(request: Request) -> tuple[str, str] | None:
    """Whose answers may be looked at: of the same scope and model; None: nobody's."""
    return None if request.seq.reuse == "off" else (request.seq.scope, request.model.name)


def shared_out(option: Option, hopes: Sequence[Hopes]) -> list[int]:
    """How many of a step's drafted rows each sequence gets: with surrogates as many as any other; else the
    likeliest guesses first, then fillers."""
    if option.runs:
        return [option.runs if each.may_draft else 0 for each in hopes]
    guesses = ((chance, index) for index, each in enumerate(hopes) for chance in each.chances)
    counts = [0] * len(hopes)
    for _, index in sorted(guesses, key=lambda guess: -guess[0])[: option.rows]:
        counts[index] += 1
    left = option.rows - sum(counts)
    for index, each in enumerate(hopes):
        more = min(left, MOST_DRAFTED - counts[index]) if each.may_draft else 0
        counts[index] += more
        left -= more
    return counts
