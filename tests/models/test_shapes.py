"""In the tests every public function refuses arrays of other shapes than it is annotated with."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from qk_jax.diffusion import flow
from qk_jax.models import layers, mmdit, qwen_vl
from qk_jax.pictures.fitting import cover

X = jnp.zeros((2, 6, 4))
TOWER = mmdit.MMDiT(mmdit.PRESETS["tiny_head"])
TOKENS, CONTEXT, *REST = TOWER.example()


@pytest.mark.parametrize(
    "call",
    [
        lambda: flow.interpolate(X, X, jnp.zeros((3,))),  # another B
        lambda: flow.interpolate(X, X.astype(jnp.int32), jnp.zeros((2,))),  # another dtype
        lambda: jax.jit(flow.loss)(X, X, jnp.ones((2, 5))),  # traced
        lambda: mmdit.pack(X),  # an axis too few
        lambda: cover(np.zeros((8, 8, 3)), (8, 8)),  # numpy
        lambda: layers.abstract_params(TOWER, TOKENS, CONTEXT, REST[0][:, :0], *REST[1:]),
        lambda: layers.init_params(layers.Embed(8, 4), jax.random.key(0), jnp.zeros((2, 3))),
        lambda: layers.abstract_params(
            qwen_vl.QwenVL(qwen_vl.PRESETS["tiny"]), *(jnp.zeros((1, 8), jnp.int32),) * 3, X, ()
        ),
    ],
)
def test_another_shape_is_refused(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_the_right_shapes_pass():
    params = layers.abstract_params(TOWER, TOKENS, CONTEXT, *REST)
    assert params["transformer_blocks"]["attn"]["to_q"]["kernel"].value.ndim == 3
    assert flow.loss(X.astype(jnp.bfloat16), X).shape == (2,)
