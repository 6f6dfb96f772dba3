"""Compiles every kernel for sm_90a, as a launch on an H100 does; run in a process of its own, without a GPU.

Pointers that torch allocates are divisible by 16, which decides whether loads are wide and pipelined.
Prints a line per kernel and variant: name, bytes of code, bytes of shared memory.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from blockzoo.engines.tensorrt import kernels, packed_kernels, row_kernels, score_kernels

LEAST_SHARED_MEMORY = 99 << 10  # of the GPUs that are served: RTX cards, L4, L40S
UNALIGNED = {*kernels.POINTERS, "windows"}
SHAPE = {"HEADS": 32, "KV_HEADS": 8, "D": 128}
ROWS = dict.fromkeys(("page_ids", "begins", "past_lens", "positions", "table_begins"), "*i32")
ROWS |= {"num_seqs": "i32", "scale": "fp32", "eps": "fp32", "windows": "*i32"}
POOL = {"qkv": "*bf16", "keys": "*bf16", "values": "*bf16"}
WIDE_POOL = dict.fromkeys(POOL, "*fp32")
NORMS = {"cos": "*fp32", "sin": "*fp32", "q_norm": "*bf16", "k_norm": "*bf16"}
PARTS = {"out": "*fp32", "sums": "*fp32", "parts": "*fp32", "tops": "*fp32", "totals": "*fp32"}
LORA = {"x": "*bf16", "a": "*bf16", "b": "*bf16", "y": "*bf16", "mask": "*bf16", "h": "*fp32", "out": "*fp32"}
LORA |= {"num_rows": "i32", "ranks": "i32", "splits": "i32"}

ROTATE = SHAPE | {"HALF": 64, "ROTATE": True, "NORM": True, "HAS_POSITIONS": False}
ATTEND = SHAPE | {"BLOCK_D": 128, "BLOCK_Q": 4, "BLOCK_M": 16, "BLOCK_N": 64, "SPLITS": 8, "WINDOW": 0}
ATTEND |= {"HAS_POSITIONS": False, "PRECISION": "tf32"}
PREFILL = ATTEND | {"BLOCK_Q": 16, "BLOCK_M": 64, "SPLITS": 1}
EXACT = {"BLOCK_N": 32, "PRECISION": "ieee"}
SCORES = SHAPE | {"BLOCK_D": 128, "BLOCK_M": 16, "BLOCK_N": 64, "WINDOW": 0, "PRECISION": "tf32"}
TILES = {"WIDTH": 4096, "BLOCK_T": 16, "BLOCK_R": 16, "PRECISION": "tf32"}
PACKED = {"x": "*bf16", "data": "*i8", "scales": "*fp32", "offsets": "*fp32", "added": "*bf16", "y": "*bf16"}
PACKED |= {"num_rows": "i32"}
PRODUCT = {
    "WIDTH": 4096,
    "OUT": 14336,
    "GROUP": 128,
    "STRIDE": 28672,
    "FOUR_BITS": False,
    "PRECISION": "tf32",
}
PRODUCT |= {"HAS_OFFSETS": False, "HAS_ADDED": False, "BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_K": 128}
MANY = {"BLOCK_T": 64, "BLOCK_O": 64}
FOUR = {"GROUP": 32, "FOUR_BITS": True, "HAS_OFFSETS": True, "HAS_ADDED": True, "BLOCK_K": 32}
SHRINK, EXPAND = TILES | {"BLOCK_K": 128}, TILES | {"STRIDE": 6144, "BLOCK_O": 128}

CASES: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, int]]] = [
    (kernels.rotate_and_write, ROWS | POOL | NORMS, ROTATE, {"num_warps": 1}),
    (
        kernels.rotate_and_write,
        ROWS | POOL | dict.fromkeys(NORMS, "*bf16"),
        ROTATE | {"ROTATE": False, "NORM": False, "HAS_POSITIONS": True},
        {"num_warps": 1},
    ),
    (kernels.attend, ROWS | POOL | PARTS, ATTEND, {"num_stages": 3}),
    (kernels.attend, ROWS | POOL | PARTS | {"out": "*bf16"}, PREFILL, {"num_stages": 3}),
    (
        kernels.attend,
        ROWS | POOL | PARTS | {"out": "*bf16"},
        PREFILL | {"WINDOW": 512, "HAS_POSITIONS": True},
        {"num_stages": 3},
    ),
    (kernels.attend, ROWS | WIDE_POOL | PARTS, PREFILL | EXACT, {"num_stages": 2}),
    (
        kernels.join_splits,
        PARTS | {"out": "*bf16"},
        {"D": 128, "BLOCK_D": 128, "SPLITS": 8, "BLOCK_S": 8},
        {"num_warps": 1},
    ),
    (score_kernels.softmax_sums, ROWS | POOL | PARTS, SCORES, {}),
    (score_kernels.softmax_sums, ROWS | WIDE_POOL | PARTS, SCORES | EXACT, {}),
    (score_kernels.add_scores, ROWS | POOL | PARTS, SCORES | {"WINDOW": 4096}, {}),
    (score_kernels.add_scores, ROWS | WIDE_POOL | PARTS, SCORES | EXACT, {}),
    (
        row_kernels.rms_norm,
        {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "eps": "fp32"},
        {"WIDTH": 4096, "BLOCK": 4096},
        {"num_warps": 8},
    ),
    (row_kernels.silu_times, {"gate_up": "*bf16", "out": "*bf16"}, {"WIDTH": 14336, "BLOCK": 1024}, {}),
    (packed_kernels.packed_product, PACKED, PRODUCT, {}),
    (packed_kernels.packed_product, PACKED, PRODUCT | MANY, {}),
    (packed_kernels.packed_product, PACKED | {"data": "*u8"}, PRODUCT | FOUR, {}),
    (packed_kernels.packed_product, PACKED | {"data": "*u8"}, PRODUCT | FOUR | MANY, {}),
    (row_kernels.lora_shrink, LORA, SHRINK, {}),
    (row_kernels.lora_shrink, LORA, SHRINK | {"BLOCK_T": 64}, {}),
    (row_kernels.lora_expand, LORA, EXPAND, {}),
    (row_kernels.lora_expand, LORA, EXPAND | {"BLOCK_T": 64}, {}),
]


def main() -> None:
    for kernel, signature, constants, options in CASES:
        names = kernel.arg_names
        types = {name: "constexpr" if name in constants else signature[name] for name in names}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name].startswith("*") and name not in UNALIGNED
        }
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4} | options)
        code, shared = compiled.asm["ptx"], compiled.metadata.shared
        assert ".target sm_90a" in code, kernel
        assert shared <= LEAST_SHARED_MEMORY, (kernel, shared)
        if kernel is kernels.attend:
            assert "cp.async" in code, "the loads of K and V are not pipelined"
        print(kernel.__name__, len(compiled.asm["cubin"]), shared)


main()
