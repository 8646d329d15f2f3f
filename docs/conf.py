"""Settings of the documentation site: Sphinx reads this file when `make site` builds the pages of this folder."""

from megdet import __version__

project = "MegDet"
author = "The MegDet developers"
copyright = "The MegDet developers, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["pictures"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3  # links such as contract.md#measured, as GitHub makes them


html_theme = "furo"
html_title = "MegDet"
html_show_sphinx = False
html_copy_source = False


html_theme_options = {"navigation_with_keys": True}
