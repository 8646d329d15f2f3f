from dataclasses import replace
from pathlib import Path

import pytest
import torch

from factories import with_model
from megdet.data.coco import CocoDataset
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.model.detector import Detector
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.folder import RunFolder
from megdet.training import run as run_module
from megdet.training.run import open_run
from megdet.training.trainer import make_trainer
from small_runs import ALONE, CLASS_NAMES, save_run, small_recipe, train_set, write_small_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 8)
    return small_recipe(folder)


@pytest.fixture(scope="module")
def dataset(recipe) -> CocoDataset:
    return train_set(recipe)


def started(recipe: Recipe, dataset: CocoDataset, source: Path | None) -> Detector:
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, 1)
    recipe = replace(recipe, start_from=str(source or ""))
    return make_trainer(recipe, dataset.class_names, layout, ALONE).model


def test_a_run_of_the_same_classes_gives_all_its_weights(recipe, dataset, tmp_path):
    _, source = save_run(tmp_path / "run", replace(recipe, precision="float32"), seed=3)
    state = started(recipe, dataset, tmp_path / "run").state_dict()
    fresh = started(recipe, dataset, None).state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name
    assert not torch.equal(state["box_head.classes.weight"], fresh["box_head.classes.weight"])
    assert state["fpn.output.0.0.weight"].dtype == torch.float64


@pytest.mark.parametrize("names", [("nut", "bolt", "gear"), ("bolt", "nut", "gear", "belt")])
def test_the_class_layers_start_anew_where_the_classes_are_others(recipe, dataset, names, tmp_path):
    _, source = save_run(tmp_path / "run", replace(recipe, precision="float32"), names, seed=3)
    state, fresh = (started(recipe, dataset, path).state_dict() for path in (tmp_path / "run", None))
    of_classes = ("box_head.classes.", "box_head.deltas.")
    for name, tensor in state.items():
        expected = fresh[name] if name.startswith(of_classes) else source.state_dict()[name].to(tensor.dtype)
        assert torch.equal(tensor, expected), name
    assert dataset.class_names == CLASS_NAMES != names


def test_the_averaged_weights_are_taken_where_there_are_any(recipe, dataset, tmp_path):
    _, source = save_run(tmp_path / "run", replace(recipe, precision="float32"), averages=True)
    state = started(recipe, dataset, tmp_path / "run").state_dict()
    assert torch.equal(state["rpn.conv.weight"], source.state_dict()["rpn.conv.weight"].double() + 1) or torch.equal(
        state["rpn.conv.weight"], (source.state_dict()["rpn.conv.weight"] + 1).double()
    )


@pytest.mark.parametrize("is_source_frozen", [True, False])
def test_frozen_norms_give_their_statistics_to_trained_ones_and_the_other_way_round(
    recipe, dataset, is_source_frozen, tmp_path
):
    batch = with_model(recipe, fpn={"norm": "none"})
    frozen = replace(batch, bn_size=0, group_size=2)
    ours, theirs = (batch, frozen) if is_source_frozen else (frozen, batch)
    _, source = save_run(tmp_path / "run", replace(theirs, precision="float32"), seed=3)
    state = started(ours, dataset, tmp_path / "run").state_dict()
    assert any(name.endswith("running_var") for name in state)
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            assert tensor == 0
        else:
            assert torch.equal(tensor, source.state_dict()[name].to(tensor.dtype)), name


def test_what_cannot_be_started_from_is_refused(recipe, dataset, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: not a run folder, it has no recipe"):
        started(recipe, dataset, tmp_path / "nowhere")
    RunFolder(tmp_path / "young").create().write_recipe((save_run(tmp_path / "run", recipe)[0].recipe).read_text())
    with pytest.raises(InputError, match="young: the run has no checkpoint yet"):
        started(recipe, dataset, tmp_path / "young")
    wider = with_model(recipe, fpn={"channels": 24})
    with pytest.raises(InputError, match=r"start_from .*run: fpn.* has shape .* another architecture"):
        started(wider, dataset, tmp_path / "run")


def test_what_it_cannot_start_from_is_refused_before_the_data_are_drawn(recipe, tmp_path, monkeypatch):
    drawn = replace(recipe, data=replace(recipe.data, draw_demo="easy", train_annotations=str(tmp_path / "a.json")))
    backbone = replace(recipe.model.backbone, weights=str(tmp_path / "weights.pth"))
    (tmp_path / "run").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text(dump_recipe(recipe))
    monkeypatch.setattr(run_module, "load_datasets", None)
    for changes, message in (
        ({"model": replace(recipe.model, backbone=backbone)}, "model.backbone.weights .*weights.pth"),
        ({"start_from": str(tmp_path / "run")}, "run: not a run folder"),
        ({"start_from": str(tmp_path / "begun")}, "start_from .*begun: the run has no checkpoint yet"),
    ):
        with pytest.raises(InputError, match=message), open_run(replace(drawn, **changes), ALONE):
            pass
    # a run that goes on has all its weights: the file may be gone
    monkeypatch.setattr(run_module, "newest_step", lambda *_: 7)
    gone = replace(drawn, model=replace(recipe.model, backbone=backbone))
    with pytest.raises(TypeError), open_run(gone, ALONE, folder=RunFolder(tmp_path / "on")):
        pass
