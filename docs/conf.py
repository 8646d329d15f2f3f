"""Settings of the documentation site: Sphinx reads this file when `make site` builds the pages of this folder."""

import re

from sphinx.application import Sphinx

from megdet import __version__

project = "MegDet"
author = "The MegDet developers"
project_copyright = "The MegDet developers, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["pictures"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3  # links such as contract.md#measured, as GitHub makes them

html_theme = "furo"
html_title = "MegDet"
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # it would fetch the pages, which a browser refuses for files
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}


def for_readers_of_the_site(_app: Sphinx, _page: str, source: list[str]) -> None:
    """A link that shows the name of a file shows the title of its page; a block that is not run says so above it."""
    text = re.sub(r"\[[\w-]+\.md\]\(([\w-]+\.md[^)]*)\)", r"[](\1)", source[0])
    source[0] = re.sub(r"<!-- not in CI: ([^>]+) -->\n", r"{.why-not}\nNot run in CI: \1.\n\n", text)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", for_readers_of_the_site)
