"""Writes the reference pages that follow from the code: docs/recipe.md (every knob) and docs/recipes.md (the packaged).

Run by `make docs`; a test holds that the pages are up to date.
"""

from pathlib import Path

from megdet.recipe_file import packaged_recipes
from megdet.recipe_help import sections

DOCS = Path(__file__).resolve().parent


def knobs_page() -> str:
    """Every key, its type, default and meaning, section by section, from the source."""
    lines = [
        "# Every knob of a recipe",
        "",
        "Written by `make docs` from `recipe.py`, `architecture.py`, `architecture_parts.py` and",
        "`architecture_heads.py`.",
        "A key is written `section: {key: value}` in YAML and",
        "`--section.key value` on the command line. The sections of `model` are those of the detector that",
        "`model.kind` names.",
    ]
    for section in sections():
        lines += ["", f"## {section.name or 'top level'}", "", section.title, "", "| key | default | meaning |"]
        lines.append("|---|---|---|")
        for knob in section.knobs:
            choices = f" (one of {', '.join(map(repr, knob.choices))})" if knob.choices else ""
            lines.append(f"| `{knob.key}` | `{knob.default}` | {knob.meaning}{choices} |")
    return "\n".join(lines) + "\n"


def recipes_page() -> str:
    """The header of every packaged recipe."""
    lines = [
        "# Packaged recipes",
        "",
        "Written by `make docs` from the recipes' own headers. `megdet recipes NAME` prints one.",
    ]
    for name, text in packaged_recipes().items():
        header = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        lines += ["", f"## {name}", "", *[f"{line}  " for line in header]]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write both pages."""
    (DOCS / "recipe.md").write_text(knobs_page(), encoding="utf-8")
    (DOCS / "recipes.md").write_text(recipes_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
