"""transformers and PEFT in f32 as the reference: how many tokens of an answer are the ones they would choose.

    python -m benchmarks.peers.hf JOBS.json     prints {model: {"agreement": share, "tokens": count}}

JOBS.json: {model: {"folder": HF or PEFT folder, "base": HF folder of a PEFT one or null,
"answers": [[prompt ids, generated ids], ...]}}. A process of its own, since torch's threads disturb others.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def agreement(job: dict[str, Any]) -> dict[str, float]:
    """The share of generated tokens that are the reference's first choice after the same tokens."""
    model = _load(job["folder"], job["base"])
    equal = total = 0
    for prompt, generated in job["answers"]:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *generated[:-1]]])).logits[0]
        chosen = logits[len(prompt) - 1 :].argmax(-1)
        equal += int((chosen == torch.tensor(generated)).sum())
        total += len(generated)
    return {"agreement": equal / total, "tokens": total}


def _load(folder: str, base: str | None) -> Any:
    if base is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(plain, folder).eval()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    jobs = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps({name: agreement(job) for name, job in jobs.items()}))
