"""What the tiny autoencoder learns: scenes of cut-outs, composed where the step is computed.

Every picture is drawn anew inside the training step, so a GPU never waits for one. Cut-outs are
resampled as Pillow's bicubic filter resamples them and stand on whole pixels, as the tasks place
them; colours, shapes and grounds vary more than in any task, so that few cut-outs teach much.
Colours are float32 in [0, 1]; a layer [SIDE, SIDE, 4] holds colours times alpha, then alpha.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qk_jax.data.synthesis.scenes import SHAPES, TINTS, shape

SIDE = 64  # of a scene, and the most of a cut-out
MOST = 3  # cut-outs of a scene
LUMA = (0.299, 0.587, 0.114)
# How colours are changed, and how often: of one cut-out, of a whole scene.
CHANGES = ("none", "permuted", "grey", "negative", "mixed", "darker", "brighter")
OF_CUTOUTS = (0.62, 0.15, 0.06, 0.04, 0.07, 0.03, 0.03)
OF_SCENES = (0.88, 0.0, 0.03, 0.03, 0.0, 0.03, 0.03)


class Pool(NamedTuple):
    """Cut-outs, each in the middle of a transparent square.

    Attributes:
      rgba: uint8 [n, SIDE, SIDE, 4].
      box: int32 [n, 2, 2], (top, left) and (height, width) of the cut-out in its square.
    """

    rgba: np.ndarray
    box: np.ndarray


def pool(cuts: Sequence[np.ndarray]) -> Pool:
    """A pool of cut-outs uint8 [h, w, 4] of at most SIDE pixels, and of the tasks' plain shapes."""
    cuts = [*cuts, *(shape(*pair) for pair in itertools.product(SHAPES, TINTS))]
    rgba = np.zeros((len(cuts), SIDE, SIDE, 4), np.uint8)
    box = np.zeros((len(cuts), 2, 2), np.int32)
    for number, cut in enumerate(cuts):
        height, width = cut.shape[:2]
        top, left = (SIDE - height) // 2, (SIDE - width) // 2
        rgba[number, top : top + height, left : left + width] = cut
        box[number] = (top, left), (height, width)
    return Pool(rgba, box)


def pick(key: jax.Array, chances: Sequence[float]) -> jax.Array:
    """A number drawn with these chances."""
    return jnp.sum(jax.random.uniform(key) > np.cumsum(chances, dtype=np.float32)[:-1])


def recoloured(key: jax.Array, layer: jax.Array, chances: Sequence[float]) -> jax.Array:
    """A layer [..., 4] whose colours are changed in one of the ways of CHANGES."""
    kind, order, mix = jax.random.split(key, 3)
    same = jnp.eye(3)
    mixed = jax.random.exponential(mix, (3, 3))
    mixed = mixed / mixed.sum(1, keepdims=True)
    tables = jnp.stack([
        same, jax.random.permutation(order, same), jnp.tile(jnp.array(LUMA), (3, 1)), -same, mixed,
        same * 0.5, same * 0.5,
    ])  # fmt: skip
    added = jnp.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.5])
    chosen = pick(kind, chances)
    colours, alpha = layer[..., :3], layer[..., 3:]
    colours = colours @ tables[chosen].T + added[chosen] * alpha
    return jnp.concatenate([colours, alpha], -1)


