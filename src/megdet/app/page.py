"""The page of the web demo, out of its parts."""

from importlib.resources import files


def page_text() -> str:
    """The HTML with its one style and one script inside; `guard.content_policy` lets a browser run these alone."""
    own, runs = files("megdet.app") / "page", files("megdet.report") / "page/runs.js"  # both pages read masks
    script = "".join(part.read_text(encoding="utf-8") for part in (runs, own / "page.js"))
    parts = {"style": (own / "page.css").read_text(encoding="utf-8"), "script": f'"use strict";\n{script}'}
    html = (own / "page.html").read_text(encoding="utf-8")
    for name, text in parts.items():
        html = html.replace(f"{{{{{name}}}}}", text)
    return html
