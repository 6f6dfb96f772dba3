"""Runs scheduled tokens: sequences to rows, the executor, and what belongs around it.

    before   KV that is taken over arrives
    run      the rows of all sequences of a family, in one step of its executor
    after    hidden states are kept where chains part; approximate reuse goes on

A sequence whose rows cannot run fails alone; the others of its step run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from blockzoo.engines.base import PAGE_TOKENS
from blockzoo.runtime.exec.adapters import AdapterUnavailableError
from blockzoo.runtime.exec.executor import StepResult
from blockzoo.runtime.exec.interface import KVLostError, StepExecutor
from blockzoo.runtime.exec.rows import RowError, Rows
from blockzoo.runtime.kv.boundary import BoundaryCache
from blockzoo.runtime.kv.sequence import Part, TokenSequence
from blockzoo.runtime.serve.reuse_steps import ReuseSteps
from blockzoo.runtime.serve.scheduler import Scheduled

Advance = Callable[[Sequence[Scheduled]], None]
"""Notes that the KV of what was scheduled is written."""


@dataclass(slots=True)
class StepOutcome:
    """What a step gave; indices are into what was scheduled.

    Attributes:
        logits: float32 [n, vocab], valid until the next step, and whose rows they are: of the last token, and
            of those drafted behind it.
        prompt_logits: of prompts, likewise: whose they are, the place of the first row's token, the rows.
        failed: why a sequence did not run, or did not come to its end.
        num_calls, num_call_rows: engine calls made, and the rows that went through them.
    """

    logits: list[tuple[np.ndarray, list[int]]] = field(default_factory=list)
    prompt_logits: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    num_calls: int = 0
    num_call_rows: int = 0

    @contextmanager
    def blaming(self, index: int) -> Iterator[None]:
        """An error in the body is that sequence's, but for KVLostError."""
        try:
            yield
        except KVLostError:
            raise
        except Exception as error:  # a bug of ours: it ends one request
            traceback.print_exc()
            self.failed[index] = f"the engine failed: {error}"


