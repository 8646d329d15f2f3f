"""The page as one file: no network, nothing from anywhere else, and no text of a file can become part of its code."""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from megdet import __version__
from megdet.errors import InputError
from megdet.files import make_folder, write_text_atomically
from megdet.run_folder.folder import encode_non_finite

_SCRIPTS = (
    "dom.js",
    "charts.js",
    "curves.js",
    "tables.js",
    "mistakes.js",
    "course.js",
    "runs.js",
    "pictures.js",
    "page.js",
)
"""In this order, as one script."""
_ESCAPED = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def write_page(path: Path, title: str, content: Mapping[str, Any]) -> None:
    """Write the page of `content`, which `page/page.js` draws, as a whole. Raises InputError where that cannot be."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a file, such as {path / 'report.html'}")
    make_folder(path.parent)
    write_text_atomically(path, page(title, content))


def page(title: str, content: Mapping[str, Any]) -> str:
    """The HTML of a page.

    Its policy lets a browser run this script and no other, and load nothing.
    """
    files = resources.files("megdet.report") / "page"
    script = "".join((files / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    style = (files / "page.css").read_text(encoding="utf-8")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    parts = {
        "policy": policy,
        "title": _text(title),
        "style": style,
        "script": script,
        "data": embedded({"title": title, "version": __version__, **content}),
    }
    frame = (files / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], frame)


def embedded(value: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element or begin another."""
    text = json.dumps(encode_non_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _ESCAPED.items():
        text = text.replace(character, escape)
    return text


def _hash(text: str) -> str:
    """The hash of an element's text, as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: str) -> str:
    for character, escape in {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.items():
        text = text.replace(character, escape)
    return text
