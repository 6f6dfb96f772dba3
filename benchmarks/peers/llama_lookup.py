"""Greedy answers of llama.cpp with its own prompt lookup: a process in llama.cpp's own environment.

    python llama_lookup.py MODEL.gguf THREADS TOKENS

Answers lines of JSON, {"prompt": [id], "most": tokens, "ends": [id], "guesses": tokens a step, 0 without}, by
{"seconds": of decoding behind the first token, "tokens": [id]}. TOKENS is the longest context.
"""

from __future__ import annotations

import json
import sys
import time

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding


def answer(llama: Llama, prompt: list[int], most: int, ends: list[int]) -> dict[str, object]:
    """Greedily."""
    tokens: list[int] = []
    start = 0.0
    for token in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        start = start or time.perf_counter()
        tokens.append(int(token))
        if len(tokens) == most or token in ends:
            break
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def main() -> None:
    """Serve standard input."""
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    models: dict[int, Llama] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        guesses = asked["guesses"]
        if guesses not in models:
            draft = LlamaPromptLookupDecoding(num_pred_tokens=guesses) if guesses else None
            models[guesses] = Llama(
                path,
                n_ctx=context,
                n_threads=threads,
                n_threads_batch=threads,
                draft_model=draft,
                verbose=False,
            )
        print(json.dumps(answer(models[guesses], asked["prompt"], asked["most"], asked["ends"])), flush=True)


if __name__ == "__main__":
    main()
