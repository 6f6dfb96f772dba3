"""An engine over workers in a process of its own, which may be killed: `python head.py ZOO FOLDER`.

Told "answer" it says which workers it has, and what it answers; told "begin" it begins to answer, and is busy
with that for long; told "close" it ends.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from blockzoo.runtime import EngineConfig, LLMEngine, SamplingParams

SETTINGS: dict[str, Any] = {"precision": "f32", "kv_cache_bytes": 32 << 20, "num_threads": 1}
PROMPT = "The river"


def answer(engine: LLMEngine) -> dict[str, list[int]]:
    """Greedy tokens, by model."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    found: dict[str, list[int]] = {model: [] for model in engine.models}
    for model in engine.models:
        engine.add_request(model, model, PROMPT, params)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id] += output.token_ids
    engine.check_integrity()
    return found


def main() -> None:
    """Serve one zoo."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    zoo, folder, *more = sys.argv[1:]
    settings = SETTINGS | {"workers": 2, "worker_folder": folder} | json.loads(more[0] if more else "{}")
    engine = LLMEngine(zoo, EngineConfig(**settings))
    for line in map(str.strip, sys.stdin):
        if line == "close":
            break
        found: dict[str, Any] = {"answers": answer(engine)} if line == "answer" else {}
        print(json.dumps({"pids": engine.worker_pids, **found}), flush=True)
        if line == "begin":  # and never end
            engine.add_request("long", "base", PROMPT, SamplingParams(max_tokens=4000, ignore_eos=True))
            while engine.has_unfinished():
                engine.step()
    engine.close()


if __name__ == "__main__":
    main()
