"""Fixtures of the tests of the data's plan."""

import pytest

from qk_jax.data import prompts
from tests.data import stage3


@pytest.fixture(scope="package")
def builder():
    """The prompts of stage 3 at its tiny size, whatever its data."""
    return prompts.PromptBuilder.from_config(stage3.config({"text_to_image": 1.0}, 4, 4))
