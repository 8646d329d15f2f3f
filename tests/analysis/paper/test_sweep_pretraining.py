"""The backbone that the rows of scale demo take over."""

from pathlib import Path

import pytest
import torch

from megdet.analysis.paper.pretraining import export_backbone, pretrained_backbone, pretraining_recipe
from megdet.analysis.paper.rows import row_recipe
from megdet.analysis.paper.tables import TABLE3
from megdet.errors import InputError
from megdet.journal.run_folder import RunFolder
from megdet.model.detector import Detector
from megdet.training.loop import RunOptions
from small_runs import ALONE, save_run


def test_rows_take_over_weights_and_statistics_of_the_pretrained_backbone_alone(tmp_path: Path) -> None:
    run, trained = save_run(tmp_path / "pretraining", pretraining_recipe(None))
    assert any(name.startswith("backbone.last.1.running_mean") for name, _ in trained.named_buffers())
    file = tmp_path / "pretraining" / "backbone.safetensors"
    export_backbone(run, file)
    recipe = row_recipe(TABLE3[0], "demo", {"backbone.weights": str(file)})
    torch.manual_seed(5)
    row = Detector(recipe, 3)
    theirs = trained.state_dict()
    own = {name: tensor for name, tensor in row.state_dict().items() if name.startswith("backbone.")}
    assert own
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in own.items())
    assert not torch.equal(row.rpn.objectness.weight, trained.rpn.objectness.weight)
    assert pretrained_backbone(tmp_path, None, RunOptions(), ALONE) == file  # made already: nothing is trained


def test_a_pretraining_without_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint is there; delete the folder"):
        export_backbone(RunFolder(tmp_path).create(), tmp_path / "backbone.safetensors")
