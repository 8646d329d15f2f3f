"""A detector in a loop for torchvision's detectors."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import megdet
from factories import SMALL_MASKS, of_kind
from megdet.architecture import MaskRcnn
from megdet.data.planned import PlannedImage
from megdet.data.transforms import load_batch
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from small_runs import save_run, small_recipe, train_set, write_small_set


@pytest.fixture
def recipe(tmp_path):
    write_small_set(tmp_path, "train", 6, same_size=True)
    recipe = small_recipe(tmp_path)
    data = replace(recipe.data, short_edges=(64,), max_long_edge=96)
    return of_kind(replace(recipe, data=data), MaskRcnn, mask_head=SMALL_MASKS)


@pytest.fixture
def dataset(recipe):
    return train_set(recipe)


@pytest.fixture
def model(recipe, tmp_path) -> megdet.TorchvisionLoop:
    return megdet.load(save_run(tmp_path / "run", recipe)[0].path, device="cpu").model.train()


def batch_of(dataset, indices):
    planned = [PlannedImage(index, 0, 0, (64, 64)) for index in indices]
    return load_batch(dataset, planned, (64, 64))


def as_torchvision(dataset, indices):
    """The images and targets as a data set for torchvision's detectors has them."""
    batch = batch_of(dataset, indices)
    images, targets = [], []
    for row in range(len(indices)):
        count = int((batch.targets.labels[row] >= 0).sum())
        boxes, labels = batch.targets.boxes[row, :count], batch.targets.labels[row, :count] + 1
        masks = torch.zeros(count, 64, 64, dtype=torch.uint8)
        bits = torch.from_numpy(np.unpackbits(batch.targets.masks.bits[row].numpy()))
        for mask, (first, x, y, width, height) in zip(masks, batch.targets.masks.frames[row].tolist(), strict=False):
            mask[y : y + height, x : x + width] = bits[first : first + width * height].reshape(height, width)
        images.append(batch.pixels[row] / 255.0)
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets


def test_its_losses_are_those_of_the_detector_on_the_same_images(model, dataset):
    images, targets = as_torchvision(dataset, range(4))
    ours, theirs = model._batch(images, targets), batch_of(dataset, range(4))
    assert torch.allclose(ours.pixels, theirs.pixels.float(), atol=1e-4)
    count = ours.targets.labels.shape[1]
    assert torch.equal(ours.targets.boxes, theirs.targets.boxes[:, :count])
    assert torch.equal(ours.targets.labels, theirs.targets.labels[:, :count])
    assert torch.equal(ours.targets.masks.frames[..., 3:], theirs.targets.masks.frames[:, :count, 3:])
    losses = model(images, targets)
    assert tuple(losses) == model.detector.loss_names
    assert all(loss.dim() == 0 and torch.isfinite(loss) for loss in losses.values())


def test_boxes_are_resized_with_their_image_by_hand(model):
    image = torch.rand(3, 32, 40)
    target = {"boxes": torch.tensor([[4.0, 8.0, 20.0, 16.0]]), "labels": torch.tensor([2])}
    batch = model._batch([image], [target | {"masks": torch.ones(1, 32, 40)}])
    assert batch.sizes.tolist() == [[64, 80]]
    assert batch.targets.boxes[0, 0].tolist() == [8.0, 16.0, 40.0, 32.0]
    assert batch.targets.labels[0].tolist() == [1]
    assert batch.targets.masks.frames[0, 0].tolist() == [0, 0, 0, 80, 64]


def test_a_plain_loop_lowers_its_loss_and_moves_its_statistics(model, dataset):
    images, targets = as_torchvision(dataset, range(6))
    norms = [module for module in model.modules() if isinstance(module, CrossDeviceBatchNorm)]
    before = norms[0].running_mean.clone()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.002, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(norms[0].running_mean, before)
    assert norms[0].num_batches_tracked == 8


def test_a_loop_goes_on_from_its_state_with_the_draws_it_would_have_made(recipe, dataset, tmp_path):
    folder = save_run(tmp_path / "again", recipe)[0].path
    images, targets = as_torchvision(dataset, range(2))
    targets = [{**target, "image_id": torch.tensor(7 + row)} for row, target in enumerate(targets)]
    whole, resumed = (megdet.load(folder, device="cpu").model.train() for _ in range(2))
    drawn = [whole._batch(images, targets).targets.image_seeds.tolist() for _ in range(4)]
    assert len({tuple(own) for own in drawn}) == 4
    state = {name: own.clone() for name, own in whole.state_dict().items()}
    resumed.load_state_dict(state)
    named = [{**target, "image_id": "a name"} for target in targets]
    assert len({*resumed._batch(images, named).targets.image_seeds.tolist()}) == 2, "what is no number is not drawn by"
    resumed.load_state_dict(state)
    after = whole._batch(images, targets).targets.image_seeds.tolist()
    assert resumed._batch(images[::-1], targets[::-1]).targets.image_seeds.tolist() == after[::-1], (
        "of the image, not its row"
    )


