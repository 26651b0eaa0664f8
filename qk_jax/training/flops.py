"""Model FLOPs from the traced program: exact for every architecture, independent of a compiler.

A compiler's own count misses custom kernels and counts the body of a loop once. Here the matrix
products and convolutions of a jaxpr are summed from their shapes (2 per multiply-add), loop bodies
times their length; everything else is left out, as in every MFU. Traced without rematerialisation,
the gradient of a loss holds just the products that training needs: no backward pass of what is
frozen and off the gradient's path. Masked attention is counted as if it were full. A product with a
matrix that is part of the program, such as a permutation, is no work of the model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from qk_jax.base import trees
from qk_jax.base.types import Batch
from qk_jax.experiment.plan import Plan
from qk_jax.models import attention
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training.objectives.flow_matching import loss_fn

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
    "vision": r"QwenVL[^/]*/visual\b",
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


def of_step(plan: Plan, batch: Batch) -> int:
    """Model FLOPs of one training step on a batch (arrays or shapes)."""
    return sum(by_tower_of_step(plan, batch).values())


def by_tower_of_step(plan: Plan, batch: Batch) -> Counter[str]:
    """Model FLOPs of one training step by tower (`TOWERS`).

    They are those of the loss without rematerialisation and with plain attention, so that neither
    recomputation nor a kernel changes the count.
    """
    model = dataclasses.replace(plan.model.config, remat=None)
    plain = dataclasses.replace(plan, model=QueryKontext(model, plan.model.dtype))
    loss = loss_fn(plain)

    def gradient(params: Any, frozen: Any, batch: Any) -> Any:
        def mean_loss(trained: Any) -> jax.Array:
            return jnp.mean(loss(trees.join(trained, frozen), batch, jax.random.key(0))[0])

        return jax.grad(mean_loss)(params)

    with attention.kernel("xla"):
        traced = jax.make_jaxpr(gradient)(plan.params, plan.frozen, batch)
    return by_tower(traced.jaxpr)


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of the matrix products and convolutions of function(*args); args may be abstract."""
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr: Any) -> int:
    """FLOPs of a jaxpr, with the jaxprs inside it; of a branch, the dearest."""
    return sum(by_tower(jaxpr).values())


def by_tower(jaxpr: Any, scope: str = "", fixed: Iterable[Any] = ()) -> Counter[str]:
    """FLOPs of a jaxpr by the tower of `TOWERS` in whose module each product is traced.

    Args:
      jaxpr: with the jaxprs inside it; of a branch, the dearest counts.
      scope: names under which all of it was traced.
      fixed: variables of it that hold a matrix of the program, which no argument changes.
    """
    total: Counter[str] = Counter()
    fixed = {*fixed, *(x for x in jaxpr.constvars if x.aval.ndim > 1)}
    for eqn in jaxpr.eqns:
        known = [not isinstance(x, core.Literal) and x in fixed for x in eqn.invars]
        if any(known) and all(known[i] or x.aval.ndim == 0 for i, x in enumerate(eqn.invars)):
            fixed.update(eqn.outvars)
        total.update(_by_tower(eqn, f"{scope}/{eqn.source_info.name_stack}", known))
    return total


def _by_tower(eqn: Any, scope: str, known: list[bool]) -> dict[str, int]:
    """FLOPs of one equation traced under `scope`; `known` says which operands are fixed."""

    def within(jaxpr: Any, known: list[bool]) -> Counter[str]:
        pairs = zip(jaxpr.invars, known, strict=False)
        return by_tower(jaxpr, scope, [x for x, same in pairs if same])

    name = eqn.primitive.name
    if name in PRODUCTS:
        return {} if any(known) else {tower(scope): PRODUCTS[name](eqn)}
    if name == "cond":
        branches = [within(branch.jaxpr, known[1:]) for branch in eqn.params["branches"]]
        return max(branches, key=Counter.total)
    times = 1
    if name == "scan":
        times, known = eqn.params["length"], known[: eqn.params["num_consts"]]
    total: Counter[str] = Counter()
    for inner in _inner(eqn.params):
        total.update({part: times * work for part, work in within(inner, known).items()})
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


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
