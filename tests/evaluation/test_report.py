"""The report of a run: what it reads, what it says is missing, and the page in a browser."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from qk_jax import evaluate
from qk_jax.evaluation.report import bars, curves, history, page, runs
from tests.evaluation import runs as made

ATTACK = "</script><script>window.broken = 1</script>\"'><img src=x onerror=alert(1)>"


def report(out, *folders):
    """The text of the page that the command writes."""
    evaluate.main(["report", *map(str, folders), "--out", str(out)])
    return out.read_text(encoding="utf-8")


# ---- metrics ------------------------------------------------------------------------------------


def read(*lines):
    return history.read("\n".join(lines).encode())


def test_steps_that_are_done_again_count_once():
    past = read(
        made.line(10, loss=3.0), made.line(20, loss=2.0), made.line(20, "validation", loss=9.0),
        made.line(30, loss=1.0), made.line(20, loss=2.5), made.line(20, "validation", loss=8.0),
        made.line(30, loss=1.5), made.line(31, "rollback", to=10), made.line(40, loss=1.2),
    )  # fmt: skip
    assert past.series["train", "loss"] == ([10, 20, 30, 40], [3.0, 2.5, 1.5, 1.2])
    assert past.series["validation", "loss"] == ([20], [8.0])
    assert past.rollbacks == [(31, 10)] and past.step == 40


def test_damaged_lines_are_named_and_left_out():
    past = read(
        made.line(10, loss=3.0), "no json", "[1]", made.line(-1, loss=1.0), '{"step": true}',
        made.line("x", loss=1.0), made.line(20, kind=3), made.line(20, loss="much", lr=1),
        '{"step": 30, "kind": "train", "loss": NaN}', made.line(40, loss=2.0)[:-4],
    )  # fmt: skip
    assert past.damaged == [2, 3, 4, 5, 6, 7, 9, 10]
    assert past.series == {("train", "loss"): ([10], [3.0]), ("train", "lr"): ([20], [1])}


def test_a_value_that_was_not_finite_is_a_gap():
    past = read(made.line(1, loss=1.0), made.line(2, loss=None), made.line(3, loss=1e308))
    assert past.series["train", "loss"] == ([1, 2], [1.0, None])
    assert past.last("train", "loss") == 1.0 and past.last("train", "lr") is None


def test_a_long_line_keeps_its_ends_spikes_and_gaps():
    values = [1.0] * 100_000
    values[31_415], values[27_182], values[50_000] = 900.0, -900.0, None
    thin = history.Series(list(range(100_000)), values).thinned()
    assert len(thin.steps) <= history.POINTS + 4 and thin.steps == sorted(set(thin.steps))
    found = dict(zip(thin.steps, thin.values, strict=True))
    assert found[31_415] == 900.0 and found[27_182] == -900.0 and found[50_000] is None
    assert thin.steps[0] == 0 and thin.steps[-1] == 99_999


# ---- folders ------------------------------------------------------------------------------------


def test_a_run_of_which_hardly_anything_is_there_says_so(tmp_path):
    folder = tmp_path / "run" / "stage1"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"stage": "stage1", "steps": 100')
    (run,) = runs.read([str(tmp_path / "run")])
    notes = " ".join(run.notes)
    for words in ("config.json is not readable", "stage1: no metrics yet", "No sheets", "figures"):
        assert words in notes
    text = page.page([run])
    assert "No metrics yet." in text and "No sheets of painted pictures." in text
    assert "No figures of held-out examples." in text and "No config.json" in text


def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path):
    folder = made.write_quickstart(tmp_path / "run")
    (folder / "samples" / "editing_stage1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "stage3" / "metrics.jsonl").open("a").write('{"step": 40, "ki')
    (folder / "report.json").write_text(
        '{"tasks": [], "seconds": {"x": "y"}, "retrieval": {"a": 1}}'
    )
    text = report(tmp_path / "report.html", folder)
    assert "editing_stage1.png is no sheet that can be read" in text
    assert "stage3: what is damaged in metrics.jsonl is left out: line 6." in text
    assert text.count("make the hat green</h3>") == 1


def test_a_stage_and_a_run_that_is_being_measured(tmp_path):
    made.write_stage(tmp_path / "a" / "stage2", "stage2", [1.0])
    for step in range(0, 100, 10):
        made.write_sheet(tmp_path / f"a/stage2/samples/editing_{step:07d}.png", "stage1")
    (tmp_path / "b" / "evaluation").mkdir(parents=True)
    found = {"tasks": {"editing": made.figures(1.0)}}
    (tmp_path / "b" / "evaluation" / "untrained.json").write_text(json.dumps(found))
    stage, begun = runs.read([str(tmp_path / "a" / "stage2"), str(tmp_path / "b")])
    assert [x.name for x in stage.stages] == ["stage2"] and begun.stages == []
    assert [sheet.phase for sheet in stage.stages[0].sheets][:2] == ["step 0", "step 10"]
    assert begun.figures == {"untrained": found} and "No stage was begun" in begun.notes[0]
    assert "no config.json" not in " ".join(stage.notes)
    text = page.page([stage, begun])
    assert "6 of 10 sheets are shown" in text and "<figcaption>step 90</figcaption>" in text


def test_two_stages_of_a_run_are_two_even_with_one_config(tmp_path):
    for name in ("stage1", "mean"):
        made.write_stage(tmp_path / name, "stage1", [1.0])
    (tmp_path / "mean" / "config.json").unlink()
    (run,) = runs.read([str(tmp_path)])
    assert [stage.name for stage in run.stages] == ["stage1", "mean"]
    assert "mean: no config.json" in run.notes[0]
    assert {len(chart["lines"]) for chart in curves.draw([run])[1] if chart["title"] == "Loss"} == {
        2
    }


def test_what_several_runs_lack_is_said_once(tmp_path):
    for name in ("a", "b", "c"):
        made.write_stage(tmp_path / name / "stage1", "stage1", [1.0])
    made.write_sheet(tmp_path / "c/stage1/samples/editing_0000000.png", "stage1")
    text = page.page(runs.read([str(tmp_path / name) for name in "abc"]))
    assert text.count("No sheets of pictures.") == 1 and "a, b: No sheets of pictures." in text
    assert "a, b, c: No figures of held-out examples" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    for name in ("a/run", "b/run"):
        made.write_stage(tmp_path / name / "stage1", "stage1", [1.0])
    names = [run.name for run in runs.read([str(tmp_path / "a/run"), str(tmp_path / "b/run")])]
    assert names == ["a/run", "b/run"]
    twice = [run.name for run in runs.read([str(tmp_path / "a/run")] * 2)]
    assert len(set(twice)) == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere"], "nowhere holds no run; give a work directory"),
        (["."] * 9, "9 runs are given; give at most 8"),
        ([], "the following arguments are required: DIR"),
    ],
)
def test_wrong_arguments_are_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(["report", *argv])
    assert ended.value.code == 2 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- what is drawn ------------------------------------------------------------------------------


def test_charts_have_every_task_bin_and_other_figure(tmp_path):
    found = runs.read([str(made.write_quickstart(tmp_path / "run"))])
    _, charts = curves.draw(found)
    by_title = {chart["title"]: chart for chart in charts[: len(charts) // 2]}
    assert by_title["Loss"]["parts"] == ["train", "validation"]
    assert by_title["Loss by task"]["parts"] == ["editing", "text to image"]
    assert by_title["Loss by part of t"]["parts"] == ["t0.00-0.50", "t0.50-1.00"]
    assert by_title["Validation loss by task"]["lines"][0]["y"] == [2.5, 1.25]
    assert {"Learning rate", "Gradient norm", "pictures per second"} <= set(by_title)
    assert not [title for title in by_title if "goodput" in title]


def test_bars_have_values_errors_and_kinds(tmp_path):
    found = runs.read([str(made.write_quickstart(tmp_path / "run"))])
    text = bars.held_out(found)
    assert "5.00 ± 0.25 dB" in text and "editing: recolour" in text and "4.00 ± 0.50 dB" in text
    gains = text[: text.index("<h4>PSNR</h4>")]
    assert "reconstruction" not in gains  # whose condition picture is the truth
    assert "Among 16 captions; by chance 6.25 %" in text and "50.0 %" in text
    assert "300 in all" in bars.time(found) and "75.0 %" in bars.time(found)


def test_a_bar_reaches_from_zero_to_its_value():
    text = bars.chart("", "", ["a"], [bars.Bar("x", 0, -1.0, 1.0), bars.Bar("y", 0, 3.0)], "")
    places = [
        tuple(map(float, x)) for x in re.findall(r'x="([\d.]+)" y="1" width="([\d.]+)"', text)
    ]
    assert places == [(20.0, 20.0), (40.0, 60.0)]
    assert 'd="M0.00 5H40.00' in text and text.count("whisker") == 1


# ---- in a browser -------------------------------------------------------------------------------


@pytest.fixture
def opened(browser):
    """Opens a page; at the end it has said nothing, and asked no other host for anything."""
    said, asked, tabs = [], [], []

    def open_page(path, width=1200):
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        tabs.append(tab)
        return tab

    yield open_page
    broken = [tab.evaluate("window.broken") for tab in tabs]
    for tab in tabs:
        tab.close()
    assert said == [] and broken == [None] * len(tabs)
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}


def chart(tab, title):
    return tab.locator(".chart").filter(has=tab.locator(f"h4:text-is('{title}')")).first


def test_curves_are_drawn_hidden_pointed_at_and_scaled(opened, tmp_path):
    report(tmp_path / "report.html", made.write_quickstart(tmp_path / "run"))
    tab = opened(tmp_path / "report.html")
    assert tab.locator("section#curves h3").all_inner_texts() == ["Stage 1", "Stage 3"]
    figure = chart(tab, "Loss by task")
    editing, words = figure.locator(".legend button").all()
    assert figure.locator("path.line").count() == 2 + 2  # and in the legend
    before = figure.locator(".plot path.line").first.get_attribute("d")
    assert len(re.findall("[ML]", before)) == 3
    # values: the last ones, then those of the step that is pointed at, by mouse and by key
    assert "1.6" in editing.inner_text() and "1.4" in words.inner_text()
    plot = figure.locator(".plot")
    plot.scroll_into_view_if_needed()
    plot.hover(position={"x": 60, "y": 100})
    assert "step 10" in figure.inner_text() and "2.1" in editing.inner_text()
    tab.mouse.move(0, 0)
    plot.focus()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert "step 20" in figure.inner_text() and "1.85" in editing.inner_text()
    assert "editing 1.85" in plot.get_attribute("aria-label")
    # the legend hides a line, and brings it back
    editing.click()
    assert figure.locator(".plot path.line").count() == 1
    assert editing.get_attribute("aria-pressed") == "false"
    editing.click()
    assert figure.locator(".plot path.line").count() == 2
    # a logarithmic scale, where the middle of three equal steps is no longer in the middle
    heights = [float(y) for y in re.findall(r" ([\d.]+)", before)]
    figure.locator(".log").click()
    after = figure.locator(".plot path.line").first.get_attribute("d")
    logs = [float(y) for y in re.findall(r" ([\d.]+)", after)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.3)
    assert logs[1] - logs[0] < logs[2] - logs[1] - 1


def test_pictures_are_compared_filtered_and_enlarged(opened, tmp_path):
    made.write_quickstart(tmp_path / "run")
    made.write_sheet(tmp_path / "run/stage3/samples/editing_0000030.png", "stage3")
    report(tmp_path / "report.html", tmp_path / "run")
    tab = opened(tmp_path / "report.html", width=390)
    card = tab.locator(".record:visible").first
    labels = card.locator(".pictures figcaption").all_inner_texts()
    assert labels == ["source", "untrained", "Stage 1", "Stage 3", "truth"]
    # the pictures are those of the sheet, pixel for pixel
    pixels = tab.evaluate(
        """async () => {
          const image = document.querySelector(".record figure[id] img");
          image.loading = "eager"; // one out of sight is never decoded
          await image.decode();
          const canvas = new OffscreenCanvas(16, 16).getContext("2d");
          canvas.drawImage(image, 0, 0);
          return [...canvas.getImageData(0, 0, 16, 16).data];
        }"""
    )
    shown = np.array(pixels, np.uint8).reshape(16, 16, 4)[..., :3]
    np.testing.assert_array_equal(shown, made.noise(16, 16, 1))
    # the slider uncovers the later picture, which can be another one
    slider = card.locator(".slider")
    images = slider.locator("img").all()
    sources = [x.get_attribute("src") for x in card.locator(".pictures img").all()]
    assert [x.get_attribute("src") for x in images] == [sources[0], sources[3]]
    slider.locator("input").focus()
    tab.keyboard.press("Home")
    assert "0%" in images[1].evaluate("x => x.style.clipPath")
    tab.keyboard.press("End")
    assert "100%" in images[1].evaluate("x => x.style.clipPath")
    slider.locator("select").select_option(label="untrained")
    assert images[1].get_attribute("src") == sources[1]
    # filters
    assert tab.locator(".record:visible").count() == 2
    tab.fill(".pictures-of [name=words]", "RED kite")
    assert tab.locator(".record:visible h3").all_inner_texts() == ["a red kite"]
    tab.fill(".pictures-of [name=words]", "")
    tab.select_option("[name=set]", label="Stage 3 while it was trained")
    assert "step 30" in tab.locator(".record:visible").first.inner_text()
    tab.select_option("[name=set]", "")
    assert "4 of 4" in tab.locator(".pictures-of [role=status]").inner_text()
    # enlarged, without smoothing
    tab.locator(".record:visible button").first.click()
    large = tab.locator("dialog img")
    assert large.bounding_box()["height"] > 200
    assert large.evaluate("x => getComputedStyle(x).imageRendering") == "pixelated"
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_two_runs_are_compared(opened, tmp_path):
    made.write_quickstart(tmp_path / "first")
    made.write_quickstart(tmp_path / "second", gain=1.0, lr=5e-4)
    report(tmp_path / "report.html", tmp_path / "first", tmp_path / "second")
    tab = opened(tmp_path / "report.html")
    heads = tab.locator("#overview thead th").all_inner_texts()
    assert heads == ["stage", "last value", "first", "second"]
    figure = chart(tab, "Loss")
    assert figure.locator(".plot path.line").count() == 4  # training and validation of both
    assert tab.locator(".record:visible").first.locator(".strip").count() == 2
    assert "first, Stage 3" in tab.inner_text("#works") and "2.00 ± 0.25 dB" in tab.inner_text(
        "#works"
    )
    # only what differs, until all is asked for
    rows = tab.locator("#settings tbody tr:visible")
    assert rows.locator("code").all_inner_texts() == ["optimizer.lr"]
    assert rows.locator("td").all_inner_texts() == ["0.001", "0.0005"] * 2
    tab.uncheck("[name=differing]")
    assert rows.count() == 5
    tab.fill(".settings-of [name=words]", "CLIP")
    assert rows.locator("code").all_inner_texts() == ["optimizer.clip"]
    # a run that is hidden is hidden everywhere
    tab.click("#legend button:has-text('second')")
    assert figure.locator(".plot path.line").count() == 2
    assert tab.locator(".record:visible").first.locator(".strip:visible").count() == 1


def test_texts_of_a_run_are_only_texts(opened, tmp_path):
    folder = tmp_path / "<b>run"
    made.write_quickstart(folder)
    made.write_stage(folder / "other", ATTACK, [1.0], **{ATTACK: ATTACK, "half": "\ud800"})
    lines = made.line(20, ATTACK, **{ATTACK: 1.0}), made.line(20, **{f"loss/{ATTACK}": 1.0})
    (folder / "other" / "metrics.jsonl").open("a").write("\n".join(lines))
    made.write_sheet(folder / "samples" / "<i>x_stage1.png", "stage1", [ATTACK, "ein 海"])
    found = json.loads((folder / "report.json").read_text())
    found["tasks"][ATTACK] = {ATTACK: made.figures(1.0) | {"kinds": {ATTACK: made.figures(2.0)}}}
    found["machine"][ATTACK] = [ATTACK]
    found["seconds"][ATTACK] = 3
    (folder / "report.json").write_text(json.dumps(found))
    text = report(tmp_path / "report.html", folder, folder / "other")
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert "unsafe" not in text and "default-src 'none'" in text
    tab = opened(tmp_path / "report.html")
    assert tab.locator("script").count() == 3 and tab.locator("style").count() == 1
    assert tab.locator("img[src='x'], i:text-is('x'), b:text-is('run')").count() == 0
    assert tab.locator("[onerror]").count() == 0
    for part in ("#curves", "#works", "#settings", "#time"):
        assert "<script>window.broken" in tab.text_content(part)
    assert ATTACK in tab.locator(".record h3").all_inner_texts()


def test_older_sheets_are_shown_whole(opened, tmp_path):
    made.write_stage(tmp_path / "stage1", "stage1", [1.0])
    (tmp_path / "stage1" / "samples").mkdir()
    whole = Image.fromarray(made.noise(300, 200, 1))
    for step in (0, 10, 20):
        whole.save(tmp_path / f"stage1/samples/editing_{step:07d}.png")
    report(tmp_path / "report.html", tmp_path)
    tab = opened(tmp_path / "report.html")
    captions = tab.locator(".whole figcaption").all_inner_texts()
    assert [text.rpartition(", ")[2] for text in captions] == ["step 0", "step 20"]
    tab.locator(".whole button").first.click()
    assert tab.locator("dialog").is_visible()
