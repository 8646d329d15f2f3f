import json
import math
import os

import numpy as np
import pytest

from megdet.errors import InputError
from megdet.run_folder.folder import (
    RunFolder,
    decode_non_finite,
    encode_non_finite,
)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_creating_a_run_folder_twice_leaves_what_is_in_it(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a").create()
    folder.write_recipe("steps: 3\n")
    assert RunFolder(folder.path).create().read_recipe() == "steps: 3\n"
    assert names_in(folder.path) == ["checkpoints", "pictures", "recipe.yaml"]


def test_a_folder_without_a_recipe_has_none(tmp_path):
    assert RunFolder(tmp_path).read_recipe() is None


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file cannot be written: .*; choose another with --run"):
        RunFolder(tmp_path / "file").create()


def test_a_run_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a cannot be written: .*; choose another with --run"):
        RunFolder(tmp_path / "file" / "runs" / "a").create()


def test_a_run_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    user = os.geteuid()
    try:
        if user == 0:  # root may write everywhere, nobody may not
            os.seteuid(65534)
        with pytest.raises(InputError, match="Permission denied"):
            RunFolder(tmp_path / "a").create()
    finally:
        os.seteuid(user)


def test_numbers_that_are_not_finite_survive_strict_json():
    value = {"a": [math.inf, -math.inf, 1.5], "b": (np.float32(2.5), np.int64(3), np.float64("nan")), "c": "text"}
    text = json.dumps(encode_non_finite(value), allow_nan=False)
    back = decode_non_finite(json.loads(text))
    assert back["a"] == [math.inf, -math.inf, 1.5]
    assert back["b"][:2] == [2.5, 3]
    assert math.isnan(back["b"][2])
    assert back["c"] == "text"
