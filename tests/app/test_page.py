"""The page of the app in a real browser."""

import base64
import io
import json

import numpy as np
import painters
import pytest
from PIL import Image

from tests import needs
from tests.app import serving

sync_api = needs.module("playwright.sync_api")
expect = sync_api.expect
SLOW = 240_000  # milliseconds: programs are compiled, others use the machine
expect.set_options(timeout=SLOW)
PAINTED = "figure:not(.preview)"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving.serve(serving.folders(tmp_path_factory)) as address:
        yield address


@pytest.fixture
def open_page(browser, address):
    """Opens the page in a browser of its own, ready; nothing may be asked of another host, and
    nothing may be wrong in the console but what `allowed` is in."""
    contexts, wrong, allowed = [], [], []

    def note(text):
        if not any(words in text for words in allowed):
            wrong.append(text)

    def opened(path="/", **how):
        context = browser.new_context(**{"accept_downloads": True} | how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        own = (address, f"blob:{address}", "data:")
        page.on("request", lambda x: x.url.startswith(own) or wrong.append(f"asks {x.url}"))
        page.on("pageerror", lambda error: note(str(error)))
        page.on("console", lambda x: x.type in ("error", "warning") and note(x.text))
        page.goto(address + path)
        if path == "/":
            expect(page.locator("#status")).to_have_text("ready")
            fast(page)
        return page

    opened.allowed = allowed
    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def fast(page):
    page.fill("#steps", "3")


def file(seed=1, name="hat.png", kind="image/png"):
    return {"name": name, "mimeType": kind, "buffer": serving.png(painters.picture(seed))}


def add(page, role, *files):
    page.set_input_files(f"#{role} input[type=file]", list(files))


def names(page):
    """What the roles hold, by what a screen reader says."""
    return [image.get_attribute("alt") for image in page.locator(".tile img").all()]


def paint(page, prompt="make it blue", count=1):
    page.fill("#prompt", prompt)
    before = page.locator(PAINTED).count()
    page.click("#paint")
    expect(page.locator(f"{PAINTED} figcaption")).to_have_count(before + count)


def download(page, at=0):
    """The file that the link under a picture gives: (bytes, its own name)."""
    with page.expect_download() as found:
        page.locator(PAINTED).nth(at).get_by_text("Download").click()
    return found.value.path().read_bytes(), found.value.suggested_filename


def told(png):
    texts = Image.open(io.BytesIO(png)).text
    return {"prompt": texts["prompt"], "seed": texts["seed"]} | json.loads(texts["settings"])


DROP = """([target, files]) => {
  const data = new DataTransfer();
  for (const { name, type, text } of files) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name, { type }));
  }
  const init = { dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true };
  const event = target ? new DragEvent("drop", init) : new ClipboardEvent("paste", init);
  document.querySelector(target ?? "body").dispatchEvent(event);
}"""


def drop(page, target, *files):
    """Drops files onto an element; pastes them where there is none."""
    told = [
        {"name": x["name"], "type": x["mimeType"], "text": base64.b64encode(x["buffer"]).decode()}
        for x in files
    ]
    page.evaluate(DROP, [target, told])


def test_upload_paint_look(open_page):
    page = open_page()
    assert page.locator("#past").is_hidden()
    page.locator("details summary").click()
    page.select_option("#preview", "1")
    page.fill("#steps", "1000")  # so that no stall of the machine lets it end unseen
    add(page, "source", file())
    page.fill("#prompt", "make it blue")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".preview img")).to_be_visible()
    expect(page.locator(PAINTED)).to_have_count(1)
    expect(page.locator("article .head button")).to_have_count(0)
    expect(page.locator(".preview")).to_have_count(0)
    expect(page.locator("#status")).to_have_text("done")
    image = page.locator(f"{PAINTED} img").first
    assert image.evaluate("x => [x.naturalWidth, x.naturalHeight]") == [64, 64]
    assert image.evaluate("x => getComputedStyle(x).imageRendering") == "pixelated"
    png, name = download(page)
    assert name == "make-it-blue-0.png" and told(png)["steps"] == 1000
    assert np.asarray(Image.open(io.BytesIO(png))).shape == (64, 64, 3)

    # The slider uncovers the source, in the viewer too, whose zoom is in whole pixels.
    source = page.locator(f"{PAINTED} .source")
    clip = "x => getComputedStyle(x).clipPath"
    assert "100%" in source.evaluate(clip)
    page.locator(f"{PAINTED} input[type=range]").fill("40")
    assert "60%" in source.evaluate(clip)
    page.locator(f"{PAINTED} button.stack").click()
    viewer = page.locator("#viewer")
    expect(viewer).to_be_visible()
    expect(viewer.locator("#facts")).to_contain_text("hat.png")
    before = viewer.locator("img").first.bounding_box()["width"]
    page.keyboard.press("-")
    assert viewer.locator("img").first.bounding_box()["width"] == before - 64
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()


