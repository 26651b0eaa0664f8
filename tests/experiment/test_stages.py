"""Rules that decide every leaf, and the stages of every size."""

import jax
import numpy as np
import pytest

from qk_jax import sharding
from qk_jax.base import trees
from qk_jax.base.errors import InputError
from qk_jax.experiment import config as config_lib
from qk_jax.experiment import stages
from qk_jax.experiment.plan import Plan

TREE = {
    "vlm": {"a": {"kernel": np.ones(2)}, "b": np.zeros(1)},
    "queries": {"embedding": np.ones(3)},
}


def test_split_follows_the_first_match_and_joins_again():
    rules = ((r"vlm/b", "train"), (r"vlm/.*", "freeze"), (r".*", "train"))
    trained, frozen = trees.split(TREE, rules)
    assert set(trained) == {"vlm", "queries"} and set(trained["vlm"]) == {"b"}
    assert set(frozen["vlm"]) == {"a"}
    jax.tree.map(np.testing.assert_array_equal, trees.join(trained, frozen), TREE)


@pytest.mark.parametrize(
    "rules, words",
    [
        (((r"vlm/.*", "freeze"),), "no rule covers 'queries/embedding'"),
        (((r".*", "train"), (r"vlm/.*", "freeze")), "'vlm/.*' decides no parameter"),
        (((r"vlm/(", "train"), (r".*", "freeze")), "no regular expression"),
        (((r".*", "trian"),), "must end in"),
    ],
)
def test_rules_that_do_not_decide_are_errors(rules, words):
    with pytest.raises(InputError, match=words):
        trees.split(TREE, rules)


def test_unknown_stage():
    with pytest.raises(InputError, match="stage4.*stage1, stage2"):
        stages.get("stage4")


def planned(spec):
    config = config_lib.load(spec)
    return config, Plan.build(config, sharding.build_mesh({"fsdp": 4, "tensor": 2}), check=False)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3", "highres"])
@pytest.mark.parametrize("size", ["tiny", "3b", "7b", "20b"])
def test_every_size_shards_and_trains_what_the_paper_says(stage, size):
    config, got = planned(f"configs/{stage}.py:{size}")
    heads = set(got.params) | {f"lora/{tower}" for tower in got.params.get("lora", {})} - {"lora"}
    heads.discard("lora")
    expected = {"queries", "connector"} | {
        "stage1": {"mmdit", "lora/vlm"},
        "stage2": {"mmdit"},
        "stage3": {"lora/mmdit"},
        "highres": {"lora/mmdit"},
    }[stage]
    assert heads == expected
    assert set(got.frozen) == {"vlm", "vae"} | ({"mmdit"} - expected)
    assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(got.params))
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(got.frozen)}
    assert kinds == {config.dtype.frozen}
    assert got.replicated_share <= 0.02


def test_sizes_of_the_big_towers():
    _, got = planned("configs/stage2.py:20b")
    count = lambda tree: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(got.params["mmdit"]) == 20_430_401_088
    assert round(count(got.params["connector"]) / 1e6, 1) == 51.4
