"""Model FLOPs from the traced program: exact for every architecture, independent of a compiler.

A compiler's own count misses custom kernels and counts the body of a loop once. Here the matrix
products and convolutions of a jaxpr are summed from their shapes (2 per multiply-add), loop bodies
times their length; everything else is left out, as in every MFU. Traced without rematerialisation,
the gradient of a loss holds just the products that training needs: no backward pass of what is
frozen and off the gradient's path. Masked attention is counted as if it were full.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# bfloat16 peak of one JAX device in TFLOP/s by device_kind (vendors' published figures; a TPU7x
# chip is two devices).
PEAK_TFLOPS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H200": 989.4,
}
# Towers by the scope in which their products are traced, which starts with the module's class; the
# first that is found decides, 'other' is what stands in none.
TOWERS = {
    "vision": r"QwenVL(\.pool|[^/]*/visual\b)",
    "text": r"QwenVL",
    "connector": r"Connector",
    "mmdit": r"MMDiT",
    "vae": r"VAE",
    "other": r"",
}


def peak(device: Any) -> float | None:
    """bfloat16 FLOP/s of one device, or None when it is not known."""
    tera = PEAK_TFLOPS.get(device.device_kind)
    return tera * 1e12 if tera else None


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products and convolutions of function(*args); args may be abstract."""
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr: Any) -> int:
    """FLOPs of a jaxpr, with the jaxprs inside it; of a branch, the dearest."""
    return sum(by_tower(jaxpr).values())


def by_tower(jaxpr: Any, scope: str = "") -> Counter[str]:
    """FLOPs of a jaxpr by the tower of `TOWERS` in whose module each product is traced.

    Args:
      jaxpr: with the jaxprs inside it; of a branch, the dearest counts.
      scope: names under which all of it was traced.
    """
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        name = eqn.primitive.name
        if name == "dot_general":
            total[tower(here)] += _dot(eqn)
        elif name == "conv_general_dilated":
            total[tower(here)] += _convolution(eqn)
        elif name == "cond":
            branches = [by_tower(branch.jaxpr, here) for branch in eqn.params["branches"]]
            total.update(max(branches, key=Counter.total))
        else:
            times = eqn.params["length"] if name == "scan" else 1
            for inner in _inner(eqn.params):
                for part, work in by_tower(inner, here).items():
                    total[part] += times * work
    return total


def tower(scope: str) -> str:
    """The key of `TOWERS` to which a scope such as 'transpose(jvp(MMDiT))/proj_out' belongs."""
    return next(name for name, pattern in TOWERS.items() if re.search(pattern, scope))


def _inner(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in params.values():
        value = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds one
        if hasattr(value, "eqns"):
            found.append(value)
    return found


def _dot(eqn: Any) -> int:
    """2 * batch * m * n * k."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * int(np.prod(eqn.outvars[0].aval.shape)) * math.prod(shape[d] for d in contract)


def _convolution(eqn: Any) -> int:
    """2 * outputs * taps * input channels per group.

    A transposed or input-gradient convolution is written with a dilated input, most taps of which
    meet zeros; those products are left out.
    """
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    taps = math.prod(kernel[d] for d in numbers.rhs_spec[2:])
    channels = kernel[numbers.rhs_spec[1]]
    outputs = int(np.prod(eqn.outvars[0].aval.shape))
    return 2 * outputs * taps * channels // math.prod(eqn.params["lhs_dilation"])
