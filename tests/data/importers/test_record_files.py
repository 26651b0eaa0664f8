"""Record files: written examples are read back, fitted to the sizes of the training."""

import numpy as np
import pytest

from configs import stage3
from qk_jax.base.errors import InputError
from qk_jax.data import buckets, records
from qk_jax.data.example import TASKS, Example
from qk_jax.data.importers import registry
from qk_jax.data.synthesis import tasks
from qk_jax.pictures.fitting import contain, cover
from qk_jax.pictures.roles import REFERENCE, SOURCE
from tests.data import written

GIVEN = ("text_to_image", "editing", "composition")


@pytest.fixture(scope="module")
def examples():
    return [example for task in GIVEN for example in tasks.examples("validation", task, 12)]


def sources(folder, names, **data):
    config = stage3.get_config("tiny")
    config.data.update({"records": str(folder)} | data)
    return registry.make_sources(config, "train", 0, names)


def test_written_examples_are_read_back(examples, tmp_path):
    assert written.write(tmp_path / "train.array_record", examples) == 36
    for task, source in sources(tmp_path, GIVEN).items():
        expected = [example for example in examples if example.task == task]
        assert len(source) == len(expected)
        assert source.pictures_of.tolist() == [len(example.pictures) for example in expected]
        for number, example in enumerate(expected):
            got = source[number]
            assert (got.instruction, got.roles) == (example.instruction, example.roles)
            np.testing.assert_array_equal(got.target, example.target)
            for a, b in zip(got.pictures, example.pictures, strict=True):
                np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="no record of task customization"):
        sources(tmp_path, ["customization"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "singing"}, "task 'singing'"),
        ({"instruction": " "}, "the caption is ' '"),
    ],
)
def test_wrong_examples_are_named_and_leave_nothing(examples, tmp_path, change, words):
    wrong = examples[12]._replace(**change)
    with pytest.raises(InputError, match=f"example 1.* {words}"):
        written.write(tmp_path / "a.array_record", [examples[0], wrong])
    assert not list(tmp_path.iterdir())


def test_pictures_of_other_sizes_are_fitted_by_their_roles(tmp_path):
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200
    example = Example("both", wide, (wide, wide), (SOURCE, REFERENCE), TASKS[3], 0)
    written.write(tmp_path / "train.array_record", [example])
    found = sources(tmp_path, [TASKS[3]])[TASKS[3]][0]
    np.testing.assert_array_equal(found.target, cover(wide, (48, 80)))
    np.testing.assert_array_equal(found.pictures[0], found.target)
    np.testing.assert_array_equal(found.pictures[1], contain(wide, (64, 64)))


@pytest.mark.parametrize("ratios", [(), ((1, 1), (2, 3))])
def test_references_are_sized_by_their_number(tmp_path, ratios):
    """A source does not count, and neither does a picture beyond the three of the index."""
    wide = np.zeros((100, 150, 3), np.uint8)
    roles = [(SOURCE, *[REFERENCE] * n) for n in (1, 2, 3)] + [(REFERENCE,) * n for n in (1, 2, 4)]
    examples = [Example("x", wide, (wide,) * len(x), x, "composition", 0) for x in roles]
    written.write(tmp_path / "train.array_record", examples)
    sides = {"reference_ratios": ratios, "reference_sizes_by_number": (64, 48, 32)}
    source = sources(tmp_path, ["composition"], **sides)["composition"]
    tables = source.settings.reference_sizes
    for number, example in enumerate(source[i] for i in range(len(roles))):
        count = example.roles.count(REFERENCE)
        table = tables[min(count, 3) - 1]
        shown = table[int(buckets.nearest(100, 150, table))]
        pairs = zip(example.pictures, example.roles, strict=True)
        found = [picture.shape[:2] for picture, role in pairs if role == REFERENCE]
        squarest = table[int(buckets.nearest(1, 1, table))]
        assert found == [shown] * min(count, 3) + [squarest] * (count - 3), number


def test_covering_crops_evenly_and_containing_shows_all():
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 200
    covered = cover(wide, (64, 64))
    assert covered.shape == (64, 64, 3) and (covered[:, 4:-4] == 200).all()
    fitted = contain(wide, (60, 60))
    assert (fitted[:20] == 255).all() and (fitted[30, 5] == 0).all()


@pytest.mark.parametrize("counts", [(5, 6), (6, 5)])
def test_an_index_of_another_file_is_named(examples, tmp_path, counts):
    for name, count in zip(("train", "other"), counts, strict=True):
        written.write(tmp_path / f"{name}.array_record", examples[:count])
    records.index_path(tmp_path / "other.array_record").replace(
        records.index_path(tmp_path / "train.array_record")
    )
    with pytest.raises(InputError, match="belong to different versions"):
        sources(tmp_path, ["text_to_image"])["text_to_image"][0]