def test_in_evaluation_it_finds_what_the_loaded_detector_finds(recipe, model, dataset, tmp_path):
    detector = megdet.load(tmp_path / "run", device="cpu")
    images, _ = as_torchvision(dataset, [0, 1])
    found = detector.model.eval()(images)
    for ours, theirs in zip(found, detector(images), strict=True):
        expected = theirs.to_torchvision()
        assert len(ours["labels"]) > 0
        assert all(torch.equal(ours[name], expected[name]) for name in ("boxes", "labels", "scores", "masks"))


def test_a_loaded_detector_detects_as_in_evaluation_while_its_model_is_trained(recipe, model, dataset, tmp_path):
    detector = megdet.load(tmp_path / "run", device="cpu")
    images, targets = as_torchvision(dataset, [0, 1])
    before = detector(images)
    training = detector.model.train()
    frozen = next(module for module in training.modules() if isinstance(module, CrossDeviceBatchNorm))
    frozen.eval()
    for ours, theirs in zip(detector(images), before, strict=True):
        assert np.array_equal(ours.boxes, theirs.boxes)
        assert np.array_equal(ours.scores, theirs.scores)
    assert {module for module in training.modules() if not module.training} == set(frozen.modules())
    assert set(training(images, targets)) == set(detector.trained.model.loss_names)


def test_detection_follows_a_model_that_was_moved(recipe, model, tmp_path):
    detector = megdet.load(tmp_path / "run", device="cpu")
    image = torch.rand(3, 64, 64)
    (wanted,) = detector.model.eval()([image])
    detector.trained = replace(detector.trained, device=torch.device("meta"))  # the model itself is on the CPU
    moved = megdet.TorchvisionLoop(detector.trained).eval()
    assert torch.equal(moved([image])[0]["boxes"], wanted["boxes"])


def test_a_folded_detector_has_no_model_to_train(model, tmp_path):
    with pytest.raises(InputError, match="folded batch norms cannot be trained: load it without fold"):
        _ = megdet.load(tmp_path / "run", device="cpu", fold=True).model


def spoiled(target, **changes):
    return {name: value for name, value in {**target, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "image 1 of the batch: its target has no 'labels'"),
        ({"labels": torch.tensor([0])}, "labels begin at 1, 0 is the background"),
        ({"labels": torch.tensor([4])}, "label 4 is more than the 3 classes"),
        ({"boxes": torch.tensor([[5.0, 5, 5, 9]])}, "boxes are x1, y1, x2, y2 with x1 < x2"),
        ({"boxes": torch.tensor([[5.0, 5, float("nan"), 9]])}, "boxes are x1, y1, x2, y2"),
        ({"boxes": torch.zeros(4)}, r"boxes are \(n, 4\) and labels \(n,\), not \(4,\) and \(1,\)"),
        ({"boxes": torch.tensor([[64.0, 5, 70, 9]])}, "a box has no part in the image of 64 x 64"),
        ({"labels": torch.tensor([1.7])}, "labels are whole numbers, such as torch.int64, not torch.float32"),
        ({"masks": None}, "image 1 of the batch: its target needs 'masks'"),
        ({"masks": torch.ones(1, 7, 7)}, r"needs 'masks' \(1, 64, 64\), an object each"),
    ],
)
def test_a_target_that_cannot_be_meant_is_refused(model, changes, message):
    image = torch.rand(3, 64, 64)
    target = {
        "boxes": torch.tensor([[5.0, 5, 20, 20]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64),
    }
    with pytest.raises(InputError, match=message):
        model([image, image], [target, spoiled(target, **changes)])
    for images, targets in (([image, image], [target]), ([], []), ([image], None)):
        with pytest.raises(InputError, match="training needs images, and one target each"):
            model(images, targets)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 64, 64), 200.0), "image 0 of the batch: floats from 0 to 1 are needed, found 200 to 200"),
        (torch.zeros(3, 64, 64) - 1, "found -1 to -1"),
        (torch.full((3, 64, 64), torch.nan), "found nan to nan"),
        (torch.zeros(3, 0, 64), r"a tensor \(3, height, width\) is needed, not \(3, 0, 64\)"),
        (torch.zeros(3, 64, 64, dtype=torch.int64), "not torch.int64"),
    ],
)
def test_pixels_that_cannot_be_meant_are_refused(model, image, message):
    target = {"boxes": torch.tensor([[5.0, 5, 20, 20]]), "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64)}
    with pytest.raises(InputError, match=message):
        model([image], [target])


def test_a_photo_that_resizing_left_a_little_out_of_range_is_learned_from(model, dataset):
    images, targets = as_torchvision(dataset, range(2))
    images = [torch.where(image > 0.9, 1.0000001, image) for image in images]
    assert all(torch.isfinite(loss) for loss in model(images, targets).values())


def test_it_begins_in_evaluation_as_a_whole(recipe, tmp_path):
    model = megdet.load(save_run(tmp_path / "run", recipe)[0].path, device="cpu").model
    assert not any(module.training for module in model.modules())
    assert len(model([torch.rand(3, 64, 64)])) == 1


def test_an_image_without_an_object_has_losses_too(model):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": torch.zeros(0, 64, 64)}
    losses = model([torch.rand(3, 64, 64)] * 2, [empty, empty])
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["box_head_box"] == 0