def turned(key: jax.Array, rgba: jax.Array, box: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One square of a pool and its box, mirrored half of the time and seldom turned."""
    chances = jax.random.uniform(key, (3,)) < jnp.array([0.12, 0.12, 0.5])
    transposed, flipped = chances[0], chances[1:]
    rgba = jnp.where(transposed, rgba.swapaxes(0, 1), rgba)
    box = jnp.where(transposed, box[:, ::-1], box)
    for axis in range(2):
        rgba = jnp.where(flipped[axis], jnp.flip(rgba, axis), rgba)
    other = SIDE - box.sum(0)
    return rgba, box.at[0].set(jnp.where(flipped, other, box[0]))


def extent(key: jax.Array, size: jax.Array, cell: jax.Array, alone: jax.Array) -> jax.Array:
    """(height, width) in whole pixels at which a cut-out of `size` is drawn in a cell.

    One that stands alone mostly fills the picture or a part of it, and now and then reaches beyond.
    """
    kind, share, stretch, chance = jax.random.split(key, 4)
    low = jnp.array([1.0, 0.4, 1.0, 0.7])
    high = jnp.array([1.0, 1.0, 1.8, 1.1])
    chosen = jnp.where(alone, pick(kind, (0.4, 0.5, 0.1, 0.0)), 3)
    scale = jax.random.uniform(share, minval=low[chosen], maxval=high[chosen])
    scale = scale * jnp.min(cell / size)
    both = jnp.exp(jax.random.uniform(stretch, (2,), minval=-0.25, maxval=0.0))
    both = jnp.where(jax.random.uniform(chance) < 0.25, both, 1.0)
    return jnp.maximum(4.0, jnp.round(size * scale * both))


def item(key: jax.Array, cutouts: Pool, cell: jax.Array, alone: jax.Array) -> jax.Array:
    """The layer of a random cut-out in a cell ((top, left), (height, width)) of the scene."""
    which, turn, colour, size, place, middle = jax.random.split(key, 6)
    number = jax.random.randint(which, (), 0, len(cutouts.rgba))
    rgba, box = turned(turn, cutouts.rgba[number], cutouts.box[number])
    layer = rgba.astype(jnp.float32) / 255
    layer = jnp.concatenate([layer[..., :3] * layer[..., 3:], layer[..., 3:]], -1)
    layer = recoloured(colour, layer, OF_CUTOUTS)
    shown = extent(size, box[1], cell[1], alone)
    rest = cell[1] - shown
    part = jax.random.uniform(place, (2,))
    part = jnp.where(alone & (jax.random.uniform(middle) < 0.5), 0.5, part)
    corner = jnp.floor(cell[0] + part * rest + 0.5)
    scale = shown / box[1]
    layer = jax.image.scale_and_translate(
        layer, layer.shape, (0, 1), scale, corner - box[0] * scale, "cubic", antialias=True
    )
    alpha = jnp.clip(layer[..., 3:], 0, 1)
    return jnp.concatenate([jnp.clip(layer[..., :3], 0, alpha), alpha], -1)


def ground(key: jax.Array) -> jax.Array:
    """A background [SIDE, SIDE, 3]: white, a colour, or two that run into each other or alternate
    in stripes, squares or dots."""
    kind, colours, turn, step = jax.random.split(key, 4)
    chosen = pick(kind, (0.5, 0.24, 0.12, 0.05, 0.05, 0.04))
    first, second = jax.random.uniform(colours, (2, 3))
    at = jnp.arange(SIDE)
    step = jax.random.randint(step, (), 5, 14)
    cells = at // step
    gaps = jnp.square(at % (2 * step) - (2 * step - 1) / 2)
    across = jnp.stack([
        jnp.zeros((SIDE, SIDE)),
        jnp.zeros((SIDE, SIDE)),
        jnp.tile(jnp.linspace(0, 1, SIDE), (SIDE, 1)),
        jnp.tile(cells % 2, (SIDE, 1)),
        (cells[:, None] + cells) % 2,
        gaps[:, None] + gaps <= jnp.square(0.55 * step),
    ])[chosen][..., None]  # fmt: skip
    across = jnp.where(jax.random.uniform(turn) < 0.5, across.swapaxes(0, 1), across)
    first = jnp.where(chosen == 0, 1.0, first)
    return first + across * (second - first)


def scene(key: jax.Array, cutouts: Pool) -> jax.Array:
    """One scene [SIDE, SIDE, 3]: one to three cut-outs in a row or a column."""
    under, number, turn, colour, every = jax.random.split(key, 5)
    canvas = ground(under)
    count = 1 + pick(number, (0.55, 0.3, 0.15))
    upright = jax.random.uniform(turn) < 0.5
    index = jnp.arange(MOST)
    along = jnp.stack([index * SIDE / count, jnp.full(MOST, SIDE / count)], 1)
    cells = jnp.stack([jnp.broadcast_to(jnp.array([0.0, SIDE]), (MOST, 2)), along], 2)
    cells = jnp.where(upright, cells[:, :, ::-1], cells)
    draw = jax.vmap(item, (0, None, 0, None))
    layers = draw(jax.random.split(every, MOST), cutouts, cells, count == 1)
    for number in range(MOST):
        layer = jnp.where(number < count, layers[number], 0)
        canvas = canvas * (1 - layer[..., 3:]) + layer[..., :3]
    whole = jnp.concatenate([canvas, jnp.ones((SIDE, SIDE, 1))], -1)
    return recoloured(colour, whole, OF_SCENES)[..., :3]


def scenes(key: jax.Array, cutouts: Pool, count: int) -> jax.Array:
    """`count` scenes, uint8 [count, SIDE, SIDE, 3]."""
    made = jax.vmap(scene, (0, None))(jax.random.split(key, count), cutouts)
    return jnp.round(jnp.clip(made, 0, 1) * 255).astype(jnp.uint8)
