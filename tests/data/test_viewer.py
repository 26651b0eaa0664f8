"""The page of `look`: what it shows is what training reads, and nothing in it is trusted."""

import base64
import html.parser
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from qk_jax.data import Writer, pipeline, records
from qk_jax.data import __main__ as main
from qk_jax.data.viewer import charts, look, page, shown
from tests.data import stage3

ATTACK = "<script>window.broken = 1</script>\"'><img src=x onerror=alert(1)>"
LONG = ("a red kite over the sea " * 400).strip()


class Page(html.parser.HTMLParser):
    """Elements as (tag, attributes), and the text of each article."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.articles, self.open = [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "article":
            self.articles.append([])

    def handle_data(self, text):
        if self.articles:
            self.articles[-1].append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self):
        """{what a picture is called: its pixels}."""
        found = {}
        for image in self.all("img"):
            if "src" in image:
                data = base64.b64decode(image["src"].removeprefix("data:image/webp;base64,"))
                found[image["alt"]] = np.asarray(Image.open(io.BytesIO(data)))
        return found


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def run(*argv):
    """What the command prints; its page is parsed."""
    main.main([*map(str, argv)])


def fails(capsys, *argv):
    """The one line of the error."""
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Records of two tasks and two sets: an edit, an attack in its words, a long text, and three
    that cannot be used."""
    out = tmp_path_factory.mktemp("DATA")
    with Writer(out / "train.array_record") as writer:
        writer.add("editing", "make the hat green", target=noise(80, 120, 1),
            source=noise(80, 120, 2), name="hats")  # fmt: skip
        writer.add("editing", ATTACK, target=noise(64, 64, 3), source=noise(64, 64, 4),
            references=[noise(40, 90, 5), noise(90, 40, 6)], name="<b>bold")  # fmt: skip
        writer.add("text_to_image", LONG, target=noise(300, 50, 7), name="hats")
        writer.add("text_to_image", "ein Drachen überm Meer 海", target=noise(64, 64, 8))
    with records.writing(out / "damaged" / "train.array_record") as add:
        for number, words in enumerate(["fine", "", "cut", "fine too"]):
            data = io.BytesIO()
            Image.fromarray(noise(48, 48, number)).save(data, "PNG")
            blob = data.getvalue()[: 200 if words == "cut" else None]
            header = {"instruction": words, "roles": []}
            add(records.Entry(header, {"target": blob}, 48, 48, 0, "text_to_image", (), "bad"))
    return out


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The page of all of the folder."""
    out = tmp_path_factory.mktemp("page") / "page.html"
    run("look", folder, "--out", out)
    return Page(out)


def test_a_folder_is_shown_whole(whole):
    texts = ["".join(words) for words in whole.articles]
    assert len(texts) == 4 and len(whole.all("article")) == 4
    by_words = {words: text for text in texts for words in ("hat green", "海") if words in text}
    assert all(word in by_words["hat green"] for word in ("editing", "hats", "record0", "record 0"))
    labels = ["source", "reference 1", "reference 2", "target"]
    (attack,) = [text for text in texts if "onerror" in text]
    assert [attack.index(label) for label in labels] == sorted(map(attack.index, labels))
    assert "512x512 + source 512x512 + reference 1 " in attack
    assert {x["data-task"] for x in whole.all("article")} == {"editing", "text_to_image"}
    assert len(whole.all("svg")) == 4 and all(x["aria-label"] for x in whole.all("svg"))


def test_every_picture_has_words_and_its_size(whole):
    for image in whole.all("img"):
        if "src" in image:
            assert f"{image['width']}x{image['height']}" in image["alt"]
    assert len(whole.pictures()) == 2 + 4 + 1 + 1


def test_a_text_that_is_too_long_is_cut_where_the_model_stops(whole):
    (article,) = ["".join(x) for x in whole.articles if "red kite" in "".join(x)]
    tokens, cut, most = map(int, re.findall(r"(\d+) of text, (\d+) .* most (\d+)", article)[0])
    assert most == 384 and cut == tokens - most > 0
    (rest,) = re.findall(r"<del>([^<]*)</del>", whole.text)
    assert LONG.endswith(rest) and 0 < len(rest) < len(LONG)


def test_words_of_records_are_only_words(whole):
    assert len(whole.all("script")) == 1 and len(whole.all("style")) == 1
    assert all(image.get("src", "data:").startswith("data:") for image in whole.all("img"))
    assert not [a for _, a in whole.elements for name in a if name.startswith("on")]
    assert not whole.all("b") or all(x == {} for x in whole.all("b"))
    assert "<b>bold" in [x["data-source"] for x in whole.all("article")]
    assert ATTACK in "".join(itertools.chain(*whole.articles))


def test_the_page_asks_nobody_and_lets_no_other_script_run(whole):
    links = [x[name] for _, x in whole.elements for name in ("src", "href") if name in x]
    assert links and all(link.startswith("data:") for link in links)
    assert not re.search(r"url\(|@import|https?://", whole.text)
    (policy,) = [x["content"] for x in whole.all("meta") if "http-equiv" in x]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy)


def test_bad_records_are_shown_and_counted(folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    run("look", folder / "damaged", "--out", out, "--png", tmp_path / "sheet.png")
    assert "4 examples, 2 of them with bad records" in capsys.readouterr().out
    found = Page(out)
    bad = ["data-bad" in x for x in found.all("article")]
    assert bad == [False, True, True, False]
    assert {x["data-source"] for x in found.all("article")} == {"bad"}
    assert "no text" in "".join(found.articles[1]) and "undecodable" in "".join(found.articles[2])
    assert "2 examples have bad records: 1 no text, 1 undecodable" in found.text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 4 * 160


def test_the_chosen_records_are_shown_in_their_order(folder, tmp_path):
    run("look", folder, "--records", "3,0", "--out", tmp_path / "page.html")
    places = ["".join(x) for x in Page(tmp_path / "page.html").articles]
    assert ["record 3" in places[0], "record 0" in places[1], len(places)] == [True, True, 2]


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Records for a run with drop-out: ordinary ones, and one that cannot be used."""
    out = tmp_path_factory.mktemp("EDITS")
    with Writer(out / "train.array_record") as writer:
        for number in range(12):
            writer.add("editing", f"edit number {number}", target=noise(70, 70, number),
                source=noise(70, 70, 100 + number), name="edits")  # fmt: skip
    path = out / "train.array_record"
    with records.writing(out / "copy") as add:
        for number, row in enumerate(records.RecordFile(path).index):
            header, blobs = records.RecordFile(path)[number]
            if number == 5:
                header["instruction"] = " "
            add(records.Entry(header, blobs, 70, 70, 1, "editing", (), row["source"].decode()))
    (out / "copy").replace(path)
    records.index_path(out / "copy").replace(records.index_path(path))
    return out


