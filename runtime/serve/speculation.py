"""Speculative execution around steps: which guesses run with a step, and what came of them.

    plan(...)      drafters guess, or surrogates where that pays; as many guesses as pay run as further rows
                   of their sequences
    observe(...)   what the step cost; learn_costs(...) the same of some before there are requests
    judge(...)     which guesses came true, those that did not run too: that costs nothing

Answers do not depend on it (`Sampler.follow`), only when their tokens come.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

from blockzoo.runtime.draft.acceptance import Acceptance
from blockzoo.runtime.draft.balance import Balances
from blockzoo.runtime.draft.forced import ForcedTokens
from blockzoo.runtime.draft.guesses import Context, Drafter, Guess, chances, propose
from blockzoo.runtime.draft.lookup import AnswerLookup, PromptLookup
from blockzoo.runtime.draft.row_choice import MOST_DRAFTED, Hopes, RowChoice
from blockzoo.runtime.draft.step_cost import StepKind
from blockzoo.runtime.draft.tenants import ByTenant
from blockzoo.runtime.exec.interface import KVLostError, StepExecutor
from blockzoo.runtime.exec.topology import Family
from blockzoo.runtime.sampling.guided import NUM_STYLES
from blockzoo.runtime.serve.draft_models import DraftModels
from blockzoo.runtime.serve.drafted_step import (
    DraftedStep,
    may_draft,
    num_left,
    scope_of,
    shared_out,
    tenant_of,
)
from blockzoo.runtime.serve.request_builder import Request
from blockzoo.runtime.serve.scheduler import Scheduled, Scheduler
from blockzoo.runtime.serve.surrogate_drafts import NAME, Asked, first_rates, greedy_drafts, kinds

_OF_REQUEST = 64  # guesses of a kind that a request remembers, about
# after so many steps for which no guess is worth a row, guesses are made every so many
_PATIENCE, _EVERY = 8, 4
_LEARNT = ((1, 0), (1, 3), (1, 15), (8, 0), (8, 24))  # sequences, drafted rows: steps that run at first
_LEARNT_TIMES = 3
_SLOW_S = 0.1  # a step, of which they would take too long

Drafts = Callable[[Sequence[Request]], tuple[list[list[int]], list[float]]]
"""As many tokens as each request has drafted ones, or fewer where they cannot be had; seconds of the runs."""
OnDrafted = Callable[[str, str, int, int], None]
"""Of a model, a drafter: guesses that ran, and how many of them came true."""


class Speculation:
    """Of one engine; for its thread alone.

    Args:
        on_drafted: is told of guesses that ran.
        lone_only: speculate only for sequences that run alone: where steps are recorded, shapes are costly.
        drafters: besides the answers that were given; None: all that there are.
        models: smaller ones that guess for others.
    """

    def __init__(
        self,
        on_drafted: OnDrafted,
        lone_only: bool = False,
        drafters: Sequence[Drafter] | None = None,
        models: DraftModels | None = None,
    ) -> None:
        self._models = models
        self._on_drafted, self._lone_only = on_drafted, lone_only
        self._answers = AnswerLookup()
        own = _own_drafters() if drafters is None else tuple(drafters)
        self._drafters: tuple[Drafter, ...] = (*own, self._answers)
        self._tenants: ByTenant[Acceptance] = ByTenant()
        self._choices: dict[Family, RowChoice] = {}
        self._balances: dict[Family, Balances] = {}
        self._planned: dict[Family, DraftedStep] = {}
        self._done: dict[Family, DraftedStep] = {}  # the last, until it is known what it gave
        self._idle: dict[Family, int] = {}  # steps in a row without drafted rows

    def learn_costs(
        self, family: Family, run: Callable[[Sequence[int]], object], max_seqs: int, max_rows: int
    ) -> None:
        """See what steps of an executor take, with drafted rows and without: some 25 steps, where these are
        not slow.

        Args:
            run: a step of so many rows of each of some sequences.
            max_seqs, max_rows: of a step at most.
        """
        choice = self._choices.setdefault(family, RowChoice())
        wanted = [each for each in _LEARNT if each[0] <= max_seqs and sum(each) <= max_rows]

        def seconds(seqs: int, drafted: int) -> float:
            start = time.monotonic()
            run([1 + drafted // seqs] * seqs)
            return time.monotonic() - start

        seconds(1, 0)
        if seconds(1, 0) > _SLOW_S:
            return
        for seqs, drafted in wanted:
            seconds(seqs, drafted)  # kernels are made
        for seqs, drafted in wanted:
            for _ in range(_LEARNT_TIMES):
                choice.observe(StepKind(seqs, 1), drafted, seconds(seqs, drafted))
        choice.skip()

    def plan(
        self,
        family: Family,
        items: Sequence[Scheduled],
        requests: Mapping[str, Request],
        scheduler: Scheduler,
        executor: StepExecutor,
    ) -> None:
        """Add drafted rows to a step of one executor; surrogates run here."""
        start = time.perf_counter()
        self._settle(family)
        self._planned.pop(family, None)
        if any(item.num_tokens > 1 for item in items):
            return  # beside prompts no row is free, and their shapes are new anyway
        running = [requests[item.seq.request_id] for item in items]
        asking = [request for request in running if may_draft(request)]
        refreshed = sum(item.seq.approx.num_refreshing for item in items if item.seq.approx is not None)
        kind = StepKind(len(items) + refreshed, len({item.seq.chain_index for item in items}))
        step = self._planned[family] = DraftedStep(kind, running if asking else ())
        if not asking or (self._lone_only and len(items) > 1):
            return  # it tells what steps without drafts take
        balances = self._balances.setdefault(family, Balances())
        for request in asking:
            if request.acceptance is None:
                tenant = tenant_of(request)
                balances.of(tenant).welcome(1 / sum(tenant_of(other) == tenant for other in running))
                self._of(request)  # from now on it is known
        self._draft(family, step, asking, scheduler, executor, balances)
        step.planning = time.perf_counter() - start

    def _draft(
        self,
        family: Family,
        step: DraftedStep,
        asking: Sequence[Request],
        scheduler: Scheduler,
        executor: StepExecutor,
        balances: Balances,
    ) -> None:
        """Add guesses where they pay."""
        tenants = set(map(tenant_of, step.requests))
        at_stake = balances.at_stake(tenants)
        idle = self._idle[family] = self._idle.get(family, 0) + 1
        if idle > _PATIENCE and idle % _EVERY:
            return  # to guess takes time too, the more the more run
        for request in asking:
            self._guess(request)
        running, kind = step.requests, step.kind
        hopes = [self._hopes(request) for request in running]
        costs = [r.model.surrogate.cost for r in asking if r.model.surrogate is not None]
        choice = self._choices.setdefault(family, RowChoice())
        option = choice.choose(
            kind,
            hopes,
            scheduler.spare_rows,
            max(costs, default=1.0),
            at_stake,
            balances.trust(tenants),
        )
        if option.rows:
            self._idle[family] = 0
        counts = shared_out(option, hopes)
        step.hoped = [
            sum(each.within(option.runs)[:count]) for each, count in zip(hopes, counts, strict=True)
        ]
        by_chain: list[Request] = []
        by_model: list[Request] = []
        for request, each, count in zip(running, hopes, counts, strict=True):
            if count:
                scheduler.draft(request.seq, self._drafted(request, count))
                if request.seq.drafted and option.runs and each.prefers_surrogate(option.runs):
                    surrogate = request.model.surrogate
                    (by_model if surrogate is not None and surrogate.is_model else by_chain).append(request)
        seconds = list[float]()
        if by_chain:
            seconds += self._ask(by_chain, partial(self._chains_draft, executor), scheduler)
        if by_model and self._models is not None:
            seconds += self._ask(by_model, self._models.draft, scheduler)
        if seconds:
            choice.observe_runs(kind, seconds)

    def _hopes(self, request: Request) -> Hopes:
        rate, surrogate, ahead = self._of(request).rate, request.model.surrogate, list[float]()
        if surrogate is not None and surrogate.is_model:
            surrogate = surrogate if self._models is not None and self._models.may_follow(request) else None
        if surrogate is not None and may_draft(request) and request.sampler.guide is None:
            places = kinds(surrogate, min(MOST_DRAFTED, num_left(request)))
            ahead = chances([Guess(0, kind) for kind in places], rate)
        return Hopes(chances(request.guesses, rate), may_draft(request), ahead)

    @staticmethod
    def _ask(requests: Sequence[Request], drafts: Drafts, scheduler: Scheduler) -> list[float]:
        """Have surrogates say what has been drafted of requests; the seconds of their runs."""
        found: list[list[int]] = [[] for _ in requests]
        seconds: list[float] = []
        try:
            found, seconds = drafts(requests)
        except KVLostError:
            raise
        except Exception:  # a bug of ours: it takes nothing from the requests
            traceback.print_exc()
        for request, tokens in zip(requests, found, strict=True):
            assert request.model.surrogate is not None, "it was asked"
            if len(tokens) < len(request.seq.drafted):
                scheduler.end_draft(request.seq)
                continue
            request.seq.drafted = tuple(tokens)
            request.untried = request.guesses
            request.guesses = list(map(Guess, tokens, kinds(request.model.surrogate, len(tokens))))
        return seconds

    @staticmethod
    def _chains_draft(
        executor: StepExecutor, requests: Sequence[Request]
    ) -> tuple[list[list[int]], list[float]]:
        asked = [Asked(r.seq, r.model.surrogate.chain_index) for r in requests if r.model.surrogate]
        return greedy_drafts(executor, asked)

    def observe(self, family: Family, items: Sequence[Scheduled], seconds: float) -> None:
        """The step of an executor took so long."""
        step = self._planned.pop(family, None)
        choice = self._choices.setdefault(family, RowChoice())
        if step is None:
            choice.skip()
            return
        before, step.drafted = choice.last_drafted, sum(len(item.seq.drafted) for item in items)
        step.is_priced = step.drafted > 0 or before > 0
        choice.observe(step.kind, step.drafted, seconds)
        step.seconds = seconds
        self._done[family] = step

    def _settle(self, family: Family) -> None:
        """Note what the last step of an executor has won, now that its tokens are known."""
        step = self._done.pop(family, None)
        bare = None if step is None else self._choices[family].bare_seconds(step.kind)
        if step is not None and bare is not None:
            cost = (step.seconds / bare - 1 if step.is_priced else 0.0) + step.planning / bare
            for tenant, (hoped, came) in step.gains().items():
                balance = self._balances[family].of(tenant)
                balance.observe(came - cost)
                if step.drafted:
                    balance.hear(hoped, came)

    def judge(self, request: Request, token_ids: Sequence[int]) -> None:
        """Note what came in the place of a request's guesses: tokens of which all but the last had been
        drafted, so that no more is known."""
        ran = Counter(guess.kind.drafter for guess in request.guesses[: len(request.seq.drafted)])
        true = Counter[str]()
        for place, guess in enumerate(self._come_true(request, request.guesses, token_ids)):
            true[guess.kind.drafter] += place < len(request.seq.drafted)
        self._come_true(request, request.untried, token_ids)
        request.guesses = request.untried = ()
        for drafter, count in ran.items():
            self._on_drafted(request.model.name, drafter, count, true[drafter])

    def _come_true(self, request: Request, guesses: Sequence[Guess], token_ids: Sequence[int]) -> list[Guess]:
        """The guesses that came true, up to the first that did not; it is noted of all these."""
        found = []
        for guess, token_id in zip(guesses, token_ids, strict=False):
            self._of(request).note(guess.kind, guess.token_id == token_id)
            if guess.token_id != token_id:
                break
            found.append(guess)
        return found

    def remember(self, request: Request) -> None:
        """A request has its answer: others of its scope may be alike."""
        scope = scope_of(request)
        if request.params.speculate and scope is not None and request.num_generated:
            self._answers.remember(scope, request.seq.token_ids, request.seq.prompt_len)

    def keep(self, models: Collection[str]) -> None:
        """Forget what was learnt of any other model."""
        self._answers.keep(lambda scope: scope[1] in models)
        self._tenants.keep(models)
        for balances in self._balances.values():
            balances.keep(models)

    def _guess(self, request: Request) -> None:
        seq = request.seq
        context = Context(seq.token_ids, scope_of(request), request.sampler.guide)
        limit = min(MOST_DRAFTED, num_left(request))
        try:
            guesses = propose(self._drafters, context, limit, self._of(request).rate)
        except Exception:  # a bug of ours: it takes nothing from the request
            traceback.print_exc()
            guesses = []
        vocab_size = request.model.chain.vocab_size
        known = [0 <= guess.token_id < vocab_size for guess in guesses]
        request.guesses = guesses if all(known) else guesses[: known.index(False)]

    def _of(self, request: Request) -> Acceptance:
        if request.acceptance is None:
            first = first_rates(request.model.surrogate)
            tenant = self._tenants.of(tenant_of(request), lambda: Acceptance(first=first))
            tenant.fade(NAME)
            request.acceptance = Acceptance(tenant, _OF_REQUEST)
        return request.acceptance

    @staticmethod
    def _drafted(request: Request, count: int) -> list[int]:
        """So many tokens: guesses, and where they end the last one again, so that the shape stays."""
        ids = [guess.token_id for guess in request.guesses[:count]]
        most = request.model.max_len - request.seq.num_tokens
        filler = ids[-1] if ids else int(request.seq.token_ids[-1])
        return (ids + [filler] * (count - len(ids)))[:most]


def _own_drafters() -> tuple[Drafter, ...]:
    return ForcedTokens(), *map(ForcedTokens, range(NUM_STYLES)), PromptLookup()
