"""Compiles the Triton kernels for cards that are not here: machine code, and no more shared memory
than they have. Knows kernels and their arguments; a process with Triton's interpreter on cannot
run it."""

from __future__ import annotations

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvasir.engine.cuda import kernels
from kvasir.engine.cuda.decode import tile_of

BLOCK = 16
SHARED_MAX = 99 * 1024  # bytes, on L4; more on the others
# dtype, heads of a KV head, head size, shares, window, capped
SHAPES = [
    ("bf16", 4, 128, 32, 0, False), ("bf16", 4, 128, 1, 0, False), ("bf16", 1, 128, 2, 0, False),
    ("fp32", 4, 128, 2, 40, True), ("fp16", 8, 64, 1, 100, False), ("bf16", 4, 256, 4, 0, True),
]  # fmt: skip


def compile_all(capability: int) -> None:
    for dtype, group, dim, splits, window, capped in SHAPES:
        plane, out = f"*{dtype}", f"*{dtype}" if splits == 1 else "*fp32"
        types = {
            "query": plane, "key": plane, "value": plane, "tables": "*i32", "lengths": "*i32",
            "out": out, "lse": "*fp32", "scale": "fp32", "cap": "fp32", "query_stride": "i32",
            "slot_stride": "i32", "table_stride": "i32",
        }  # fmt: skip
        constants = {
            "GROUP": group, "GROUP_PAD": 1 if group == 1 else 16, "DIM": dim, "DIM_PAD": dim,
            "BLOCK": BLOCK, "TILE": tile_of(dim, 4 if dtype == "fp32" else 2), "SPLITS": splits,
            "WINDOW": window, "CAPPED": capped,
        }  # fmt: skip
        compiled(kernels.decode_shares, types, constants, capability)
    compiled(kernels.decode_merge, {"parts": "*fp32", "lse": "*fp32", "out": "*bf16"},
             {"DIM": 128, "DIM_PAD": 128, "SPLITS": 64}, capability)  # fmt: skip
    compiled(kernels.add_norm, {"x": "*bf16", "more": "*bf16", "weight": "*bf16", "out": "*bf16",
                                "eps": "fp32"},
             {"SIZE": 4096, "PAD": 4096, "ADDS": True}, capability)  # fmt: skip
    compiled(kernels.rotate_and_write,
             {"qkv": "*bf16", "cos": "*bf16", "sin": "*bf16", "norm": "*bf16", "slots": "*i64",
              "key": "*bf16", "value": "*bf16", "eps": "fp32", "rotation_stride": "i32"},
             {"ROTATED": 40, "HEADS": 32, "KV_HEADS": 8, "HALF": 64, "HALF_PAD": 64,
              "NORMED": True}, capability)  # fmt: skip
    compiled(kernels.gated, {"both": "*bf16", "out": "*bf16"}, {"SIZE": 14336, "TILE": 1024},
             capability)  # fmt: skip


def compiled(
    kernel: object, types: dict[str, str], constants: dict[str, object], capability: int
) -> None:
    """To machine code. Arguments come in this order, aligned as torch's allocator aligns them."""
    names = [*types, *constants]
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values())
               if kind != "fp32"}  # fmt: skip
    source = ASTSource(
        kernel, {**types, **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )  # fmt: skip
    options = {"num_warps": 4, "num_stages": 3}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert found.asm["cubin"]
    assert found.metadata.shared <= SHARED_MAX, f"{found.metadata.shared} bytes of shared memory"
