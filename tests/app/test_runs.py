"""The names under which runs are served."""

from megdet.app.runs import distinct_names


def test_runs_have_the_names_of_their_folders_told_apart_and_never_their_paths():
    assert distinct_names(["/home/me/runs/demo", "/other/demo/"]) == ["demo", "demo (2)"]
    assert distinct_names(["/home/me/demo/checkpoints/step_00000007"]) == ["demo step_00000007"]
    assert distinct_names(["/home/me/de\x1bmo"]) == ["de\\u001bmo"]
