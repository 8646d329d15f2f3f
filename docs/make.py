"""Writes the reference pages that follow from the code: docs/recipe.md (every knob) and docs/recipes.md (the packaged).

Run by `make docs`; a test holds that the pages are up to date.
"""

import ast
import inspect
from pathlib import Path

from megdet import recipe
from megdet.recipe_file import packaged_recipes

DOCS = Path(__file__).resolve().parent


def knobs_page() -> str:
    """Every key, its type, default and meaning, section by section, from the source of recipe.py."""
    lines = [
        "# Every knob of a recipe",
        "",
        "Written by `make docs` from `src/megdet/recipe.py`. A key is written `section: {key: value}` in YAML and",
        "`--section.key value` on the command line.",
    ]
    tree = ast.parse(inspect.getsource(recipe))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    sections = {"Recipe": ""}
    for node in classes["Recipe"].body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) in classes:
            sections[ast.unparse(node.annotation)] = ast.unparse(node.target) + "."
    for name, prefix in sections.items():
        title = prefix.rstrip(".") or "top level"
        lines += ["", f"## {title}", "", ast.get_docstring(classes[name]) or "", "", "| key | default | meaning |"]
        lines.append("|---|---|---|")
        body = classes[name].body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or ast.unparse(node.annotation) in classes:
                continue
            text = following.value.value if isinstance(following, ast.Expr) else ""  # type: ignore[attr-defined]
            default = ast.unparse(node.value) if node.value is not None else ""
            kind = ast.unparse(node.annotation)
            choices = f" (one of {kind.removeprefix('Literal')[1:-1]})" if kind.startswith("Literal") else ""
            lines.append(f"| `{prefix}{ast.unparse(node.target)}` | `{default}` | {text}{choices} |")
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
