"""Meshes, checked rules, and a step on eight devices that equals the step on one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import LogicallyPartitioned
from jax.sharding import PartitionSpec as P

from qk_jax import sharding
from qk_jax.errors import InputError
from qk_jax.models import layers

RULES = sharding.Rules()
TABLES = dict.fromkeys(sorted({tower for _, tower in sharding.TOWERS}), RULES)


def mesh(**shape):
    return sharding.build_mesh(shape)


def box(shape, *axes, dtype=jnp.float32):
    return LogicallyPartitioned(jax.ShapeDtypeStruct(shape, dtype), axes)


def test_rules_have_one_field_per_logical_axis():
    assert {field.name for field in dataclasses.fields(sharding.Rules)} == layers.LOGICAL_AXES


@pytest.mark.parametrize(
    "shape, sizes",
    [
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"data": -1}, (8, 1, 1, 1)),
        ({"fsdp": 4, "context": 2}, (1, 4, 2, 1)),
    ],
)
def test_mesh_fills_the_one_open_axis(shape, sizes):
    built = sharding.build_mesh(shape)
    assert tuple(built.shape.values()) == sizes
    assert built.axis_names == sharding.MESH_AXES
    assert set(built.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "shape, words",
    [
        ({"data": 3}, "is 3 devices, there are 8; the nearest that fit: data=4,fsdp=2; or"),
        ({"fsdp": 4, "tensor": 4}, "fsdp=2,tensor=4; or fsdp=4,tensor=2; or"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"model": 2}, "model"),
        ({"fsdp": 0, "data": -1}, "positive"),
    ],
)
def test_mesh_refuses(shape, words):
    with pytest.raises(InputError, match=words):
        sharding.build_mesh(shape)


@pytest.mark.parametrize("text", ["fsdp", "fsdp=", "fsdp=a", "fsdp=2;tensor=2", ""])
def test_mesh_on_a_command_line(text):
    assert sharding.parse("fsdp=8,tensor=2") == {"fsdp": 8, "tensor": 2}
    with pytest.raises(InputError, match="not of the form"):
        sharding.parse(text)


def test_abstract_mesh_needs_no_devices():
    assert sharding.abstract_mesh({"fsdp": 64, "tensor": 4}).size == 256
    with pytest.raises(InputError, match="no -1"):
        sharding.abstract_mesh({"fsdp": -1})


def test_slices_may_only_span_batch_axes():
    with pytest.raises(InputError, match="span slices"):
        sharding.build_mesh({"fsdp": -1}, slices={"tensor": 2})
    with pytest.raises(InputError, match="3 slices"):
        sharding.build_mesh({"fsdp": -1}, slices={"data": 3})


def test_specs_follow_the_tower_of_the_parameter():
    whole = dataclasses.replace(RULES, embed=(), heads=("fsdp", "tensor"))
    stacked = box((2, 8, 16), "layers", "embed", "heads")
    tree = {
        "vlm": {"language_model": {"q_proj": {"kernel": stacked}}},
        "mmdit": {"to_q": {"kernel": box((8, 16), "embed", "heads")}},
        "lora": {"mmdit": {"to_q": {"lora_b": box((2, 16), None, "heads")}}},
    }
    got = sharding.specs(tree, TABLES | {"mmdit": whole}, mesh(fsdp=4, tensor=2))
    assert got["vlm"]["language_model"]["q_proj"]["kernel"] == P(None, "fsdp", "tensor")
    assert got["mmdit"]["to_q"]["kernel"] == P(None, ("fsdp", "tensor"))
    assert got["lora"]["mmdit"]["to_q"]["lora_b"] == P(None, ("fsdp", "tensor"))


def test_a_misspelt_axis_is_an_error_in_rule_table_and_parameter():
    with pytest.raises(InputError, match="'tensr'"):
        sharding.Rules(mlp=("tensr",))
    good = {tower: {} for tower in TABLES}
    with pytest.raises(InputError, match="'embd'"):
        sharding.tables(good | {"text": {"embd": ("fsdp",)}})
    with pytest.raises(InputError, match="need exactly"):
        sharding.tables({"text": {}})
    with pytest.raises(InputError, match="mmdit/to_q/kernel.*'embd'"):
        sharding.specs(
            {"mmdit": {"to_q": {"kernel": box((8, 8), "embd", "heads")}}}, TABLES, mesh(fsdp=8)
        )
    with pytest.raises(InputError, match="mmdit/to_q/kernel carries no"):
        sharding.specs({"mmdit": {"to_q": {"kernel": np.zeros((8, 8))}}}, TABLES, mesh(fsdp=8))


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    tree = {"mmdit": {"mix": {"kernel": box((8, 8), "mlp", "heads")}}}
    with pytest.raises(InputError, match="mmdit/mix/kernel.*'mlp' and 'heads'.*'tensor'"):
        sharding.specs(tree, TABLES, mesh(fsdp=4, tensor=2))


def test_an_indivisible_dimension_names_the_parameter():
    tree = {"connector": {"fc1": {"kernel": box((12, 7), "embed", "mlp")}}}
    with pytest.raises(
        InputError, match="connector/fc1/kernel.*'mlp' of size 7.*sharding.connector"
    ):
        sharding.specs(tree, TABLES, mesh(fsdp=4, tensor=2))


def test_too_much_left_replicated_is_refused():
    tree = {
        "mmdit": {"big": {"kernel": box((96, 128), "embed", "mlp")}},
        "connector": {"fc1": {"kernel": box((16, 16), "embed", "mlp")}},
    }
    loose = TABLES | {"connector": sharding.Rules(**{a: () for a in layers.LOGICAL_AXES})}
    on = mesh(fsdp=8)
    assert sharding.check_sharded(tree, TABLES, on) == 0.0
    assert 0.02 < sharding.check_sharded(tree, loose, on, limit=0.05) < 0.05
    with pytest.raises(InputError, match="connector/fc1/kernel"):
        sharding.check_sharded(tree, loose, on)
    assert sharding.check_sharded(tree, loose, mesh(data=8)) == 0.0  # nothing to shard over


def test_batch_rows_must_divide():
    sharding.check_batch(16, mesh(data=2, fsdp=4))
    with pytest.raises(InputError, match="12 rows"):
        sharding.check_batch(12, mesh(data=2, fsdp=4))


def test_gathered_drops_only_fsdp():
    on = mesh(fsdp=4, tensor=2)
    place = jax.sharding.NamedSharding(on, P("fsdp", None, "tensor"))
    assert sharding.gathered([place])[0].spec == P(None, None, "tensor")