@pytest.fixture(scope="module")
def pipe(edits, builder):
    config = stage3.config({"editing": 1.0}, 4, 4, records=str(edits))
    with config.unlocked():
        config.data.dropout.update(text=0.3, pictures=0.3, both=0.1)
    return pipeline.Pipeline(config, "train", 0, 1, builder)


def test_a_step_shows_what_it_trains_pixel_for_pixel(pipe, tmp_path):
    seen = set()
    for step in range(6):
        reader, about, examples = look.choose(pipe, look.Choice(step=step), True)
        out = tmp_path / f"{step}.html"
        page.write(
            out, page.Heading("edits", about, {}), examples, shown.sizes_of(reader.sources())
        )
        found, batch = Page(out), pipe.batch(step)
        assert len(found.articles) == 4
        pictures = found.pictures()
        for slot in range(4):
            hidden = not batch["condition_mask"][slot]
            name = f"Example {slot + 1}: source, 64x64{', dropped' * hidden}"
            np.testing.assert_array_equal(pictures[name], batch["conditions"][0][slot])
            target = pictures[f"Example {slot + 1}: target, 64x64"]
            np.testing.assert_array_equal(target, batch["target"][slot])
            text = "".join(found.articles[slot])
            no_text = not batch["text_mask"][slot].any()
            assert ("text dropped" in text) == no_text
            assert f"record{batch['record'][slot]}" in text
            assert f", {batch['attention_mask'][slot].sum()} in all" in text
            seen.add((hidden, no_text))
        assert sum("Replaces a bad record (no text)" in "".join(x) for x in found.articles) == (
            found.text.count("data-bad ")
        )
    assert seen == {(False, False), (True, False), (False, True), (True, True)}
    assert pipe.bad["editing", "no text"], "no step met the bad record"


def test_slots_by_chance_are_those_of_the_run(pipe):
    _, _, examples = look.choose(pipe, look.Choice(limit=5, seed=3), True)
    places = []
    for one in examples:
        step, slot = map(int, re.findall(r"\d+", one.place))
        np.testing.assert_array_equal(one.example.target, pipe.batch(step)["target"][slot])
        places.append((step, slot))
    assert len(set(places)) == 5 and places == sorted(places)
    again = [one.place for one in look.choose(pipe, look.Choice(limit=5, seed=3), True)[2]]
    other = [one.place for one in look.choose(pipe, look.Choice(limit=5, seed=4), True)[2]]
    assert again == [f"step {step}, slot {slot}" for step, slot in places] != other


