from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image

from factories import with_model
from megdet.cli.main import main
from megdet.errors import InputError
from megdet.inference import trained as loading
from megdet.inference.trained import load_detector, load_weights
from megdet.model.choice import make_detector
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import (
    checkpoint_path,
    latest_checkpoint,
    open_checkpoint,
    save_checkpoint,
    update_state,
)
from megdet.run_folder.folder import RunFolder
from run_folders import load_checkpoint
from small_runs import CLASS_NAMES, CPU, save_run, small_recipe


@pytest.mark.parametrize("precision", ["float32", "tf32", "float64", "bfloat16"])
def test_a_run_gives_its_weights_bitwise_and_what_its_labels_mean(precision, tmp_path):
    recipe = small_recipe(tmp_path, precision=precision)
    folder, model = save_run(tmp_path / "run", recipe)
    trained = load_detector(folder, CPU)
    assert trained.recipe == recipe
    assert (trained.class_names, trained.category_ids, trained.step) == (CLASS_NAMES, (10, 20, 30), 7)
    assert not trained.model.training
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
        assert tensor.dtype == model.state_dict()[name].dtype
    assert trained.model.fpn.output[0][0].weight.is_contiguous(memory_format=torch.channels_last)


def test_averaged_weights_are_the_ones_that_detect(tmp_path):
    folder, model = save_run(tmp_path / "run", small_recipe(tmp_path), averages=True)
    trained = load_detector(folder, CPU)
    assert torch.equal(trained.model.rpn.conv.weight, model.rpn.conv.weight + 1)


def test_the_checkpoint_of_a_step_is_loaded_where_one_is_asked_for(tmp_path):
    folder, model = save_run(tmp_path / "run", small_recipe(tmp_path))
    older = {name: tensor - 1 for name, tensor in model.state_dict().items()}
    _, state = load_checkpoint(checkpoint_path(folder, 7))
    save_checkpoint(folder, state, {"model": older}, keep=2)
    save_checkpoint(folder, msgspec.structs.replace(state, step=9), {"model": model.state_dict()}, keep=2)
    trained = load_detector(folder, CPU, step=7)
    assert trained.step == 7
    assert torch.equal(trained.model.rpn.conv.weight, older["rpn.conv.weight"])
    assert load_detector(folder, CPU).step == 9
    with pytest.raises(InputError, match=r"there is no checkpoint .*step_00000008"):
        load_detector(folder, CPU, step=8)


def test_overrides_change_how_it_detects_and_nothing_else(tmp_path):
    folder, _ = save_run(tmp_path / "run", small_recipe(tmp_path))
    trained = load_detector(folder, CPU, {"model.box_head.score_threshold": "0.3"})
    assert trained.model.box_head.recipe.score_threshold == 0.3
    assert load_detector(folder, CPU).model.box_head.recipe.score_threshold == 0.01


def test_the_file_that_the_training_started_from_need_not_exist(tmp_path):
    recipe = small_recipe(tmp_path)
    folder, _ = save_run(tmp_path / "run", recipe)
    gone = with_model(recipe, backbone={"weights": "/no/such/file.pth"})
    folder.write_recipe(dump_recipe(gone))
    assert load_detector(folder, CPU).recipe == gone


def test_no_run_no_checkpoint_and_another_architecture_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: not a run folder, it has no recipe.yaml"):
        load_detector(RunFolder(tmp_path / "nowhere"), CPU)
    recipe = small_recipe(tmp_path)
    folder, _ = save_run(tmp_path / "run", with_model(recipe, fpn={"norm": "none"}))
    with pytest.raises(InputError, match=r"model\.safetensors: fpn.* has shape .* another architecture"):
        load_detector(folder, CPU, {"model.fpn.channels": "24"})
    with pytest.raises(InputError, match=r"model\.safetensors: no tensor .* another architecture"):
        load_detector(folder, CPU, {"model.rpn.norm": "batch"})
    with pytest.raises(InputError, match=r"has no place in what the recipe asks for: .* another architecture"):
        load_detector(folder, CPU, {"model.fpn.norm": "none", "bn_size": "0"})
    young = RunFolder(tmp_path / "young").create()
    young.write_recipe(folder.recipe.read_text())
    with pytest.raises(InputError, match="young: the run has no checkpoint yet"):
        load_detector(young, CPU)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    folder, _ = save_run(tmp_path / "run", small_recipe(tmp_path))
    checkpoint = latest_checkpoint(folder)
    assert isinstance(checkpoint, Path)
    (checkpoint / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"damaged: .*model.safetensors is not what was saved"):
        load_detector(folder, CPU)


def test_nothing_is_built_before_the_weights_fit_what_the_folder_claims(tmp_path, monkeypatch):
    folder, _ = save_run(tmp_path / "run", small_recipe(tmp_path))
    path, devices = latest_checkpoint(folder), []
    claimed = {"class_names": ("a",) * 1000, "category_ids": tuple(range(1000))}
    update_state(path, msgspec.structs.replace(open_checkpoint(path).state, **claimed))

    def make(*arguments):
        model = make_detector(*arguments)
        devices.append(next(model.parameters()).device.type)
        return model

    monkeypatch.setattr(loading, "make_detector", make)
    with pytest.raises(InputError, match="weights of another architecture"):
        load_detector(folder, CPU)
    assert devices == ["meta"]


def test_weights_are_loaded_all_or_not_at_all():
    model = torch.nn.Linear(2, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for weights, message in (
        ({"weight": torch.ones(3, 2)}, "no tensor bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(4)}, r"bias has shape \(4,\), the recipe asks for \(3,\)"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(3), "more": torch.ones(1)}, "tensor more has no place"),
    ):
        with pytest.raises(InputError, match=message):
            load_weights(model, weights, "here")
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_detect_and_evaluate(value, tmp_path, capsys):
    recipe = small_recipe(tmp_path)
    folder, model = save_run(tmp_path / "run", recipe)
    with torch.no_grad():
        model.rpn.conv.bias[0] = value
    _, state = load_checkpoint(checkpoint_path(folder, 7))
    save_checkpoint(folder, state, {"model": model.state_dict()}, keep=1)
    image = tmp_path / "black.png"
    Image.new("RGB", (64, 64)).save(image)
    for words in (["detect", str(folder.path), str(image)], ["evaluate", str(folder.path)]):
        assert main([*words, "--workers", "0"]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert "model.safetensors: rpn.conv.bias has values that are not finite" in line
