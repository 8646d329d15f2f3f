"""The backbone that the rows of scale demo take over."""

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from megdet.errors import InputError
from megdet.model.backbone import load_pretrained
from megdet.model.choice import make_detector
from megdet.paper.pretraining import export_backbone, pretrained_backbone, pretraining_recipe
from megdet.paper.rows import row_recipe
from megdet.paper.tables import TABLE3
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint, open_checkpoint, update_state
from megdet.run_folder.folder import RunFolder
from megdet.training.run import RunOptions
from small_runs import ALONE, save_run, write_small_set


def test_rows_take_over_weights_and_statistics_of_the_pretrained_backbone_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, trained = save_run(tmp_path / "pretraining", pretraining_recipe(None))
    assert any(name.startswith("backbone.last.1.running_mean") for name, _ in trained.named_buffers())
    file = tmp_path / "pretraining" / "backbone.safetensors"
    export_backbone(run, file)
    recipe = row_recipe(TABLE3[0], "demo", {"model.backbone.weights": str(file)})
    torch.manual_seed(5)
    row = make_detector(recipe, 3)
    load_pretrained(row.backbone, Path(recipe.model.backbone.weights))
    theirs = trained.state_dict()
    own = {name: tensor for name, tensor in row.state_dict().items() if name.startswith("backbone.")}
    assert own
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    assert not torch.equal(row.rpn.objectness.weight, trained.rpn.objectness.weight)
    assert pretrained_backbone(tmp_path, None, RunOptions(), ALONE) == file  # made already: nothing is trained
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    update_state(checkpoint, msgspec.structs.replace(open_checkpoint(checkpoint).state, data="of other pictures"))
    pictures = tmp_path / "data/demo-hard"
    write_small_set(pictures, "train", 2)
    (pictures / "annotations").mkdir()
    (pictures / "train.json").rename(pictures / "annotations/train.json")
    with pytest.raises(InputError, match=r"pretraining holds a backbone of other pictures .*train\.json: delete"):
        pretrained_backbone(tmp_path, None, RunOptions(), ALONE)
    run.write_recipe(dump_recipe(replace(pretraining_recipe(None), seed=9)))
    with pytest.raises(InputError, match=r"holds the backbone of another recipe \(seed: 0 here, 9 there\): delete"):
        pretrained_backbone(tmp_path, None, RunOptions(), ALONE)


def test_a_pretraining_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint is there; delete the folder"):
        export_backbone(RunFolder(tmp_path).create(), tmp_path / "backbone.safetensors")