def test_only_one_example_is_in_memory(pipe, tmp_path, monkeypatch):
    """Each is written before the next one is read."""
    order = []
    reader, about, examples = look.choose(pipe, look.Choice(limit=3), True)
    card = page._card
    monkeypatch.setattr(page, "_card", lambda n, one: order.append(f"card {n}") or card(n, one))
    told = (order.append("read") or one for one in examples)
    page.write(tmp_path / "p.html", page.Heading("", about, {}), told,
        shown.sizes_of(reader.sources()))  # fmt: skip
    assert order == ["read", "card 1", "read", "card 2", "read", "card 3"]


def test_a_histogram_counts_every_value():
    drawn = charts.histogram("Text", "tokens", [3, 3, 3, 40, 99])
    counts = re.findall(r"<title>(\d+) to (\d+) tokens: (\d+)</title>", drawn)
    assert counts == [("0", "4", "3"), ("40", "44", "1")]
    assert "<title>80 or more tokens: 1</title>" in drawn
    assert "5 values, 3 to 99 tokens, median 3" in drawn
    ratios = charts.ratios("Ratio", np.array([100, 50, 9000]), np.array([100, 100, 1]))
    assert sum(map(int, re.findall(r": (\d+)</title>", ratios))) == 3
    assert "above" in ratios and charts.histogram("None", "tokens", []) == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("look DATA", "nothing to write; give --out"),
        (
            "look nowhere --out p.html",
            "nowhere is no folder; give a folder of records",
        ),
        ("look stage9:tiny --out p.html", "config 'stage9' does not exist"),
        ("look DATA --out p.html --n 0", "0 examples are asked for; give 1 to 10,000"),
        ("look DATA --png p.png --n 201", "give 1 to 200 with --png"),
        ("look DATA --out p.html --records 1,x", "--records is '1,x'; give numbers"),
        ("look DATA --out p.html --records 99", "there is no record 99"),
        ("look DATA --out p.html --records 1 --step 1", "exclude each other"),
        ("look DATA --out p.html --step 1", "--step is of the training of a config"),
        ("look DATA --out p.html --split validation", "no record file"),
        ("look DATA --out p.html --config.data.nothing=1", "no field 'data.nothing'"),
        ("look stage3:tiny --out p.html --step 750", "has steps 0 to 749"),
        ("import --format folder --input a --task editing --out b --config.seed=1", "no config"),
    ],
)
def test_wrong_arguments_are_one_line(argv, words, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *argv.replace("DATA", str(folder)).split())
    assert not (tmp_path / "p.html").exists()


# ---- in a browser -------------------------------------------------------------------------------


def test_the_page_works_in_a_browser(browser, folder, tmp_path):
    run("look", folder, "--out", tmp_path / "page.html")
    tab = browser.new_page(viewport={"width": 390, "height": 844})
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto((tmp_path / "page.html").as_uri())

    def visible():
        return [x.get_attribute("data-task") for x in tab.locator("article:visible").all()]

    assert len(visible()) == 4 and "4 of 4" in tab.inner_text("#told")
    tab.select_option("[name=task]", "editing")
    assert visible() == ["editing", "editing"] and "2 of 4" in tab.inner_text("#told")
    tab.select_option("[name=source]", "<b>bold")
    assert visible() == ["editing"]
    tab.click("button[type=reset]")
    tab.fill("[name=words]", "HAT green")
    assert len(visible()) == 1
    tab.fill("[name=words]", "")
    tab.check("[name=bad]")
    assert visible() == []
    tab.uncheck("[name=bad]")
    # by keyboard: to the second example, its first picture, and back
    tab.locator("h1").click()
    tab.keyboard.press("j")
    tab.keyboard.press("j")
    assert tab.evaluate("document.activeElement.id") == "e2"
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    assert "Example 2: " in tab.inner_text("dialog")
    tab.keyboard.press("Escape")
    assert not tab.locator("dialog").is_visible()
    # every picture is decoded, and nothing is wider than a phone
    tab.evaluate("document.querySelectorAll('img').forEach(x => x.loading = 'eager')")
    tab.wait_for_function(
        "[...document.querySelectorAll('main img')].every(x => x.complete && x.naturalWidth)"
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("window.broken") is None
    assert said == []
    assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"}
    tab.close()
