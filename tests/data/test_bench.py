"""What the data costs: the tables of `python -m qk_jax.data bench`, on a little of it."""

import pytest

from qk_jax.base.errors import InputError
from qk_jax.data import __main__ as command
from qk_jax.data.bench import loading

bench = command.main.__wrapped__  # its errors are raised


def rows(text):
    """{first cell: the others as numbers} of the last table."""
    cells = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {
        first.strip(): [float(part.strip(" %").partition(" - ")[0]) for part in others]
        for first, *others in cells[2:]
    }


def test_the_plan_of_a_large_set(capsys):
    bench(["bench", "plan", "--rows", "100000"])
    found = rows(capsys.readouterr().out)
    assert found.keys() == {"32", "512"}
    for start, memory, to_a_worker, early, late in found.values():
        assert 0 < start and 0.05 < memory < 2 and to_a_worker < 0.1
        assert 0 < early and late < 10 * early  # a late step is found as fast as an early one
    with pytest.raises(InputError, match="--rows 5; give at least"):
        bench(["bench", "plan", "--rows", "5"])


def test_loading_beside_pytorch(capsys, monkeypatch):
    monkeypatch.setattr(loading, "_ROUNDS", 1)
    bench(["bench", "load", "--pictures", "32"])
    found = rows(capsys.readouterr().out)
    assert len(found) == 4 and all(rate > 0 for rate, _, _ in found.values())
    assert found["decoding and fitting alone, 2 threads"][2] == 100
