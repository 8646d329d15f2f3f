"""Writes the reference pages that follow from the code: docs/recipe.md (every knob), recipes.md (the packaged), api.md.

Run by `make docs`; a test holds that the pages are up to date.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import megdet
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


def api_page() -> str:
    """Every name that `import megdet` offers: how it is called, and its docstring."""
    lines = [
        "# What `import megdet` offers",
        "",
        "Written by `make docs` from the docstrings. How it is used: [python.md](python.md).",
    ]
    for name in megdet.__all__:
        value = getattr(megdet, name)
        lines += ["", f"## {name}", "", *_described(f"megdet.{name}", value)]
        if not inspect.isclass(value) or issubclass(value, Exception):
            continue
        for member, own in vars(value).items():
            if member.startswith("_") and member != "__call__":
                continue
            is_attribute = not callable(own) and inspect.getdoc(
                getattr(own, "fget", None) or getattr(own, "func", None)
            )
            if is_attribute:
                lines += ["", f"**`.{member}`**: {is_attribute}"]
            elif inspect.isfunction(own):
                lines += ["", *_described("detector(...)" if member == "__call__" else f".{member}", own)]
    return "\n".join(lines) + "\n"


def _described(title: str, value: Any) -> list[str]:
    """A signature without types, which the docstring tells, and the docstring."""
    is_error = inspect.isclass(value) and issubclass(value, Exception)
    shown = "" if is_error else _arguments(value)
    title = title.replace("(...)", "")
    text = inspect.getdoc(value) or ""
    text = re.sub(r"^(Args|Raises|Returns):$", r"*\1*\n", text, flags=re.MULTILINE)
    text = re.sub(r"^    (\w+): ", r"- `\1`: ", text, flags=re.MULTILINE)
    return [f"**`{title}{shown}`**", "", text]


def _arguments(value: Any) -> str:
    parameters = [own for own in inspect.signature(value).parameters.values() if own.name != "self"]
    bare = [own.replace(annotation=inspect.Parameter.empty) for own in parameters]
    return str(inspect.Signature(bare))


def main() -> None:
    """Write the pages."""
    (DOCS / "api.md").write_text(api_page(), encoding="utf-8")
    (DOCS / "recipe.md").write_text(knobs_page(), encoding="utf-8")
    (DOCS / "recipes.md").write_text(recipes_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
