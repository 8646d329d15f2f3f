"""Writes the reference pages that follow from the code.

docs/recipe.md (every key), recipes.md (the packaged ones), api.md, claims.md (the rules of the experiments), and the
drawings of the glossary.

Run by `make docs`; a test holds that the pages are up to date.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drawings import PICTURES

import megdet
from megdet.paper.claims import rules
from megdet.paper.claims.claim import CLAIMS, Claim
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


def claims_page() -> str:
    """The rules of the claims, and for each its question, its rows and its statements."""
    general = inspect.getdoc(rules) or ""
    lines = [
        "# Claims: the rules, written before the runs",
        "",
        "Written by `make docs` from `paper/claims/`. `megdet reproduce claim-failing --weights",
        "mobilenet_v2-b0353104.pth --jobs 2` trains the rows of a claim, two at a time, judges its statements by these",
        "rules, and goes on where it was stopped. What was found is in [experiments.md](experiments.md). A row that no",
        "statement names is shown and not judged.",
        "",
        *general.splitlines()[2:],
    ]
    for claim in CLAIMS.values():
        lines += ["", f"## {claim.name}", "", claim.question, "", f"The paper: {claim.paper}", ""]
        lines += [
            f"- Recipe `{claim.recipe}` with {_keys(claim.keys)}.",
            f"- {_data(claim)}",
            f"- Seeds a row: {claim.seeds}.",
        ]
        if claim.trunk:
            lines.append(f"- All rows start from the weights of one training with {_keys(claim.trunk)}.")
        if claim.factors:
            lines.append(
                f"- Measured at the kept checkpoints of every training: k = {', '.join(map(str, claim.factors))}."
            )
        lines += ["", "| row | keys |", "|---|---|"]
        lines += [f"| `{row}` | {_keys(keys)} |" for row, keys in claim.rows.items()]
        lines += ["", "Statements that are judged:", ""]
        for own in claim.statements:
            if isinstance(own, rules.Keeps):
                lines.append(f"- {own.statement} (`{own.row}`; within a factor of {1 + own.margin:g})")
                continue
            margin = getattr(own, "margin", None)
            within = "" if margin is None else f"; equal within {margin:g} points"
            lines.append(f"- {own.statement} (`{own.row}` against `{own.than}`{within})")
    return "\n".join(lines) + "\n"


def _keys(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key} {value}`" for key, value in keys.items())


def _data(claim: Claim) -> str:
    if claim.pictures is None:
        return f"The images of scale `{claim.scale}`."
    return f"{claim.pictures[0]:,} drawn pictures to train on, {claim.pictures[1]:,} to evaluate on."


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
    (DOCS / "claims.md").write_text(claims_page(), encoding="utf-8")
    (DOCS / "recipe.md").write_text(knobs_page(), encoding="utf-8")
    (DOCS / "recipes.md").write_text(recipes_page(), encoding="utf-8")
    for name, draw in PICTURES.items():
        (DOCS / "pictures" / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
