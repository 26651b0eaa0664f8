"""The table of shardings: what it says of the real sizes, reviewed as files, and its errors."""

import math
import pathlib

import jax
import pytest

from qk_jax import sharding
from qk_jax.bench import __main__ as bench
from qk_jax.bench import cost, shardings
from qk_jax.experiment import config as config_lib
from qk_jax.experiment.plan import Plan

NANO = "tests/training/nano.py:stage3"
GOLDEN = pathlib.Path(__file__).parent / "golden"
TABLES = {
    "stage1-20b-v6e-64": "configs/stage1.py:20b@v6e-64",
    "stage2-20b-paper": "configs/stage2.py:20b@paper",
    "stage3-20b-v5p-128": "configs/stage3.py:20b@v5p-128",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_those_that_were_reviewed(name, capsys):
    file = GOLDEN / f"{name}.txt"
    bench.main(["shardings", "--config", TABLES[name]])
    found = capsys.readouterr().out.splitlines()
    wanted = file.read_text(encoding="utf-8").splitlines()
    changed = [line for line in found if line not in wanted]
    assert found == wanted, (
        f"{len(changed)} lines of {file} changed, first {changed[:1]}; if that is meant: "
        f"python -m qk_jax.bench shardings --config {TABLES[name]} > {file}"
    )


def test_bytes_are_those_of_the_arrays_on_each_device():
    """Sums of the table against what each of eight devices really holds."""
    config = config_lib.load(NANO, {"sharding.mmdit": "zero2", "sharding_limit": "1.0"})
    mesh = sharding.build_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    plan = Plan.build(config, mesh, check=False)
    target = plan.state

    def on_each(tree):
        leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]  # without counters
        sizes = [math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves]
        return sum(sizes)

    found = shardings.parameters(config, sharding.abstract_mesh(dict(mesh.shape)))
    held = sum(one.held for one in found)
    assert held == on_each((target.params, target.opt_state, target.ema, plan.frozen))
    # the adapter of a ZeRO-2 tower is gathered; its gradient is not
    b = next(one for one in found if one.name == "lora/mmdit/transformer_blocks/attn/to_q/lora_a")
    copy = math.prod(b.shape) * 4
    assert (b.held, b.gathered, b.gradient) == (cost.copies(plan) * copy // 2, copy, copy // 2)


def test_a_real_size_needs_no_devices(capsys):
    bench.main(["shardings", "--config", "configs/stage2.py:20b", "--mesh", "fsdp=64,tensor=4"])
    lines = capsys.readouterr().out.splitlines()
    line = next(x for x in lines if x.startswith("mmdit/transformer_blocks/attn/to_q/kernel"))
    assert line.split()[1:8] == ["train", "60x3072x3072", ".,", "fsdp,", "tensor", "=", "33.75"]
    whole = next(x for x in lines if x.startswith("mmdit ")).split()
    assert whole[1] == "20,430,401,088" and whole[3] == "."
    # four float32 copies over 256 devices; what is too small to shard is less than a tenth more
    even = 16 * 20_430_401_088 / 256 / 2**20
    assert even <= float(whole[2]) < 1.1 * even


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (["--mesh", "fsdp=64;tensor=4"], "not of the form"),
        ([], "no -1"),  # the config's own
        (["--mesh", "speed=4"], "unknown"),
        (["--mesh", "tensor=3"], "does not divide by 3"),
    ],
)
def test_what_does_not_fit_is_named(mesh, words, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.main(["shardings", "--config", NANO, *mesh])
    assert leaving.value.code == 2 and words in capsys.readouterr().err
