"""The frame of a page that is one HTML file and asks no other host for anything.

Texts on it are not trusted. All are to be escaped, and the page's own policy lets a browser run
only the scripts and styles that it was written with.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from typing import Any

import qk_jax
from qk_jax.base import files

_ASSETS = files.Path(qk_jax.__file__).parent / "assets" / "pages"
_ENLARGED = (
    '<dialog aria-label="Picture"><img alt=""><p><span></span>'
    '<button type="button" value="close" autofocus>Close</button></p></dialog>\n'
)


def frame(title: str, styles: Sequence[str], scripts: Sequence[str]) -> tuple[str, str]:
    """What stands before the body's own elements, and what stands after them.

    A picture in a `button` within `main` is enlarged by it.

    Args:
      title: of the page.
      styles: names of files in assets/pages/, after shared.css.
      scripts: names of such files, after shared.js.
    """
    style = _joined(["shared.css", *styles])
    script = _joined(["shared.js", *scripts])
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n"
    )
    return head, f"{_ENLARGED}<script>{script}</script>\n</body>\n</html>\n"


def encode(text: str) -> bytes:
    """The bytes of a page's text; half a surrogate pair, which has no UTF-8, is spelled out."""
    return text.encode("utf-8", "backslashreplace")


def data(name: str, value: Any) -> str:
    """An element with the id `name` from which a script reads `value` as JSON; nothing in it can
    end the element, or begin another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def table(facts: Sequence[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = (
        f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts
    )
    return f"<table>{''.join(cells)}</table>"


def _joined(names: Sequence[str]) -> str:
    return "".join((_ASSETS / name).read_text("utf-8") for name in names)


def _hash(text: str) -> str:
    """What a policy calls the inline script or style `text`."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
