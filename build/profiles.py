"""Optimization profiles and plans: what the compiler is told about a block, and how fast the result is."""

import hashlib
from collections.abc import Callable
from importlib.metadata import version

from blockzoo.engines.base import EngineMaker
from blockzoo.engines.probe import time_block
from blockzoo.zoo.blocks import BlockSpec, StoredDtype
from blockzoo.zoo.fingerprint import canonical_json
from blockzoo.zoo.manifest import OptimizationProfileRecord, PlanRecord
from blockzoo.zoo.store import Zoo
from blockzoo.zoo.strict_json import encode

DECODE = OptimizationProfileRecord("decode", 1, 8, 64)
PREFILL = OptimizationProfileRecord("prefill", 64, 256, 512)
_REPEATS = 5


def plan_for(spec: BlockSpec, dtype: StoredDtype) -> PlanRecord:
    """The plan of a shape class. The head runs on the last row of each sequence only: it has no prefill."""
    profiles = (DECODE,) if spec.kind == "head" else (DECODE, PREFILL)
    versions = {"openvino": version("openvino"), "blockzoo": version("blockzoo")}
    return PlanRecord("openvino", spec, dtype, profiles, versions)


def plan_key(plan: PlanRecord) -> str:
    """The hash of everything the compiler sees."""
    return hashlib.sha256(canonical_json(encode(plan))).hexdigest()


def token_counts(plan: PlanRecord) -> tuple[int, ...]:
    """The token counts at which a plan's blocks are timed: the smallest and the best of every profile."""
    return tuple(sorted({count for profile in plan.profiles for count in (profile.min, profile.opt)}))


def measure(zoo: Zoo, maker: EngineMaker, progress: Callable[[str, int, int], None]) -> None:
    """Fill in the measured times of the blocks that have none, in the zoo's manifest.

    Blocks of one plan differ in their weights only, which the time does not depend on: one of them is timed
    (or was, by an earlier compilation) and stands for all.
    """
    blocks = zoo.manifest.blocks
    timed = {b.plan: (b.latency_block, b.latency_us) for b in blocks.values() if b.latency_us is not None}
    untimed = {block_id: block for block_id, block in blocks.items() if block.latency_us is None}
    first_of = {
        block.plan: block_id for block_id, block in reversed(untimed.items()) if block.plan not in timed
    }
    for done, (plan, block_id) in enumerate(first_of.items()):
        progress("timing blocks", done, len(first_of))
        block = zoo.read_block(block_id)
        counts = token_counts(zoo.manifest.plans[plan])
        times = {count: round(time_block(maker, block, count, _REPEATS), 1) for count in counts}
        block.drop_pages()
        timed[plan] = (block_id, times)
    progress("timing blocks", len(first_of), len(first_of))
    for block_id, record in untimed.items():
        measured, times_us = timed[record.plan]
        blocks[block_id] = record.with_latency(measured, times_us)
