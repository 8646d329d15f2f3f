"""Rules of the house that the floors alone do not hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megdet.recipe_file import load_recipe, packaged_recipes

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src/megdet"


def imported_modules(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", sorted((SOURCE / "model").glob("*.py")), ids=lambda file: file.name)
def test_the_model_never_imports_torch_distributed(file: Path) -> None:
    assert not {name for name in imported_modules(file) if name.startswith("torch.distributed")}


def test_only_the_model_and_the_papers_own_tables_spell_the_parts_of_a_detector() -> None:
    allowed = {
        *(
            "architecture.py",
            "architecture_parts.py",
            "architecture_heads.py",
            "planning/published.py",
            "planning/published_speeds.py",
            "planning/counts.py",
            "planning/counting.py",
        ),
        *("paper/times.py", "paper/sampling.py"),
        "paper/entry.py",  # the keys of the appendix's parts
        "data/advice.py",  # the keys of the recipe that it writes
        "training/initial_weights.py",  # the name of a model of torchvision's
    }
    found = {
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        if file.parent.name != "model" and re.search(r"rpn|box_head|\bLOSSES\b", file.read_text(encoding="utf-8"))
    }
    assert found - allowed == set()


@pytest.mark.parametrize("word", ["world_size", "WORLD_SIZE", "get_world_size", "device_count"])
def test_only_the_distributed_floor_and_the_command_line_know_how_many_devices_there_are(word: str) -> None:
    allowed = {"distributed", "cli", "run_folder", "contract", "studies", "paper", "planning", "runtime.py"}
    allowed |= {"report", "screen"}  # they tell people what environment.json says
    files = [file for file in SOURCE.rglob("*.py") if re.search(rf"\b{word}\b", file.read_text(encoding="utf-8"))]
    places = {file.relative_to(SOURCE).parts[0] for file in files}
    assert places - allowed == set()


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_packaged_recipe_is_valid_and_opens_with_source_and_command(name: str) -> None:
    load_recipe(name)
    header = [line for line in packaged_recipes()[name].splitlines() if line.startswith("#")]
    assert any(line.startswith("# Source:") for line in header)
    assert any(line.startswith("# Command:") and name in line for line in header)
    assert any(line.startswith("# Cost:") for line in header)


def test_the_reference_pages_are_what_make_docs_writes() -> None:
    code = (
        "import sys; sys.path.insert(0, 'docs'); import make; from pathlib import Path;"
        "assert Path('docs/recipe.md').read_text() == make.knobs_page(), 'docs/recipe.md: run make docs';"
        "assert Path('docs/claims.md').read_text() == make.claims_page(), 'docs/claims.md: run make docs';"
        "assert Path('docs/api.md').read_text() == make.api_page(), 'docs/api.md: run make docs';"
        "assert Path('docs/recipes.md').read_text() == make.recipes_page(), 'docs/recipes.md: run make docs';"
        "drawn = [Path('docs/pictures', name).read_text() == draw() for name, draw in make.PICTURES.items()];"
        "assert all(drawn), 'docs/pictures: run make docs'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_every_link_of_a_page_leads_somewhere_and_nothing_is_left_open(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if link and not (page.parent / link).exists()] == []
    assert "@@" not in text


def test_no_file_of_the_package_is_much_over_300_lines() -> None:
    long = {str(file): n for file in SOURCE.rglob("*.py") if (n := len(file.read_text().splitlines())) > 350}
    assert not long
