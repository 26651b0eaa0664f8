"""The price of Pallas kernels, for which the compiler makes no estimate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from qk_jax.bench.schedule import hlo_text, topologies
from qk_jax.bench.schedule.hlo_text import Array, Instruction

# Fractions of the bfloat16 peak that splash attention reaches, recomputed products included, where
# its heads fill the MXU. No table of the kernel alone is published; these follow from whole steps:
# 8B Llama at 64k tokens on v5p, whose attention is half of the FLOPs, runs at 53 % MFU (MaxText
# pull request 4687), which is 0.49 over forward and backward if the matmuls reach 0.75; here the
# two come to 0.48.
FORWARD_EFFICIENCY = 0.55
BACKWARD_EFFICIENCY = 0.45
# Side of the MXU, 128 where not listed (pages of v6e and tpu7x). A head of 128 fills half of 256:
# Wan 2.2 on TPU7x, two thirds attention, reports 384 of 1,153.5 TFLOP/s (MaxDiffusion pull request
# 487), 0.31 in the kernels if the rest reaches 0.7; here forward and backward come to 0.24.
MXU_SIDES = {"v6e": 256, "tpu7x": 256}
# Matrix products of a splash kernel, 2 T S D FLOPs per head each: the forward has Q K^T and P V;
# the backward kernels form Q K^T and dO V^T again, then dQ, or dK and dV, or all three.
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}
LANES = 128  # of a vector register


def seconds(
    call: Instruction, operands: Sequence[Instruction], where: topologies.Slice
) -> float | None:
    """Time of a kernel by its FLOPs or its bytes, whichever is longer; None if FLOPs are unknown.

    FLOPs are those that the kernel states, or those of splash attention.
    """
    stated = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', call.attributes)
    if stated:
        flops = int(stated[1])
    elif "splash" in call.name:
        arguments = [array for one in operands for array in hlo_text.arrays(one.shape)]
        mxu = MXU_SIDES.get(where.generation, 128)
        flops = splash_flops(call.name, arguments, hlo_text.arrays(call.shape), mxu)
    else:
        return None
    backward = re.search(r"_d(q|kv)_", call.name)
    efficiency = BACKWARD_EFFICIENCY if backward else FORWARD_EFFICIENCY
    nbytes = call.nbytes + sum(one.nbytes for one in operands)
    return max(flops / (efficiency * where.spec.peak_flops), nbytes / where.spec.hbm_bandwidth)


def splash_flops(name: str, operands: Sequence[Array], results: Sequence[Array], mxu: int) -> int:
    """FLOPs of a splash attention kernel from its shapes, heads filled up to the MXU's side.

    The masks are constants that the text leaves out. One that is computed in the kernel (causal or
    local) shows in a further operand, the positions of the queries, and is taken for causal: half
    of the blocks of scores, and the diagonal's, are computed.
    """
    q, k = [array for array in operands if array.dtype in ("bf16", "f32", "f16")][:2]
    *heads, length, size = q.dims
    keys = k.dims[-2]
    kind = next(kind for kind in ("dkv", "dq", "fwd") if f"_{kind}" in name)
    if kind == "dkv" and sum(len(array.dims) >= len(q.dims) for array in results) > 2:
        kind = "fused"
    whole = PRODUCTS[kind] * 2 * math.prod(heads) * length * keys * math.ceil(size / mxu) * mxu
    per_token = {(length, LANES), (keys, LANES), (8, length), (8, keys)}
    integers = sum(array.dtype == "s32" and array.dims[-2:] in per_token for array in operands)
    if integers <= (2 if "_segmented" in name else 0):
        return whole
    blocks = operands[0].dims[-1]  # along the keys: of the table of masks
    return whole * (blocks + 1) // (2 * blocks)
