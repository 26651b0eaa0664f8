"""FLOPs of a traced program from its jaxpr: what `training.flops` must give for a training step.

The matrix products and convolutions of a jaxpr are summed from their shapes, 2 per multiply-add,
loop bodies times their length. Traced without rematerialisation, the gradient of a loss holds just
the products that training needs: no backward pass of what is frozen and off the gradient's path.
"""

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.extend import core

from qk_jax.base import trees
from qk_jax.models.query_kontext import QueryKontext
from qk_jax.training.objectives.flow_matching import loss_fn
from qk_jax.training.padding import Padding
from qk_jax.training.step import step_batch

# Towers by the scope in which their products are traced, which starts with the module's class; the
# first that is found decides.
SCOPES = {
    "vision": r"QwenVL[^/]*/visual\b",
    "text": r"QwenVL",
    "connector": r"Connector",
    "mmdit": r"MMDiT",
    "vae": r"VAE",
    "other": r"",
}


def by_tower_of_step(plan, batch):
    """FLOPs by tower of the gradient of the mean loss on a batch (arrays or shapes)."""
    model = QueryKontext(dataclasses.replace(plan.model.config, remat=None), plan.model.dtype)
    loss = loss_fn(dataclasses.replace(plan, model=model))
    padding = Padding.from_config(plan.config).exact()
    latents = model.config.condition_latents

    def gradient(params, frozen, batch):
        pictures = (batch["target"], *(batch["conditions"] if latents else ()))
        encoded = [
            model.posterior_tokens(frozen, one, tokens)
            for one, tokens in zip(pictures, padding.tokens(batch), strict=False)
        ]
        inputs = step_batch(batch, encoded)

        def mean_loss(params):
            return jnp.mean(loss(trees.join(params, frozen), inputs, jax.random.key(0))[0])

        return jax.grad(mean_loss)(params)

    batch = padding.abstract(batch)
    return by_tower(jax.make_jaxpr(gradient)(plan.params, plan.frozen, batch).jaxpr)


def count(function, *args):
    """FLOPs of function(*args); args may be abstract."""
    return by_tower(jax.make_jaxpr(function)(*args).jaxpr).total()


def by_tower(jaxpr, scope="", fixed=()):
    """FLOPs of a jaxpr by the tower of SCOPES in whose module each product is traced.

    Args:
      jaxpr: with the jaxprs inside it; of branches, the most expensive counts.
      scope: names under which all of it was traced.
      fixed: variables of it that hold a constant matrix, whose products do not count.
    """
    total = Counter()
    fixed = {*fixed, *(x for x in jaxpr.constvars if x.aval.ndim > 1)}
    for eqn in jaxpr.eqns:
        known = [not isinstance(x, core.Literal) and x in fixed for x in eqn.invars]
        if any(known) and all(known[i] or x.aval.ndim == 0 for i, x in enumerate(eqn.invars)):
            fixed.update(eqn.outvars)
        total.update(_of_equation(eqn, f"{scope}/{eqn.source_info.name_stack}", known))
    return total


def _of_equation(eqn, scope, known):
    """FLOPs of one equation traced under `scope`; `known` says which operands are constant."""

    def within(jaxpr, operands, known):
        # A scan hands constants and carries to its body as they are, but the others slice by slice;
        # no program here carries a constant.
        same = [
            inner
            for inner, outer, is_fixed in zip(jaxpr.invars, operands, known, strict=False)
            if is_fixed and inner.aval.shape == outer.aval.shape
        ]
        return by_tower(jaxpr, scope, same)

    name = eqn.primitive.name
    if name in PRODUCTS:
        return {} if any(known) else {_tower(scope): PRODUCTS[name](eqn)}
    if name == "cond":
        branches = [within(x.jaxpr, eqn.invars[1:], known[1:]) for x in eqn.params["branches"]]
        return max(branches, key=Counter.total)
    times = eqn.params["length"] if name == "scan" else 1
    total = Counter()
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)  # a ClosedJaxpr holds one
        if hasattr(inner, "eqns"):
            found = within(inner, eqn.invars, known)
            total.update({tower: times * work for tower, work in found.items()})
    return total


def _tower(scope):
    """The key of SCOPES to which a scope such as 'transpose(jvp(MMDiT))/proj_out' belongs."""
    return next(name for name, pattern in SCOPES.items() if re.search(pattern, scope))


def _dot(eqn):
    """2 * batch * m * n * k."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[d] for d in contract)


def _convolution(eqn):
    """2 * outputs * taps * input channels per group.

    A transposed or input-gradient convolution is written with a dilated input, most taps of which
    meet zeros; those products are left out.
    """
    numbers = eqn.params["dimension_numbers"]
    kernel = eqn.invars[1].aval.shape
    taps = math.prod(kernel[d] for d in numbers.rhs_spec[2:])
    outputs = math.prod(eqn.outvars[0].aval.shape)
    work = 2 * outputs * taps * kernel[numbers.rhs_spec[1]]
    return work // math.prod(eqn.params["lhs_dilation"])


PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
