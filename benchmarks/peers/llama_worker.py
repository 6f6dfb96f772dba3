"""A model in llama.cpp, told what to run line by line: a process in llama.cpp's own environment.

    python llama_worker.py MODEL.gguf THREADS SEQUENCES TOKENS_PER_SEQUENCE CONTEXT CHUNK

Answers "ready", then "done" to every line: `prefill N` (a new prompt up to its first token), `start N` (the
first N sequences back at CONTEXT + 1 tokens), `step` (one more token for each), `decode N` (N such steps of
one sequence). `generate N TOKEN...` is answered by the N likeliest tokens behind a prompt.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import llama_cpp as llama
import numpy as np


class Worker:
    """One context; the last sequence is for prompts."""

    def __init__(
        self, path: str, threads: int, num_seqs: int, seq_tokens: int, context: int, chunk: int
    ) -> None:
        self._silent = llama.llama_log_callback(lambda *_: None)
        llama.llama_log_set(self._silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        params = llama.llama_context_default_params()
        params.n_seq_max, params.n_ctx = num_seqs + 1, (num_seqs + 1) * seq_tokens
        params.n_batch = params.n_ubatch = max(chunk, num_seqs)
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context of {params.n_ctx} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._vocab: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(params.n_batch, 0, 1)
        self._rng = np.random.default_rng(0)
        self._prompts_at, self._past, self._chunk = num_seqs, context + 1, chunk
        self._num_cached = self._running = self._position = 0
        self._tokens: list[int] = []

    def prefill(self, num_tokens: int) -> None:
        """A new prompt, in chunks, up to its first token."""
        self._prompt(self._prompts_at, num_tokens)

    def start(self, count: int) -> None:
        """The first sequences after their prompts and one token more; what they have cached stays."""
        for seq in range(self._num_cached, count):
            self._prompt(seq, self._past)
        self._num_cached = max(self._num_cached, count)
        for seq in range(count):
            llama.llama_memory_seq_rm(self._memory, seq, self._past, -1)
        self._running, self._position, self._tokens = count, self._past, [2] * count
        self.step()

    def step(self) -> None:
        """One more token for each, greedily."""
        rows = range(self._running)
        self._tokens = self._run(self._tokens, [self._position] * self._running, rows, rows)
        self._position += 1

    def decode(self, num_steps: int) -> None:
        """Steps from the start, of one sequence."""
        self.start(1)
        for _ in range(num_steps - 1):
            self.step()

    def generate(self, num_tokens: int, *prompt: int) -> str:
        """Greedy tokens behind a prompt of at most a chunk."""
        seq, count = self._prompts_at, len(prompt)
        llama.llama_memory_seq_rm(self._memory, seq, 0, -1)
        tokens = self._run(prompt, range(count), [seq] * count, [count - 1])
        for position in range(count, count + num_tokens - 1):
            tokens += self._run(tokens[-1:], [position], [seq], [0])
        return " ".join(map(str, tokens))

    def _prompt(self, seq: int, num_tokens: int) -> None:
        llama.llama_memory_seq_rm(self._memory, seq, 0, -1)
        tokens = self._rng.integers(2, self._vocab, num_tokens).tolist()
        for begin in range(0, num_tokens, self._chunk):
            part = tokens[begin : begin + self._chunk]
            last = [len(part) - 1] if begin + self._chunk >= num_tokens else []
            self._run(part, range(begin, begin + len(part)), [seq] * len(part), last)

    def _run(self, tokens: Any, positions: Any, seqs: Any, wanted: Any) -> list[int]:
        """The likeliest token behind each of the `wanted` rows."""
        batch, wanted_rows = self._batch, set(wanted)
        batch.n_tokens = len(tokens)
        for i, (token, position, seq) in enumerate(zip(tokens, positions, seqs, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = seq, i in wanted_rows
        if code := llama.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode failed: {code}")
        rows = [llama.llama_get_logits_ith(self._context, row) for row in wanted]
        return [int(np.ctypeslib.as_array(row, (self._vocab,)).argmax()) for row in rows]


def main() -> None:
    """Serve standard input."""
    path, *numbers = sys.argv[1:]
    worker = Worker(path, *map(int, numbers))
    print("ready", flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        print(getattr(worker, command)(*map(int, arguments)) or "done", flush=True)


if __name__ == "__main__":
    main()
