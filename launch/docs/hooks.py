"""What MkDocs does besides: pages that are made from other files and from the code itself.

docs/ is read on GitHub as well, so its pages are plain Markdown with relative links. README.md and
its like lie above docs/; here they become pages, and links to them are turned. The reference of
command lines and config fields is made from the parsers and the configs at each build.
"""

from __future__ import annotations

import base64
import json
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(pathlib.Path(__file__).parent)]

import reference  # noqa: E402  (beside this file)
import rest  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402

# Files above docs/ -> their names in the site.
ABOVE = {
    "README.md": "tour.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "LICENSE.txt",
}
NOTEBOOK = "first_picture.ipynb"
LINK = re.compile(r"(\]\()([^)\s#]+)(?=[#)])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    made = {name: (ROOT / path).read_text(encoding="utf-8") for path, name in ABOVE.items()}
    made |= {
        "first_picture.md": notebook((ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8")),
        "commands.md": reference.commands(),
        "config.md": reference.fields(),
        "api.md": reference.objects(),
        "rest.md": rest.page(),
        "site.css": (pathlib.Path(__file__).parent / "site.css").read_text(encoding="utf-8"),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns links between docs/ and the files above it into those of the site."""
    above = page.file.src_uri in ABOVE.values()
    return LINK.sub(lambda found: found[1] + turned(found[2], above), markdown)


def turned(target: str, above: bool) -> str:
    """Where a link of a page leads in the site.

    Args:
      target: as written, without its anchor.
      above: whether the page lies above docs/.
    """
    path = target.removeprefix("docs/") if above else target.removeprefix("../")
    if path == target and not above:
        return target
    return ABOVE.get(path, "first_picture.md" if path == NOTEBOOK else path)


def notebook(text: str) -> str:
    """The Markdown of a notebook: texts, code, and what its cells have put out."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            found = output.get("data", {})
            if "image/png" in found:
                data = base64.b64encode(base64.b64decode("".join(found["image/png"]))).decode()
                parts.append(f"![painted](data:image/png;base64,{data})")
            elif output.get("name") == "stderr":
                continue  # of the machine where it ran
            elif printed := "".join(output.get("text", found.get("text/plain", []))).rstrip():
                parts.append(f"```text\n{printed}\n```")
    parts.append(f"The notebook itself: [{NOTEBOOK}]({NOTEBOOK}){{: download }}")
    return "\n\n".join(parts) + "\n"
