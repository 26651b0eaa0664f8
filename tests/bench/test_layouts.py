"""The table of layouts: real compilations for slices that are not here, and all around them."""

import asyncio
import dataclasses
import importlib.util
import json
import signal

import jax
import pytest

from configs import recipes
from qk_jax import sharding
from qk_jax.base.errors import InputError
from qk_jax.bench import __main__ as bench
from qk_jax.bench import cases, compile, processes, report, row, search, table
from qk_jax.bench.cases import Case, Target
from qk_jax.bench.schedule import topologies
from qk_jax.experiment import config as config_lib

NANO = "tests/training/nano.py"
# Every stage, every generation and two slices, on the smallest meshes that show the axis; a stage
# is on the generation that compiles it soonest.
CASES = {
    "stage1": ("v5e-4", "fsdp=4"),
    "stage2": ("tpu7x-2", "fsdp=2"),
    "stage3": ("v6e-4", "fsdp=2,tensor=2"),
    "highres": ("v5p-8", "fsdp=4"),
}
SLICES = ("2x v5e-1", "data=1")  # for a second case of stage 2


def a_case(spec, slice_, layout, **changes):
    given = Case(spec, {}, slice_, False, layout, "none", 1.0, "64x64", 1, (), 0)
    return dataclasses.replace(given, **changes)


def target_of(name):
    return Target.of(topologies.parse(name))


def jobs_of(given):
    return [table.Job(one, target_of(one.slice), str(i)) for i, one in enumerate(given)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, libtpu):
    """{stage, or 'slices', or 'large': table row}: all that is compiled ahead of time here."""
    given = {
        name: a_case(f"{NANO}:{name}", *case, size="128x128" if name == "highres" else "64x64")
        for name, case in CASES.items()
    }
    given["slices"] = a_case(f"{NANO}:stage2", *SLICES, remat="full", per_chip_batch=2.0)
    given["large"] = a_case("configs/stage2.py:20b", "v5e-4", "fsdp=4", size="512x512")
    jobs = jobs_of(given.values())
    out = tmp_path_factory.mktemp("layouts")
    args, _ = bench.arguments(["layouts", "--config", "f.py", "--hlo", "--out", str(out)])
    found = []
    asyncio.run(table.run(jobs, args, table.versions(), found.append))
    by_key = {one["key"]: one for one in found}
    programs = {f"{one['key']}.hlo.txt" for one in by_key.values() if one["fits"]}
    assert {file.name for file in out.iterdir()} == programs  # and no logs
    return {name: by_key[job.key] for name, job in zip(given, jobs, strict=True)}


@pytest.mark.parametrize("name", [*CASES, "slices"])
def test_every_stage_compiles_for_every_generation(compiled, name):
    found = compiled[name]
    assert tuple(found) == table.FIELDS and found["error"] is None and found["fits"] is True
    where = topologies.parse(found["slice"])
    assert (found["devices"], found["chips"]) == (where.total_devices, where.total_chips)
    assert 0 < found["hbm_peak_gib"] < found["hbm_limit_gib"] == where.spec.hbm_bytes / 2**30
    assert found["rows"] % (where.total_devices * found["per_chip_batch"]) == 0
    # the parts of the time, and what follows from the whole
    whole = found["compute_s"] + found["attention_s"] + found["exposed_comm_s"]
    assert whole == pytest.approx(found["step_time_s"]) and found["compute_s"] > 0
    assert found["exposed_comm_s"] <= found["comm_s"] * (1 + 1e-9)
    rate = found["rows"] / found["step_time_s"]
    assert found["pictures_per_s"] == pytest.approx(rate)
    assert found["pictures_per_s_per_chip"] == pytest.approx(rate / where.total_chips)
    able = found["step_time_s"] * where.spec.peak_flops * where.total_devices
    assert found["mfu"] * able == pytest.approx(found["model_tflops_per_step"] * 1e12)
    assert sum(found["model_tflops"].values()) == pytest.approx(found["model_tflops_per_step"])
    assert set(found["model_tflops"]) == {"vision", "text", "connector", "mmdit", "vae"}
    assert len(found["ops"]) == row.LISTED
    assert any(op["source"].startswith(("mmdit", "vae", "layers")) for op in found["ops"])


