"""Optimization profiles and plans: what the compiler is told about a block."""

import hashlib
from importlib.metadata import version

from blockzoo.zoo.blocks import BlockSpec, Dtype
from blockzoo.zoo.fingerprint import canonical_json
from blockzoo.zoo.manifest import OptimizationProfileRecord, PlanRecord
from blockzoo.zoo.strict_json import encode

DECODE = OptimizationProfileRecord("decode", 1, 8, 64)
PREFILL = OptimizationProfileRecord("prefill", 64, 256, 512)


def plan_for(spec: BlockSpec, dtype: Dtype) -> PlanRecord:
    """The plan of a shape class. The head runs on the last row of each sequence only: it has no prefill."""
    profiles = (DECODE,) if spec.kind == "head" else (DECODE, PREFILL)
    versions = {"openvino": version("openvino"), "blockzoo": version("blockzoo")}
    return PlanRecord("openvino", spec, dtype, profiles, versions)


def plan_key(plan: PlanRecord) -> str:
    """The hash of everything the compiler sees."""
    return hashlib.sha256(canonical_json(encode(plan))).hexdigest()