class StepRunner:
    """Runs the sequences of one family at a time.

    Args:
        boundaries: where hidden states are kept at which other models' prefills start.
        reuse: what approximate reuse does around steps.
        shares_models: whether a request's KV, so its hidden states too, are of use to other models; those of
            published documents always are.
    """

    def __init__(self, boundaries: BoundaryCache, reuse: ReuseSteps, shares_models: bool) -> None:
        self._boundaries, self._reuse, self._shares_models = boundaries, reuse, shares_models

    def run(self, executor: StepExecutor, items: Sequence[Scheduled], advance: Advance) -> StepOutcome:
        """Write the KV of the scheduled tokens.

        Args:
            executor: of the sequences' family.
            items: what to run; pages are reserved.
            advance: called with what has run.

        Raises:
            KVLostError: a worker is lost; all sequences begin anew.
            Exception: the executor failed; none of the sequences can go on.
        """
        outcome = StepOutcome()
        batch: list[Rows] = []
        owners: list[tuple[int, Part]] = []
        for index, item in enumerate(items):
            with outcome.blaming(index):
                rows = self._rows_of(item, executor)
                batch += [row for row, _ in rows]
                owners += [(index, part) for _, part in rows]
        step, batch, owners = self._run_those_that_can(executor, items, batch, owners, outcome)
        if step is None:
            return outcome
        for member, scores in step.scores.items():
            index, part = owners[member]
            with outcome.blaming(index):
                self._reuse.add_scores(items[index].seq, part, scores)
        advance([item for index, item in enumerate(items) if index not in outcome.failed])
        self._keep_hidden(executor, items, batch, owners, step, outcome)
        guarded = self._guarded(items, owners, step)
        for index, (seq, _) in enumerate(items):
            if index not in outcome.failed:
                with outcome.blaming(index):
                    self._reuse.after(seq, executor.kv, guarded.get(index))
        held_back = {index for index in guarded if items[index].seq.num_uncomputed}
        for logits, members in step.logits:
            if held_back:
                told = [row for row, member in enumerate(members) if owners[member][0] not in held_back]
                logits, members = logits[told], [members[row] for row in told]
            self._sort_logits(items, owners, logits, members, outcome)
        outcome.num_calls, outcome.num_call_rows = step.num_calls, step.num_call_rows
        return outcome

    @staticmethod
    def _guarded(
        items: Sequence[Scheduled], owners: list[tuple[int, Part]], step: StepResult
    ) -> dict[int, np.ndarray]:
        """The logits, float32 [vocab], of sequences that a guard looks at, by index."""
        approx = ((index, item.seq.approx) for index, item in enumerate(items))
        guarded = {index for index, each in approx if each is not None and each.is_guarded}
        return {
            owners[member][0]: row
            for logits, members in step.logits
            if guarded
            for row, member in zip(logits, members, strict=True)
            if owners[member][0] in guarded
        }

    @staticmethod
    def _sort_logits(
        items: Sequence[Scheduled],
        owners: list[tuple[int, Part]],
        logits: np.ndarray,
        members: list[int],
        outcome: StepOutcome,
    ) -> None:
        """Tell rows from which tokens are chosen from those of prompts whose log-probabilities are asked for.

        A prompt's last row is both.
        """
        if not any(items[owners[member][0]].seq.lacks_prompt_logits for member in members):
            outcome.logits.append((logits, [owners[member][0] for member in members]))
            return
        wanted: dict[int, list[int]] = {}  # by index, its rows from which tokens are chosen
        for member, own in groupby(range(len(members)), key=members.__getitem__):
            index, part = owners[member]
            seq, places = items[index].seq, list(own)
            begin = part.end - len(places)
            if seq.lacks_prompt_logits:
                outcome.prompt_logits.append((index, begin, logits[places]))
            if part.end == seq.num_tokens:
                wanted[index] = places[-1 - len(seq.drafted) :]
        if wanted:
            rows = [place for places in wanted.values() for place in places]
            owners_of = [index for index, places in wanted.items() for _ in places]
            outcome.logits.append((logits[rows], owners_of))

    @staticmethod
    def _run_those_that_can(
        executor: StepExecutor,
        items: Sequence[Scheduled],
        batch: list[Rows],
        owners: list[tuple[int, Part]],
        outcome: StepOutcome,
    ) -> tuple[StepResult | None, list[Rows], list[tuple[int, Part]]]:
        while batch:
            try:
                return executor.run(batch), batch, owners
            except RowError as error:
                outcome.failed[owners[error.member][0]] = f"the engine failed: {error}"
            except AdapterUnavailableError as error:
                broken = [i for i, item in enumerate(items) if item.seq.chain_index == error.chain]
                outcome.failed |= dict.fromkeys(broken, str(error))
            left = [member for member, (index, _) in enumerate(owners) if index not in outcome.failed]
            batch, owners = [batch[member] for member in left], [owners[member] for member in left]
        return None, [], []

    def _keep_hidden(
        self,
        executor: StepExecutor,
        items: Sequence[Scheduled],
        batch: list[Rows],
        owners: list[tuple[int, Part]],
        step: StepResult,
        outcome: StepOutcome,
    ) -> None:
        for member, entry, hidden in step.hidden:
            index, part = owners[member]
            seq = items[index].seq
            with outcome.blaming(index):
                if batch[member].exit is not None:
                    self._reuse.keep_hidden(seq, part, hidden)
                else:
                    level = executor.chains[seq.chain_index].entries.index(entry)
                    self._boundaries.record(seq, seq.segments[level].boundary, part.start, hidden)

    def _rows_of(self, item: Scheduled, executor: StepExecutor) -> list[tuple[Rows, Part]]:
        seq, num_tokens = item
        parts = self._reuse.before(seq, executor.kv) + seq.parts(seq.end_after(num_tokens))
        found = [(self._rows(seq, part, executor), part) for part in parts]
        if seq.drafted:
            rows, part = found[-1]
            found[-1] = _with_drafted(rows, seq.drafted), part
        return found

    def _rows(self, seq: TokenSequence, part: Part, executor: StepExecutor) -> Rows:
        chain = executor.chains[seq.chain_index]
        first_pass = None if seq.approx is None else seq.approx.first_pass
        entry, leaves = chain.entries[part.level], False
        hidden = self._boundaries.entering(seq, part) if part.level else None
        # what enters above the first segment is exact in front: it runs to the end, and is done with
        if first_pass is not None and part.level == 0 and part.end <= first_pass.matched.size:
            leaves = first_pass.exits
            if first_pass.enters:
                assert chain.check is not None, "the first pass left there"
                entry, hidden = chain.check, first_pass.rows_entering(part.start, part.end)
        return Rows(
            seq.chain_index,
            seq.token_ids[part.start : part.end],
            part.start,
            seq.page_table,
            num_logits=max(
                part.end == seq.num_tokens and (first_pass is None or first_pass.done),
                seq.num_prompt_logits(part.end),
            ),
            entry=entry,
            hidden=hidden,
            # not of what stands behind approximate KV: others could not tell
            keeps_hidden=self._boundaries.max_bytes > 0
            and (self._shares_models or seq.publishes)
            and seq.reuse != "off"
            and seq.approx is None
            and part.start < seq.num_prompt_pages * PAGE_TOKENS,
            exit=chain.check if leaves else None,
            score_window=self._reuse.window(seq, part),
        )


def _with_drafted(rows: Rows, drafted: Sequence[int]) -> Rows:
    """Rows that end a sequence, and drafted tokens behind them: what follows each is of interest."""
    token_ids = np.concatenate([rows.token_ids, np.array(drafted, np.int32)])
    return rows._replace(token_ids=token_ids, num_logits=rows.num_logits + len(drafted))
