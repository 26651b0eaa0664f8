"""Examples of the tests as a record file."""

from collections.abc import Iterable

from qk_jax.data import Writer
from qk_jax.data.example import Example
from qk_jax.pictures.roles import REFERENCE, SOURCE


def write(path, examples: Iterable[Example]) -> int:
    """Writes examples whose sources come before their references; returns how many."""
    with Writer(path) as writer:
        for x in examples:
            assert list(x.roles) == sorted(x.roles) and SOURCE < REFERENCE
            pairs = list(zip(x.roles, x.pictures, strict=True))
            writer.add(
                x.task,
                x.instruction,
                x.target,
                source=[picture for role, picture in pairs if role == SOURCE],
                references=[picture for role, picture in pairs if role == REFERENCE],
            )
    return writer.count