def test_collectives_are_those_of_the_layout(compiled):
    def kinds(name):
        return {(one["kind"], *one["axes"]) for one in compiled[name]["collectives"]}

    assert ("all-gather", "fsdp") in kinds("stage1") & kinds("stage2") & kinds("highres")
    assert ("all-reduce", "tensor") in kinds("stage3")
    # one device in each slice: whatever is sent goes over the data-centre network
    assert ("all-reduce", "data") in kinds("slices")
    assert {axis for _, *axes in kinds("slices") for axis in axes} == {"data"}


def test_what_is_too_large_says_by_how_much(compiled):
    found = compiled["large"]
    assert found["fits"] is False and found["error"] is None and found["step_time_s"] is None
    # float32 weights, moments and average of 20 B over four devices are 76 GiB
    assert found["hbm_peak_gib"] > 76 and found["hbm_limit_gib"] == 15.75
    assert found["model_tflops_per_step"] > 0


def test_report_of_real_rows(compiled, tmp_path):
    report.write(tmp_path, list(compiled.values()))
    text = (tmp_path / report.PAGE).read_text()
    assert "| all-reduce | tensor | 2 |" in text and "trained one three\ntimes;" in text
    assert "What it is not" in text and "**no**" in text
    rows = report.ordered(list(compiled.values()))
    assert rows[-1] is compiled["large"]
    assert (tmp_path / report.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_unknown_compiler_option_is_one_line(libtpu, tmp_path, capsys):
    words = ["--slice", "v5e-4", "--flags", "xla_tpu_wish=true"]
    assert "No such compile option: 'xla_tpu_wish'" in refused(words, tmp_path, capsys)


def refused(words, out, capsys):
    """The message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as leaving:
        bench.main(["layouts", "--config", f"{NANO}:stage3", "--out", str(out), *words])
    assert leaving.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    return message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--slice is missing"),
        (["--slice", "v5e-3"], "there is no slice v5e-3"),
        (["--layout", "fsdp=3"], "the nearest that fit: fsdp=4"),
        (["--layout", "speed=4"], "mesh axes ['speed'] are unknown"),
        (["--layout", "fsdp=4/mmdit=zero9"], "sharding row 'zero9' is unknown"),
        (["--layout", "fsdp=4/mmdot=zero2"], "tower 'mmdot'"),
        (["--layout", "tensor=4"], "replicated on every device"),
        (["--per-chip-batch", "0.3"], "no whole number"),
        (["--layout", "fsdp=4", "--per-chip-batch", "0.5"], "does not divide"),
        (["--per-chip-batch", "0"], "must be positive"),
        (["--remat", "some"], "'some' unknown"),
        (["--size", "64x65"], "--size 64x65 is no multiple of 16; 64x64 is near"),
        (["--size", "80x64"], "--size 80x64 is not of the config's: 64x64, 80x48, 48x80"),
        (["--config.data.sizes=64x60"], "config.data.sizes 64x60 is no multiple of 16"),
        (["--pictures", "-1"], "at least 0"),
        (["--largest", "--pictures", "1"], "--largest finds the shape itself"),
        (["--config.model.remet=full"], "did you mean 'model.remat'"),
        (["--search", "--layout", "fsdp=4"], "leave --layout out"),
        (["--speed", "4"], "'--speed' is unknown"),
    ],
)
def test_what_is_unknown_or_does_not_fit_is_one_line(words, message, tmp_path, capsys, stand_in):
    target = [] if "--slice" in words or not words else ["--slice", "v5e-4"]
    assert message in refused([*target, *words], tmp_path, capsys)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    message = refused(["--slice", "v5e-4"], tmp_path, capsys)
    assert "needs matplotlib; pip install 'qk_jax[bench]'" in message


class StandIn:
    """In place of `processes.ask`: answers at once, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.fails, self.stops = [], set(), set()

    async def __call__(self, request, seconds, log=None):
        if "probe" in request:
            return {}
        layout = request["case"]["layout"]
        if layout in self.stops:
            raise KeyboardInterrupt
        self.asked.append(layout)
        if layout in self.fails:
            return {"rows": 4, "error": "the compiler crashed"}
        return ANSWER | {"step_time_s": 1.0 + len(self.asked)}


ANSWER = {
    "fits": True, "rows": 4, "accumulation": 2, "dtype": "float32", "hbm_peak_gib": 3.5,
    "model_tflops_per_step": 2.0, "model_tflops": {"mmdit": 2.0}, "compute_s": 1.0,
    "attention_s": 0.2, "exposed_comm_s": 0.1, "comm_s": 0.3, "step_time_s": 1.3, "mfu": 0.4,
    "pictures_per_s": 3.0, "pictures_per_s_per_chip": 0.8, "compile_s": 9.0, "argument_gib": 1.0,
    "temp_gib": 2.0, "output_gib": 0.0, "code_gib": 0.1, "host_gib": 0.0, "unpriced": ["call.1"],
    "collectives": [{
        "kind": "all-gather", "axes": ["fsdp"], "group_size": 4, "nbytes": 2_000_000, "count": 3,
        "asynchronous": True, "seconds": 0.3, "exposed_seconds": 0.1, "source": "layers.py:1",
    }],
    "ops": [{
        "name": "fusion.1", "kind": "fusion", "seconds": 0.4, "count": 2, "source": "mmdit.py:7",
        "scope": "jvp(MMDiT)",
    }],
}  # fmt: skip


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(processes, "ask", found)
    monkeypatch.setattr(report, "draw", lambda file, rows: None)
    return found


def lines_of(out, *words):
    """Runs the command on a slice of four devices; the lines of its file."""
    bench.main(
        ["layouts", "--config", f"{NANO}:stage3", "--out", str(out), "--slice", "v5e-4",
         "--layout", "fsdp=4", "fsdp=2,tensor=2", "fsdp=2,context=2", *words]
    )  # fmt: skip
    return (out / table.TABLE).read_text().splitlines()


def test_same_command_goes_on_where_it_stopped(tmp_path, capsys, stand_in):
    stand_in.fails = {"fsdp=2,context=2"}
    lines = lines_of(tmp_path)
    assert stand_in.asked == ["fsdp=4", "fsdp=2,tensor=2", "fsdp=2,context=2"]
    assert [json.loads(line)["error"] for line in lines] == [None, None, "the compiler crashed"]
    # a table row that failed is tried again, the others stay as they are
    stand_in.asked.clear(), stand_in.fails.clear()
    assert lines_of(tmp_path)[:3] == lines and stand_in.asked == ["fsdp=2,context=2"]
    assert "3 table rows, 2 of them" in capsys.readouterr().out
    # an interruption in the middle of a line
    file = tmp_path / table.TABLE
    whole = file.read_text()
    file.write_text(whole[: len(lines[0]) + 40])
    stand_in.asked.clear()
    found = [json.loads(line)["layout"] for line in lines_of(tmp_path)]
    assert found == ["fsdp=4", "fsdp=2,tensor=2", "fsdp=2,context=2"]
    assert stand_in.asked == found[1:]
    assert "torn line" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_there(tmp_path, capsys, stand_in):
    stand_in.stops = {"fsdp=2,context=2"}
    with pytest.raises(SystemExit) as leaving:
        lines_of(tmp_path, "--jobs", "1")
    assert leaving.value.code == 130 and "same command goes on" in capsys.readouterr().err
    assert len(table.read(tmp_path / table.TABLE)) == 2
    assert (tmp_path / report.PAGE).read_text().count("## Row") == 2


def test_a_recipe_is_its_own_layout_and_batch(tmp_path, stand_in):
    spec = "configs/stage2.py:20b@v5p-128"
    bench.main(["layouts", "--config", spec, "--slice", "v5p-128", "--out", str(tmp_path)])
    (found,) = table.read(tmp_path / table.TABLE)
    recipe = recipes.RECIPES["stage2", "20b", "v5p-128"]
    assert found["per_chip_batch"] == recipe.per_chip_batch
    assert found["layout"].startswith(sharding.format_mesh(recipe.mesh))
    assert found["remat"] == recipe.remat


def test_whatever_defines_a_case_makes_it_another(tmp_path, stand_in, monkeypatch):
    lines_of(tmp_path)
    stand_in.asked.clear()
    for words in (
        ["--remat", "full"], ["--per-chip-batch", "1"], ["--pictures", "0"], ["--size", "48x80"],
        ["--config.model.num_queries=8"],
    ):  # fmt: skip
        lines_of(tmp_path, *words)
    assert len(stand_in.asked) == 15
    stand_in.asked.clear()
    of = table.versions()
    monkeypatch.setattr(table, "versions", lambda: of | {"libtpu": "9"})
    assert len(lines_of(tmp_path)) == 21 and len(stand_in.asked) == 3
    # the report is of the newer version of these three table rows
    assert len(table.latest(table.read(tmp_path / table.TABLE))) == 18


def test_the_largest_shape_of_the_training_may_be_asked_for(tmp_path, stand_in):
    sides = "--config.data.reference_sizes_by_number=64,48,32"
    for words, shape in (((), ("64x64", 3)), ((sides,), ("64x64", 2))):
        lines_of(tmp_path, "--largest", *words)
        newest = table.read(tmp_path / table.TABLE)[-1]
        assert (newest["size"], newest["pictures"]) == shape


def test_layouts_of_one_slice_may_be_none_of_another(tmp_path, capsys, stand_in):
    bench.main(
        ["layouts", "--config", f"{NANO}:stage3", "--out", str(tmp_path), "--slice", "v5e-4",
         "--slice", "v5e-8", "--layout", "fsdp=4", "fsdp=8"]
    )  # fmt: skip
    assert "left out: v5e-4 fsdp=8: mesh fsdp=8 is 8 devices" in capsys.readouterr().out
    found = table.read(tmp_path / table.TABLE)
    assert [(one["slice"], one["layout"]) for one in found] == [
        ("v5e-4", "fsdp=4"), ("v5e-8", "fsdp=8"),
    ]  # fmt: skip


def test_layouts_are_written_out_in_full():
    target = target_of("2x v5e-16")

    def told(layout, **changed):
        config = config_lib.load(f"{NANO}:stage3", changed)
        cases.set_layout(config, layout, target)
        return cases.layout_of(config), config

    text, config = told("fsdp=-1,tensor=2/text=tensor,mmdit=zero2_flat")
    assert text == "fsdp=8,tensor=2/mmdit=zero2_flat,text=tensor"
    assert config.slices.data == 2 and told(text)[1].to_dict() == config.to_dict()
    assert told("fsdp=16/zero2")[0] == "fsdp=16/zero2"
    assert told("")[0] == "data=16"
    changed = told("", **{"sharding.mmdit.params.embed": "tensor"})
    assert changed[0] == f"data=16/mmdit={sharding.OWN}"
    assert told("fsdp=16", **{"slices.fsdp": "2"})[1].slices.to_dict() == {"data": 1, "fsdp": 2}


def test_batch_grows_with_the_slice():
    def batch(name, per_chip, **changed):
        one = a_case(f"{NANO}:stage3", name, "fsdp=-1", per_chip_batch=per_chip, overrides=changed)
        config = cases.config_of(one, target_of(name))
        return config.data.batch, config.optimizer.accumulation

    assert batch("v5e-4", 1.0) == (8, 2)  # the config's own batch is 8
    assert batch("v5e-4", 2.0) == (8, 1)
    assert batch("v5e-16", 1.0) == (16, 1)
    assert batch("v5e-16", 0.5) == (8, 1)
    assert batch("v5e-4", 1.0, **{"data.batch": "11"}) == (8, 2)


def test_search_knows_heads_and_memory(capsys):
    def found(name, spec="configs/stage2.py:20b"):
        return search.search(a_case(spec, name, "", per_chip_batch=0.0), target_of(name))

    meshes = found("v5p-128")
    assert meshes[0] == "fsdp=64" and "fsdp=16,tensor=4" in meshes
    assert not any("tensor=8" in mesh for mesh in meshes)  # the language model has 4 key heads
    assert len(meshes) <= search.MAX_MESHES
    assert f"search: v5p-128 {' '.join(meshes)}" in capsys.readouterr().out
    for name in ("v5e-4", "v5p-8"):  # four chips each, of 16 and of 96 GiB
        with pytest.raises(InputError, match=rf"no mesh of {name} holds .* are 99\.\d GiB"):
            found(name)


def test_measured_layouts_compute_the_same(tmp_path, capsys):
    bench.main(
        ["layouts", "--config", f"{NANO}:stage3", "--out", str(tmp_path), "--measure", "1",
         "--layout", "fsdp=8", "fsdp=4,tensor=2/mmdit=zero2", "--config.sharding_limit=1.0"]
    )  # fmt: skip
    first, second = table.read(tmp_path / table.TABLE)
    for found in (first, second):
        assert found["error"] is None and found["slice"] == f"{jax.device_count()}x cpu"
        assert found["measured_step_s"] > 0 and found["measured_pictures_per_s"] > 0
        assert found["step_time_s"] is found["mfu"] is found["measured_mfu"] is None
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4) and first["loss"] > 0
    out, err = capsys.readouterr()
    assert "WRONG" not in err and out.count("measured: step") == 2


