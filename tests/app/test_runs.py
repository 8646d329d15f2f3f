"""The names under which runs are served, and what is known of them."""

from megdet.api.detector import LoadedDetector
from megdet.app.runs import distinct_names, served_run
from megdet.recipe import Data, Evaluation, Recipe


def test_runs_have_the_names_of_their_folders_told_apart_and_never_their_paths():
    assert distinct_names(["/home/me/runs/demo", "/other/demo/"]) == ["demo", "demo (2)"]
    assert distinct_names(["/home/me/demo/checkpoints/step_00000007"]) == ["demo step_00000007"]
    assert distinct_names(["/home/me/de\x1bmo"]) == ["de\\u001bmo"]


class ExportedFile(LoadedDetector):
    """As that of an exported file: it has a recipe, and no trained detector."""

    class_names, category_ids, has_masks = ("bo\x1blt",), (7,), True
    recipe = Recipe(data=Data(max_pixels=123), evaluation=Evaluation(batch_size=3))

    def __init__(self) -> None:
        pass


def test_limits_come_from_the_recipe_of_a_run_or_of_an_exported_file():
    run = served_run("a", ExportedFile())
    assert (run.max_pixels, run.most_together, run.has_masks) == (123, 3, True)
    assert (run.class_names, run.category_ids) == (("bo\\u001blt",), (7,))