def test_roles_are_chosen_by_hand_and_by_keyboard(open_page):
    page = open_page()
    add(page, "source", file(1, "a.png"))
    add(page, "references", file(2, "b.png"), file(3, "c.png"))
    assert names(page) == ["the source: a.png", "reference 1: b.png", "reference 2: c.png"]
    page.locator("#references .tile").nth(1).drag_to(page.locator("#source .tile"))
    assert names(page) == ["the source: c.png", "reference 1: b.png", "reference 2: a.png"]
    page.locator("#references .tile").nth(1).drag_to(
        page.locator("#references .tile").first, target_position={"x": 5, "y": 40}
    )
    assert names(page)[1:] == ["reference 1: a.png", "reference 2: b.png"]
    page.locator("#references .tile").first.focus()
    page.keyboard.press("ArrowRight")
    assert names(page)[1:] == ["reference 1: b.png", "reference 2: a.png"]
    page.locator("#source .tile").drag_to(page.locator("#references .add"))
    assert names(page) == [f"reference {n}: {x}.png" for n, x in enumerate("bac", start=1)]
    page.get_by_label("Make it the source: a.png").click()
    page.locator("#references .tile").first.focus()
    page.keyboard.press("Delete")
    assert names(page) == ["the source: a.png", "reference 1: c.png"]
    drop(page, "#references", file(4, "d.png"))
    drop(page, None, file(5, "e.png"))  # pasted; there is a source
    assert names(page)[1:] == ["reference 1: c.png", "reference 2: d.png", "reference 3: e.png"]
    page.get_by_label("Remove: e.png").click()
    paint(page)
    seen = told(download(page)[0])
    assert (seen["source"], seen["references"]) == ("a.png", ["c.png", "d.png"])


def test_settings_come_back_from_a_png(open_page):
    page = open_page()
    page.locator("details summary").click()
    fields = {
        "#seed": "77", "#steps": "4", "#guidance": "2.5", "#image_guidance": "1.25",
        "#guidance_end": "1.5", "#zero_init_steps": "1", "#interval_first": "0.1",
        "#interval_last": "0.8",
    }  # fmt: skip
    for field, value in fields.items():
        page.fill(field, value)
    page.select_option("#solver", "heun")
    page.select_option("#renormalize", "true")
    page.check("#symmetric_guidance")
    page.uncheck("#ema")
    page.locator("#sizes label").last.click()
    size = page.locator("#sizes input:checked").get_attribute("value")
    add(page, "source", file())
    paint(page, "a kite überm Meer")
    png, name = download(page)
    seen = told(png)
    assert seen["size"] == size and seen["solver"] == "heun" and seen["ema"] is False
    assert seen["guidance_interval"] == [0.1, 0.8] and seen["renormalize"] is True

    other = open_page()
    drop(other, "#results", {"name": name, "mimeType": "image/png", "buffer": png})
    expect(other.locator("#prompt")).to_have_value("a kite überm Meer")
    for field, value in fields.items():
        assert other.input_value(field) == value, field
    assert other.input_value("#solver") == "heun" and other.input_value("#renormalize") == "true"
    assert other.is_checked("#symmetric_guidance") and not other.is_checked("#ema")
    assert other.locator("#sizes input:checked").get_attribute("value") == size
    expect(other.locator("#status")).to_contain_text("give it its pictures again: hat.png")
    add(other, "source", file())
    paint(other, "a kite überm Meer")
    assert download(other)[0] == png  # to the last bit


