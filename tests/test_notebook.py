"""docs/first_picture.ipynb runs from top to bottom, offline, and shows what its words say."""

import colorsys
import json
import pathlib

import pytest

from tests import needs

ROOT = pathlib.Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "first_picture.ipynb"
LARGEST = 200_000  # bytes of an output that is committed
# What a cell after the last one prints: the median of each picture's frame, where a background is.
ASK = """
import json
import numpy as np
frames = {}
for name, picture in {"blue": painted[0], "yellow": edited, "green": elsewhere}.items():
    pixels = np.asarray(picture)
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    frames[name] = np.median(frame, axis=0).tolist()
print(json.dumps(frames))
"""
HUES = {"yellow": (0.10, 0.20), "green": (0.22, 0.48), "blue": (0.50, 0.72)}


def read():
    return needs.module("nbformat").read(PATH, as_version=4)


def test_what_is_committed_is_small_and_valid():
    needs.module("nbformat").validate(read())
    for cell in read().cells:
        assert all(len(json.dumps(output)) < LARGEST for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook as it is after all its cells, and the one that asks, have run."""
    nbclient, book = needs.module("nbclient"), read()
    needs.module("ipykernel")
    book.cells.append(needs.module("nbformat").v4.new_code_cell(ASK))
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax-notebook"))
        patch.delenv("XLA_FLAGS", raising=False)  # one device, as a user has
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR"):
            patch.setenv(name, str(folder))
        resources = {"metadata": {"path": str(folder)}}
        nbclient.NotebookClient(book, timeout=600, resources=resources).execute()
    return book


def test_it_runs_and_shows_its_pictures(ran):
    shown = [
        output.data
        for cell in ran.cells[:-1]
        for output in cell.get("outputs", [])
        if output.output_type == "execute_result"
    ]
    assert not [
        x for cell in ran.cells for x in cell.get("outputs", []) if x.get("name") == "stderr"
    ]
    assert "TrainedModel" in shown[0]["text/plain"]
    assert len(shown) == 4 and all("image/png" in data for data in shown[1:])


def test_backgrounds_have_the_colours_of_the_words(ran):
    frames = json.loads(ran.cells[-1].outputs[-1].text)
    for name, (low, high) in HUES.items():
        hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in frames[name]))
        assert low < hue < high and saturation > 0.3 and value > 0.3, (name, frames[name])