def test_a_fast_and_wrong_layout_shows():
    right = dict.fromkeys(table.FIELDS) | ANSWER | {
        "layout": "fsdp=4", "remat": "full", "loss": 1.0, "grad_norm": 0.5,
    }  # fmt: skip
    close = right | {"layout": "tensor=4", "loss": 1.00001}
    assert report.differing([right, close]) == []
    (warning,) = report.differing([right, close, right | {"layout": "context=4", "loss": 1.01}])
    assert warning.startswith("WRONG? context=4") and "loss 1.01" in warning
    (warning,) = report.differing([right, right | {"layout": "data=4", "grad_norm": 0.6}])
    assert "gradient" in warning or "grad_norm" in warning
    assert report.differing([right, right | {"loss": 2.0, "rows": 8}]) == []  # another batch
    assert len(report.differing([right, right | {"loss": float("nan")}])) == 1


@pytest.mark.parametrize("count", [1, 30])
def test_report_of_any_length(count, tmp_path):
    given = a_case("f.py:s", "v5e-4", "fsdp=4")
    job = table.Job(given, target_of("v5e-4"), "k")
    rows = [table.row(job, ANSWER | {"step_time_s": 1.3 + i}, {}) for i in range(count)]
    rows[0] |= {"measured_step_s": 1.4, "measured_pictures_per_s": 2.9, "loss": 1.0,
                "measured_mfu": 0.3, "grad_norm": 2.0}  # fmt: skip
    rows.append(table.row(job, {"error": "killed"}, {}))
    rows.append(table.row(job, {"fits": False, "hbm_peak_gib": 99.0, "rows": 4}, {}))
    report.write(tmp_path, rows)
    page = (tmp_path / report.PAGE).read_text()
    assert page.count("## Row") == count + 2 and "Error: killed" in page
    assert "(1.08 x the estimate)" in page
    assert (tmp_path / report.PICTURE).stat().st_size > 10_000
    lines = [report.line(one) for one in rows]
    assert "NO" in lines[-1] and "error: killed" in lines[-2]