def test_cancel_by_key_and_by_button(open_page):
    page = open_page()
    page.fill("#steps", "1000")
    page.fill("#num", "16")  # minutes, if it were not cancelled
    page.fill("#prompt", "a red kite")
    for _ in range(3):
        page.click("#paint")
    expect(page.locator("#queue li")).to_have_count(3)
    expect(page.locator(".state").last).to_contain_text("painting")
    page.keyboard.press("Escape")
    expect(page.locator(".state").last).to_have_text("cancelled")
    page.locator("article .head button").last.click()
    expect(page.locator(".state").nth(1)).to_have_text("cancelled")
    page.keyboard.press("Escape")
    expect(page.locator(".state").first).to_have_text("cancelled")
    expect(page.locator("#queue")).to_be_hidden()
    page.fill("#num", "1")
    fast(page)
    paint(page)


def test_a_page_that_is_loaded_anew_finds_its_job(open_page):
    page = open_page()
    page.fill("#steps", "1000")
    page.fill("#num", "2")
    add(page, "source", file())
    add(page, "references", file(2, "b.png"))
    page.fill("#prompt", "a red kite")
    page.click("#paint")
    expect(page.locator("#history img")).to_have_count(1)
    page.reload()
    expect(page.locator("article h2")).to_have_text("a red kite")
    expect(page.locator(f"{PAINTED} figcaption")).to_have_count(2)
    expect(page.locator("#history img")).to_have_count(2)  # the first picture only once
    seen = [told(download(page, at)[0]) for at in (0, 1)]
    assert [one["number"] for one in seen] == [0, 1] and seen[0]["steps"] == 1000
    expect(page.locator(f"{PAINTED} .source")).to_have_count(2)  # the slider has its source
    page.locator("#history button").first.click()
    page.locator("#viewer").get_by_text("Settings", exact=True).click()
    assert names(page) == ["the source: hat.png", "reference 1: b.png"]
    page.reload()
    expect(page.locator("#history img")).to_have_count(2)
    expect(page.locator("article")).to_have_count(0)


