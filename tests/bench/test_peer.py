"""The comparison with PyTorch: both sides compute the same, and what is missing is said."""

import importlib.util
import json

import numpy as np
import pytest

from qk_jax.base.errors import InputError
from qk_jax.bench import __main__ as bench
from qk_jax.bench import peer, peer_theirs
from qk_jax.bench.peer_work import Work


def test_both_sides_agree_and_are_timed(tmp_path, capsys):
    out = tmp_path / "peer.json"
    bench.main(["peer", "--size", "tiny", "--pairs", "2", "--steps", "1", "--out", str(out)])
    found = {report["work"]["what"]: report for report in json.loads(out.read_text())}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["train", "sample"] == list(found)
    for report in found.values():
        assert 0 < report["difference"] < 1e-4
        # the value of the second step depends on all of the first, backward pass and AdamW too
        first, second = (np.array(report["values"][side]) for side in ("ours", "theirs"))
        assert first[0] != first[1]
        np.testing.assert_allclose(first, second, rtol=1e-5)
        ratios = np.divide(report["seconds"]["ours"], report["seconds"]["theirs"])
        assert len(ratios) == 2 and report["ratio"] == pytest.approx(np.median(ratios))
        assert min(report["peak_bytes"].values()) > 2**27  # of a whole process


def test_sides_that_differ_are_not_compared(tmp_path):
    work = Work("train", "cpu", **peer.SIZES["tiny"])
    velocity = np.ones((2, 4, 8), np.float32)
    for side, scale in (("ours", 1.0), ("theirs", 1.001)):
        np.save(tmp_path / f"{side}.npy", scale * velocity)
    same = {"ours": [2.0, 1.5], "theirs": [2.0, 1.5]}
    with pytest.raises(InputError, match="velocities differ by 0.001"):
        peer.agreement(tmp_path, work, same)
    np.save(tmp_path / "theirs.npy", velocity)
    assert peer.agreement(tmp_path, work, same) == 0
    with pytest.raises(InputError, match="first steps give"):
        peer.agreement(tmp_path, work, same | {"theirs": [2.0, 1.6]})


@pytest.mark.skipif(peer_theirs.torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as leaving:
        bench.main(["peer", "--size", "tiny", "--device", "cuda", "--out", str(tmp_path / "x")])
    assert leaving.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "finds no cuda device; give --device cpu" in message


def test_without_pytorch_it_says_what_to_install(monkeypatch):
    work = Work("train", "cpu", **peer.SIZES["tiny"])
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    with pytest.raises(InputError, match=r"torch is not installed; pip install 'qk_jax\[torch\]'"):
        peer.compare(work, 1, 1)


def test_numbers_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        bench.main(["peer", "--batch", "0"])
    assert "--batch 0 must be at least 1" in capsys.readouterr().err