@pytest.mark.parametrize(
    ("message", "used", "limit"),
    [
        ("HLO temporaries (64.00G) exceeds available HBM (15.75G).", 64.0, 15.75),
        ("memory space hbm. Used 512.0M of 15.75G hbm. Exceeded", 0.5, 15.75),
    ],
)
def test_the_compiler_says_how_much_it_needs(message, used, limit):
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory: {message}")
    found = compile.out_of_memory(error)
    assert (found["fits"], found["hbm_peak_gib"], found["hbm_limit_gib"]) == (False, used, limit)
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: vmem")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile.out_of_memory(other)


@pytest.mark.parametrize(
    ("code", "seconds", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", 60, f"killed by signal {int(signal.SIGSEGV)}"),
        ("import time; time.sleep(60)", 0.1, "took longer"),
        ("1 / 0", 60, "ZeroDivisionError"),
    ],
)
def test_a_crash_is_an_error_of_its_row(code, seconds, words, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(code)
    given = a_case(f"{file}:x", "v5e-4", "fsdp=4", here=True)
    log = tmp_path / "log"
    request = {"case": dataclasses.asdict(given), "hlo": None}
    assert words in asyncio.run(processes.ask(request, seconds, log))["error"]
    assert ("bad.py" in log.read_text()) == ("/" in code)