def test_errors_are_shown_in_words(open_page):
    page = open_page()
    open_page.allowed.append("status of 422")  # the browser's own line
    page.click("#paint")
    expect(page.locator("#error")).to_have_text("there is no prompt; say what to paint")
    page.fill("#prompt", "a kite")
    page.fill("#steps", "0")
    page.click("#paint")
    expect(page.locator("#error")).to_have_text("steps is 0; give 1 to 1000")
    fast(page)
    add(page, "source", {"name": "cut.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.click("#paint")
    expect(page.locator("#error")).to_contain_text("source 'cut.png': a picture cannot be decoded")
    expect(page.locator("#error")).to_have_role("alert")
    page.get_by_label("Remove: cut.png").click()
    paint(page, "a 🪁")
    expect(page.locator("#error")).to_be_hidden()
    expect(page.locator(".note").first).to_contain_text("does not know 🪁")


def test_two_models_side_by_side(open_page):
    page = open_page()
    page.check("#compare")
    paint(page, count=2)
    assert page.locator(".column").count() == 2
    one, other = (told(download(page, at)[0]) for at in (0, 1))
    assert one["checkpoint"] != other["checkpoint"]
    same = one.keys() - {"checkpoint", "ema", "model"}
    assert {name: one[name] for name in same} == {name: other[name] for name in same}


def test_models_of_different_sizes_are_compared_at_one_that_is_chosen(open_page):
    page = open_page()

    def answer(route):
        told = route.fetch().json()
        told["models"][1]["sizes"] = ["48x96"]
        route.fulfill(json=told)

    page.route("**/api/models", answer)
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    fast(page)
    page.check("#compare")
    page.fill("#prompt", "a kite")
    page.click("#paint")
    words = "choose a size: the two models were trained with different ones"
    expect(page.locator("#error")).to_have_text(words)
    page.locator("#sizes label", has_text="64 × 64").click()
    paint(page, count=2)
    assert told(download(page, 0)[0])["size"] == told(download(page, 1)[0])["size"] == "64x64"


def test_a_picture_that_came_too_late_for_its_page_is_in_the_history(open_page):
    page, asked = open_page(), []

    def answer(route):
        asked.append(route)
        if len(asked) > 1:  # the first time there is no answer
            route.continue_()

    page.route("**/pictures/0.png", answer)
    page.fill("#prompt", "a red kite")
    with page.expect_request("**/pictures/0.png"):
        page.click("#paint")
    expect(page.locator("#status")).to_have_text("done")
    assert page.locator("#history img").count() == 0
    page.reload()
    expect(page.locator("#history img")).to_have_count(1)
    expect(page.locator(f"{PAINTED} figcaption")).to_have_count(1)


def test_history_outlives_the_page_and_gives_its_pictures(open_page):
    page = open_page()
    add(page, "source", file())
    paint(page, count=1)
    expect(page.locator("#history img")).to_have_count(1)  # it is kept
    page.get_by_text("As reference", exact=True).click()
    assert names(page)[1] == "reference 1: make-it-blue-0.png"
    page.reload()
    expect(page.locator("#history img")).to_have_count(1)
    assert page.locator(".tile").count() == 0
    page.locator("#history button").click()
    page.locator("#viewer").get_by_text("Settings", exact=True).click()
    assert page.input_value("#prompt") == "make it blue" and names(page) == ["the source: hat.png"]
    page.click("#forget")
    expect(page.locator("#past")).to_be_hidden()
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#past")).to_be_hidden()


def test_a_file_of_prompts(open_page):
    page = open_page()
    open_page.allowed.append("status of 422")
    text = b'{"prompt": "a kite", "seed": 5}\n{"prompt": "a cup"}\n{"prompt": "a dog"}\n'
    lines = {"name": "many.jsonl", "mimeType": "application/jsonl", "buffer": text}
    page.set_input_files("#file", lines)
    expect(page.locator(f"{PAINTED} figcaption")).to_have_count(3)
    assert page.locator("article h2").all_text_contents() == ["a dog", "a cup", "a kite"]
    assert told(download(page, 2)[0])["seed"] == "5"
    page.set_input_files("#file", lines | {"buffer": text + b'{"source": "a.png", "prompt": "x"}'})
    expect(page.locator("#error")).to_contain_text("line 4 of many.jsonl: it names pictures")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything(open_page, scheme):
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    add(page, "source", file())
    add(page, "references", file(2, "b.png"), file(3, "c.png"))
    page.get_by_label("Later: b.png").tap()  # as nothing can be dragged there
    page.get_by_label("Make it the source: c.png").tap()
    assert names(page) == ["the source: c.png", "reference 1: hat.png", "reference 2: b.png"]
    page.locator("details summary").tap()
    expect(page.locator("#paint")).to_be_in_viewport()
    page.fill("#prompt", "make it blue")
    page.locator("#paint").tap()
    expect(page.locator(f"{PAINTED} figcaption")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.locator(f"{PAINTED} button.stack").tap()
    box = page.locator("#viewer").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_everything_has_a_name_and_is_reached_by_keyboard(open_page):
    page = open_page()
    add(page, "source", file())
    paint(page)
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea, a, img")]
      .filter((x) => x.checkVisibility() && !x.ariaLabel && !x.labels?.length
        && !x.textContent.trim() && !x.hasAttribute("alt") && !x.title)
      .map((x) => x.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.focus("#prompt")
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"dice", "seed", "steps", "paint", "open", "tile", "stack", "button"} <= seen
    page.focus("#paint")
    page.keyboard.press("Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_interface_is_described(open_page):
    page = open_page("/docs")
    expect(page.get_by_role("heading", name="POST /api/paint")).to_be_visible()
    expect(page.locator("#PaintForm")).to_contain_text("of the noise, 0 to 4294967295")
    expect(page.locator("#Settings")).to_contain_text("guidance_interval")
