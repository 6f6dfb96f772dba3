"""The arguments of zoo-serve as fields of EngineConfig."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of EngineConfig that the command line sets. Raises InvalidRequestError."""
    from blockzoo.runtime import EngineConfig

    settings = {
        "backend": args.backend,
        "device": args.device,
        "precision": args.precision,
        "int8_activations": args.int8_activations,
        "kv_precision": args.kv_precision,
        "kv_cache_bytes": None if args.kv_cache_gb is None else int(args.kv_cache_gb * 2**30),
        "enable_lora": args.enable_lora,
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_waiting": args.max_waiting,
        "tenant_weights": dict(args.tenant_weight) or None,
        "max_step_seconds": args.max_step_seconds,
        "max_model_len": args.max_model_len,
        # an ensemble's cancelled requests run on unnoticed: something must bound them
        "max_request_seconds": 600.0 if args.max_request_seconds is None else args.max_request_seconds,
        "kv_sharing": args.kv_sharing,
        "kv_reuse": None if args.kv_reuse == "on-request" else args.kv_reuse,
        "approximate": _approximate(args),
        "published_kv_share": args.published_kv_share,
        "kv_cache_dir": None if args.kv_cache_dir is None else str(Path(args.kv_cache_dir).resolve()),
        "kv_cache_dir_bytes": None if args.kv_cache_dir_gb is None else int(args.kv_cache_dir_gb * 2**30),
        "schedule": args.schedule,
        "speculate": args.speculate,
        "num_threads": args.threads,
        "strict": args.strict,
        "workers": args.workers,
        "move_spans_every_s": args.move_spans_every,
        "worker_memory_bytes": None if args.worker_memory_gb is None else int(args.worker_memory_gb * 2**30),
        "worker_interface": args.worker_interface,
        "ray_address": None if args.workers is None or args.replicas else args.ray_address,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    EngineConfig(**settings)
    return settings


def _approximate(args: argparse.Namespace) -> dict[str, float] | None:
    """Settings of approximate reuse, None: of `EngineConfig` itself. Raises InvalidRequestError."""
    from blockzoo.runtime.api.errors import InvalidRequestError

    settings = {"recompute": args.kv_recompute, "guard": args.kv_guard}
    settings = {name: value for name, value in settings.items() if value is not None}
    if not settings:
        return {} if args.kv_reuse == "on-request" else None
    if args.kv_reuse not in ("on-request", "approx"):
        raise InvalidRequestError(
            "--kv-recompute and --kv-guard are about --kv-reuse on-request or approx: add one of them"
        )
    return settings
