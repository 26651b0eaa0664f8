"""TensorFlow data sets, from one that is made here."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from configs import stage3
from qk_jax.base.errors import InputError
from qk_jax.data.importers import registry
from tests.data.importers import tfds_sets

COUNT = 20


class Shades(tfds_sets.Captioned):
    def _generate_examples(self):
        for shade in range(COUNT):
            buffer = io.BytesIO()
            image = Image.new("RGBA", (50, 30), (shade, 100, 100, 255))
            image.paste((shade, 0, 0, 0), (0, 0, 25, 30))  # the left half is transparent
            image.save(buffer, "PNG")
            buffer.seek(0)
            yield shade, {"image": buffer, "text": f"shade {shade}"}


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    builder = Shades(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    found = tfds.builder_from_directory(builder.data_path)
    monkeypatch.setattr(tfds, "builder", lambda name: found)


def sources(split="train", names=("text_to_image",), **data):
    config = stage3.get_config("tiny")
    config.data.records = "tfds:shades"
    config.data.update(data)
    return registry.make_sources(config, split, 0, list(names))


def test_captioned_pictures_are_read(prepared):
    source = sources()["text_to_image"]
    assert len(source) == COUNT
    seen = set()
    for number in range(COUNT):
        example = source[number]
        assert example.target.shape == (64, 64, 3) and not example.pictures
        assert example.instruction == f"shade {example.target[0, -1, 0]}"
        assert (example.target[:, :25] == 255).all()
        assert example.record == number
        seen.add(example.instruction)
    assert len(seen) == COUNT
    assert not source.pictures_of.any() and len(np.unique(source.size_of)) == 1


def test_what_it_does_not_have_is_named(prepared):
    with pytest.raises(InputError, match="no split"):
        sources("validation")
    with pytest.raises(InputError, match="text_to_image only"):
        sources(names=("text_to_image", "editing"))
    with pytest.raises(InputError, match="no feature 'caption', but "):
        sources(tfds_text="caption")


def test_an_unknown_data_set_is_named():
    with pytest.raises(InputError, match="tfds:shades"):
        sources()
