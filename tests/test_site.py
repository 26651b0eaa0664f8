"""The site of docs/: it builds without network, and its pages ask no other host for anything."""

import functools
import html.parser
import http.server
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

from qk_jax.experiment import config
from tests import needs, test_docs

ROOT = pathlib.Path(__file__).resolve().parents[1]
# A main that another test has imported is run once more, which runpy warns of.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:runpy")
PATIENCE_MS = 120_000  # on a machine that is busy with other tests
# What a browser fetches by itself, as against what one clicks on.
FETCHED = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src",
    "audio": "src", "embed": "src", "object": "data", "link": "href", "form": "action",
}  # fmt: skip
OFFLINE = """
import socket, sys
def refused(self, address, *rest):
    raise OSError(f"the site asks {address} while it is built")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refused
from mkdocs.__main__ import cli
cli(["build", "--strict", "-f", sys.argv[1], "--site-dir", sys.argv[2]])
"""


def build(root, folder):
    """(exit status, output) of a build of the site of the checkout at `root`."""
    needs.module("mkdocs")
    needs.module("mkdocstrings_handlers.python")
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OFFLINE, str(root / "launch/docs/mkdocs.yml"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    status, told = build(ROOT, folder)
    assert status == 0, told
    return folder


def test_a_link_that_leads_nowhere_and_a_page_that_none_leads_to_end_the_build(tmp_path):
    for name in ("docs", "launch/docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    above = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "setup.py"]
    for name in [*above, "qk_jax", "configs"]:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs" / "new.md").write_text("# New\n\n[a](train.md#nowhere)\n")
    status, told = build(tmp_path, tmp_path / "site")
    assert status and "WARNING -  Doc file 'new.md' contains a link 'train.md#nowhere'" in told
    assert 'not included in the "nav" configuration' in told


class Fetches(html.parser.HTMLParser):
    """Addresses that a page makes a browser fetch, and its text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") in ("next", "prev", "canonical"):
            return
        if address := attrs.get(FETCHED.get(tag)):
            self.found.append(address)

    def handle_data(self, data):
        self.text += data


def foreign(addresses):
    return [x for x in addresses if x.startswith(("http:", "https:", "//"))]


def test_pages_ask_no_other_host_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= {p.name for p in pages}
    for page in pages:
        found = Fetches(page.read_text(encoding="utf-8")).found
        assert found and not foreign(found), page.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert "url(http" not in text and "url(//" not in text and "@import" not in text


def test_a_page_that_would_is_found():
    made = '<script src="https://cdn/x.js"></script><img src="a.png"><a href="https://b">b</a>'
    assert foreign(Fetches(made).found) == ["https://cdn/x.js"]


def test_the_reference_has_every_option_and_every_field(site):
    commands = Fetches((site / "commands.html").read_text(encoding="utf-8")).text
    for command in test_docs.COMMANDS:
        if command not in test_docs.SHIPPED:
            wanted = set(test_docs.OPTION.findall(test_docs.help_of(command)))
            assert not wanted - set(test_docs.OPTION.findall(commands)), command
    page = (site / "config.html").read_text(encoding="utf-8")
    names = [name for name, _ in config.fields(config.load("stage3:20b"))]
    listed = [name for name in names if not name.startswith("sharding.")]
    assert not [name for name in listed if f"<code>{name}</code>" not in page]
    rest = Fetches((site / "rest.html").read_text(encoding="utf-8")).text
    assert "POST /api/paint" in rest and "GET /api/jobs/{job_id}" in rest and "JobView" in rest
    api = (site / "api.html").read_text(encoding="utf-8")
    assert 'id="qk_jax.api.trained.TrainedModel.generate"' in api


def test_files_above_the_docs_are_pages(site):
    """Links to them are turned, and theirs into the docs."""
    assert 'href="tour.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="train.html' in (site / "tour.html").read_text(encoding="utf-8")
    assert (site / "first_picture.ipynb").is_file() and (site / "LICENSE.txt").is_file()


@pytest.fixture(scope="module")
def address(site):
    """Of a server of the built site."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_nothing_is_fetched_elsewhere(address, browser, scheme):
    page = browser.new_page(color_scheme=scheme)
    page.set_default_timeout(PATIENCE_MS)
    seen, wrong = [], []
    page.on("request", lambda request: seen.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    for name in ("index", "tour", "first_picture", "commands", "api", "train"):
        page.goto(f"{address}/{name}.html", wait_until="networkidle")
    assert len(seen) > 20 and not wrong
    assert not [url for url in seen if not url.startswith((address, "data:"))]
    shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (shown == "rgb(255, 255, 255)") == (scheme == "light")
    page.close()


def test_a_search_finds_a_field(address, browser):
    page = browser.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(f"{address}/index.html")
    words = page.locator("input.md-search__input")
    words.press_sequentially("query_noise")  # it searches as keys go up
    page.locator(".md-search-result__link[href*='config.html']").first.wait_for()
    page.close()
