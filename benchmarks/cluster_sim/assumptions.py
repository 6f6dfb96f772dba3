"""What the simulations assume, said before their figures and kept with them."""

from __future__ import annotations

from benchmarks.cluster_sim.cluster import HEAD_S, HEAD_SEQ_S
from benchmarks.cluster_sim.devices import A100, DISK_BYTES_PER_S, NETWORK, NVLINK
from benchmarks.cluster_sim.runs import WARM
from benchmarks.cluster_sim.sides import BLOCKS, LORA_RANK, SCHEDULER, USABLE
from benchmarks.cluster_sim.traffic import Mix

_MIX = Mix()


def _paragraphs(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.strip().split("\n\n"))


LINES = _paragraphs(
    f"""
The real Scheduler, KVCache, RowChoice and placement run; GPUs do not: a call takes the longer of reading
(weights, KV, adapters) at {A100.memory_share:.0%} of the memory's rate and of arithmetic at
{A100.flops_share:.0%} of dense bf16, plus {A100.call_s * 1e6:.0f} us and {A100.layer_s * 1e6:.0f}
us a layer.
Rates of the data sheets: A100-80GB 2.04 TB/s, 312 Tflop/s; H200 4.8 TB/s, 989 Tflop/s. None of
that is measured.

Links: {NVLINK.latency_s * 1e6:.0f} us and {NVLINK.bytes_per_s / 1e9:.0f} GB/s within a server,
{NETWORK.latency_s * 1e6:.0f} us and {NETWORK.bytes_per_s / 1e9:.4g} GB/s between, without
contention; disks
{DISK_BYTES_PER_S / 1e9:.0f} GB/s. A step costs {HEAD_S * 1e3:g} ms and {HEAD_SEQ_S * 1e6:g} us a
sequence on the
host, meanwhile its GPUs may run other lanes.

Published (arXiv 2404.18322): 2 servers of 2 and 2 of 4 A100-80GB, 100 Gb/s, NVLink within. Its
applications,
models, rates and traces were not to be had, so the rest is ours.

Applications: popularity falls as 1 / rank^{_MIX.skew:g}; 60 % of LLaMA 7B, 40 % of 13B; half are
LoRAs of rank
{LORA_RANK}, 30 % have the last quarter of layers and the head of their own, 20 % share nothing.

Requests: sessions at random times (Poisson) of {_MIX.turns:g} turns on average, each with all that
was said
before; a turn's text has {_MIX.prompt:g} tokens, its answer {_MIX.answer:g} (medians, log-normal, sigma
{_MIX.sigma:g}), {_MIX.system} tokens begin every prompt of an application; {_MIX.think_s:g} s
between turns. Both
sides get the same.

{USABLE:.0%} of a GPU's memory is used, of which weights may take {BLOCKS:.0%}; what they leave is KV.

Scheduler: {SCHEDULER.max_num_seqs} sequences and {SCHEDULER.max_num_batched_tokens} tokens a step,
in each lane:
a model, or the applications that begin with the same span on a worker (two lanes where they go on
on others).

Per-model serving: every fine-tune, LoRAs too, is a model of merged weights, with its own scheduler
and KV; placed
and replicated by the same solver, packed several to a GPU, which runs their steps in the order in
which they
come; its heads are beside its GPUs, ours are all beside the first.

Figures count from {WARM:.0%} of the time on. Useful: the arithmetic of the tokens computed, over
the peak.
"""
)

OF_VALIDATION = _paragraphs(
    """
One engine on this machine, its steps one after the other; the simulation has its scheduler,
settings and pages, and the same requests at the same times.

Costs of steps are fitted to other requests, run before, between and behind the loads in the same
process; how far single steps are off them is drawn at random: from those requests' steps, and, "at its
speed", from the load's own.
"""
)
