"""Meshes, rows and columns of the sharding table, and the errors of both."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import LogicallyPartitioned
from jax.experimental import mesh_utils
from jax.sharding import PartitionSpec as P

from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.models import layers
from qk_jax.sharding.mesh import _ordered as ordered

TOWERS = sorted({tower for _, tower in sharding.TOWERS})
RULES = sharding.Rules()
TABLES = dict.fromkeys(TOWERS, RULES)
WHOLE = sharding.Rules(**{axis: () for axis in layers.LOGICAL_AXES})


def specs(tree, rules, mesh):
    """The PartitionSpecs of a boxed tree."""
    return jax.tree.map(lambda one: one.spec, sharding.shardings(tree, rules, mesh))


def rows_of(**towers):
    """The row 'fsdp' for every tower but those given."""
    return dict.fromkeys(TOWERS, sharding.row("fsdp")) | towers


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
    with pytest.raises(InputError, match="asks for 2 slices, the devices are in 1"):
        sharding.build_mesh({"fsdp": -1}, slices={"data": 2})


class Chip:
    """Stands in for a device of a TPU slice of which mesh_utils knows no order."""

    platform, device_kind, process_index = "tpu", "TPU v99", 0

    def __init__(self, number, slice_index=0):
        self.id, self.slice_index = number, slice_index

    def __repr__(self):
        return str(self.id)


def test_device_order_falls_back_to_jaxs_own(monkeypatch, caplog):
    asked = []

    def fails(*shape, devices=None, allow_split_physical_axes=False):
        asked.append(allow_split_physical_axes)
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(mesh_utils, "create_device_mesh", fails)
    monkeypatch.setattr(mesh_utils, "create_hybrid_device_mesh", fails)
    one = ordered([1, 4, 1, 2], [1, 1, 1, 1], [Chip(i) for i in range(8)])
    assert asked == [False, True] and "finds no device order" in caplog.text
    assert [chip.id for chip in one.reshape(-1)] == list(range(8)) and one.shape == (1, 4, 1, 2)
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    two = ordered([1, 2, 1, 2], [2, 1, 1, 1], chips)
    assert two.shape == (2, 2, 1, 2)
    assert [[chip.slice_index for chip in part.reshape(-1)] for part in two] == [[0] * 4, [1] * 4]


def test_specs_follow_the_tower_of_the_parameter():
    whole = dataclasses.replace(RULES, embed=(), heads=("fsdp", "tensor"))
    stacked = box((2, 8, 16), "layers", "embed", "heads")
    tree = {
        "vlm": {"language_model": {"q_proj": {"kernel": stacked}}},
        "mmdit": {"to_q": {"kernel": box((8, 16), "embed", "heads")}},
        "lora": {"mmdit": {"to_q": {"lora_b": box((2, 16), None, "adapter")}}},
    }
    got = specs(tree, TABLES | {"mmdit": whole}, mesh(fsdp=4, tensor=2))
    assert got["vlm"]["language_model"]["q_proj"]["kernel"] == P(None, "fsdp", "tensor")
    assert got["mmdit"]["to_q"]["kernel"] == P(None, ("fsdp", "tensor"))
    assert got["lora"]["mmdit"]["to_q"]["lora_b"] == P(None, "fsdp")


def test_a_parameter_of_no_tower_is_an_error():
    assert sharding.tower("alignment/proj/kernel") == "connector"
    assert sharding.tower("lora/vlm/visual/blocks/mlp/up_proj/lora_a") == "vision"
    with pytest.raises(InputError, match="parameter mmdit2/to_q/kernel belongs to no tower"):
        sharding.tower("mmdit2/to_q/kernel")


def test_a_spec_names_only_axes_with_several_devices():
    kernel = {"mmdit": {"to_q": {"kernel": box((8, 7), "embed", "heads")}}}
    got = lambda **shape: specs(kernel, TABLES, mesh(**shape))  # noqa: E731
    assert got(fsdp=8)["mmdit"]["to_q"]["kernel"] == P("fsdp", None)
    assert got(fsdp=4, context=2)["mmdit"]["to_q"]["kernel"] == P(("fsdp", "context"), None)
    assert got(data=8)["mmdit"]["to_q"]["kernel"] == P(None, None)


@pytest.mark.parametrize(
    ("row", "params", "gradients", "optimizer"),
    [
        ("zero1", P(None, "tensor"), P(None, "tensor"), P("fsdp", "tensor")),
        ("zero2", P(None, "tensor"), P("fsdp", "tensor"), P("fsdp", "tensor")),
        ("fsdp", P("fsdp", "tensor"), P("fsdp", "tensor"), P("fsdp", "tensor")),
        ("tensor", P(None, "tensor"), P(None, "tensor"), P(None, "tensor")),
        ("zero2_flat", P(None, None), P(("tensor", "fsdp"), None), P(("tensor", "fsdp"), None)),
    ],
)
def test_rows_are_what_their_names_say(row, params, gradients, optimizer):
    tree = {"mmdit": {"to_q": {"kernel": box((8, 16), "embed", "heads")}}}
    table = sharding.tables(dict.fromkeys(TOWERS, dataclasses.asdict(sharding.row(row))))
    for name, wanted in zip(sharding.COLUMNS, (params, gradients, optimizer), strict=True):
        got = specs(tree, sharding.column(table, name), mesh(fsdp=4, tensor=2))
        assert got["mmdit"]["to_q"]["kernel"] == wanted, name


def test_a_config_names_a_row_and_changes_a_cell():
    config = config_lib.load(
        "configs/stage2.py:tiny",
        {"sharding.mmdit": "zero2", "sharding.mmdit.activations.heads": "()",
         "sharding.text.params.embed": "fsdp,tensor"},
    )  # fmt: skip
    table = sharding.tables(config.sharding)
    changed = dataclasses.replace(sharding.ROWS["zero2"].activations, heads=())
    assert table["mmdit"] == dataclasses.replace(sharding.ROWS["zero2"], activations=changed)
    assert table["text"].params.embed == ("fsdp", "tensor")
    assert table["text"].optimizer == RULES
    again = sharding.tables(json.loads(config_lib.to_json(config))["sharding"])
    assert again == table  # as a checkpoint keeps it
    with pytest.raises(InputError, match="row 'zero4' is unknown; give one of zero1, zero2"):
        config_lib.load("configs/stage2.py:tiny", {"sharding.mmdit": "zero4"})
    with pytest.raises(InputError, match="did you mean 'sharding.mmdit.params.embed'"):
        config_lib.load("configs/stage2.py:tiny", {"sharding.mmdit.params.embd": "()"})


def test_a_misspelt_axis_is_an_error_in_rule_table_and_parameter():
    with pytest.raises(InputError, match="'mlp' is sharded over the mesh axis 'tensr'"):
        sharding.Rules(mlp=("tensr",))
    good = {tower: {} for tower in TABLES}
    for table, words in (
        ({"params": {"embed": ("fdsp",)}}, "sharding.text.params: 'embed'.*'fdsp'"),
        ({"activations": {"heads": ("tp",)}}, "sharding.text.activations: 'heads'.*'tp'"),
        ({"params": {"embd": ("fsdp",)}}, r"sharding.text.params .*\['embd'\]; known are adapter"),
        ({"moments": {}}, "sharding.text has the unknown columns"),
    ):
        with pytest.raises(InputError, match=words):
            sharding.tables(good | {"text": table})
    with pytest.raises(InputError, match="need exactly"):
        sharding.tables({"text": {}})
    with pytest.raises(InputError, match="mmdit/to_q/kernel.*'embd'"):
        specs({"mmdit": {"to_q": {"kernel": box((8, 8), "embd", "heads")}}}, TABLES, mesh(fsdp=8))
    with pytest.raises(InputError, match="mmdit/to_q/kernel carries no"):
        specs({"mmdit": {"to_q": {"kernel": np.zeros((8, 8))}}}, TABLES, mesh(fsdp=8))


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    tree = {"mmdit": {"mix": {"kernel": box((8, 8), "mlp", "heads")}}}
    with pytest.raises(InputError, match="mmdit/mix/kernel.*'mlp' and 'heads'.*'tensor'"):
        specs(tree, TABLES, mesh(fsdp=4, tensor=2))


def test_an_indivisible_dimension_names_the_parameter():
    tree = {"connector": {"fc1": {"kernel": box((12, 7), "embed", "mlp")}}}
    with pytest.raises(
        InputError, match="connector/fc1/kernel.*'mlp' of size 7.*sharding.connector"
    ):
        specs(tree, TABLES, mesh(fsdp=4, tensor=2))


TWO = {
    "mmdit": {"big": {"kernel": box((96, 128), "embed", "mlp")}},
    "connector": {"fc1": {"kernel": box((16, 16), "embed", "mlp")}},
}


def test_too_much_left_whole_is_refused():
    loose = rows_of(connector=sharding.Columns(WHOLE, WHOLE, WHOLE))
    on = mesh(fsdp=8)
    assert sharding.check_sharded(TWO, rows_of(), "optimizer", on) == 0.0
    for column in sharding.COLUMNS:
        assert 0.02 < sharding.check_sharded(TWO, loose, column, on, limit=0.05) < 0.05
        with pytest.raises(InputError, match=rf"2.0% .*'{column}'.*connector/fc1/kernel with 0.0"):
            sharding.check_sharded(TWO, loose, column, on)
        assert sharding.check_sharded(TWO, loose, column, mesh(data=8)) == 0.0  # nothing to split


def test_a_column_that_is_whole_on_purpose_is_no_offence():
    on = mesh(fsdp=8)
    zero1 = rows_of(mmdit=sharding.row("zero1"))
    assert sharding.check_sharded(TWO, zero1, "params", on) == 0.0
    assert sharding.check_sharded(TWO, zero1, "gradients", on) == 0.0
    forgotten = dataclasses.replace(sharding.row("zero1"), optimizer=WHOLE)
    with pytest.raises(InputError, match="'optimizer'.*mmdit/big/kernel"):
        sharding.check_sharded(TWO, rows_of(mmdit=forgotten), "optimizer", on)
    # tensor parallelism on a mesh without that axis splits nothing anywhere
    with pytest.raises(InputError, match="'params'.*mmdit/big/kernel"):
        sharding.check_sharded(TWO, rows_of(mmdit=sharding.row("tensor")), "params", on)


def test_batches_are_sharded_over_data_and_fsdp():
    found = sharding.batch_sharding(mesh(data=2, fsdp=2, tensor=2))
    assert found.spec == P(("data", "fsdp")) and found.shard_shape((8, 3)) == (2, 3)


def test_batch_rows_must_divide():
    sharding.check_batch(16, mesh(data=2, fsdp=4), rows_of())
    with pytest.raises(InputError, match="12 examples.*data x fsdp = 8 devices .the batch"):
        sharding.check_batch(12, mesh(data=2, fsdp=4), rows_of())
    flat = rows_of(mmdit=sharding.row("zero2_flat"))
    with pytest.raises(InputError, match="4 examples.*data x fsdp x tensor = 8 .*sharding.mmdit"):
        sharding.check_batch(4, mesh(fsdp=4, tensor=2), flat)
