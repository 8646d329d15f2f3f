"""RetinaNet keeps what every detector must: shares, padding, images without boxes, any norm, any recompute plan."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from factories import TINY, gradients, make_targets, relative, tiny_batch, with_model
from megdet.architecture import RetinaNet as RetinaNetRecipe
from megdet.architecture_parts import Backbone, DenseHead, OctaveAnchors, StridedFpn
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.model.choice import make_detector
from megdet.model.retinanet import RetinaNet, best_pairs
from megdet.recipe import Recipe
from megdet.structures import Batch, Targets

SMALL = replace(
    TINY,
    model=RetinaNetRecipe(
        backbone=Backbone(name="resnet18"),
        fpn=StridedFpn(channels=16),
        anchors=OctaveAnchors(sizes=(8.0, 16.0, 32.0, 48.0, 64.0)),
        head=DenseHead(convolutions=2, candidates=40, detections=10),
    ),
)
FROZEN = replace(SMALL, bn_size=0, group_size=2)
RECIPES = {
    "frozen": FROZEN,
    "batch": SMALL,
    "all batch": replace(SMALL, model=SMALL.model.with_norms({"fpn": "batch", "head": "batch"})),
    "group, giou": with_model(FROZEN, head={"norm": "group", "box_loss": "giou"}),
    "P6 of P5": with_model(FROZEN, fpn={"p6_from": "p5"}),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def small_detector(recipe: Recipe = SMALL, num_classes: int = 3) -> RetinaNet:
    """Random weights, running statistics that are not trivial, and logits of a size that finds something."""
    torch.manual_seed(0)
    detector = make_detector(recipe, num_classes)
    assert isinstance(detector, RetinaNet)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean") or (name.endswith("bias") and not name.startswith("class_tower.p")):
                tensor.normal_(0, 0.1)
            elif name.endswith("bn2.weight") and name.startswith("backbone"):
                tensor.uniform_(0.2, 0.5)
        for tower in (detector.class_tower, detector.delta_tower):
            for layer in tower.convolutions:
                layer.weight.mul_(10)
            tower.predict.weight.mul_(10)
        detector.class_tower.predict.bias.fill_(-2)
    return detector


def backward(detector: RetinaNet, batch: Batch) -> dict[str, torch.Tensor]:
    losses = detector(batch)
    sum(losses[name].sum() for name in RetinaNet.loss_names).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@every_recipe
def test_every_loss_is_there_for_every_image_and_reaches_every_parameter(recipe):
    detector = small_detector(recipe)
    losses = backward(detector, tiny_batch(2))
    assert tuple(losses) == detector.reported()
    for loss in losses.values():
        assert loss.shape == (2,)
        assert loss.isfinite().all()
        assert (loss > 0).all()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())


def test_two_separate_batches_are_the_parts_of_the_joint_one():
    detector = small_detector(FROZEN).double()
    batch = tiny_batch(4)
    joint, joint_gradients = backward(detector, batch), gradients(detector)
    first = backward(detector, batch[0:1])
    rest = backward(detector, batch[1:4])  # gradients add up
    added = gradients(detector)
    for name in joint:
        assert relative(joint[name], torch.cat([first[name], rest[name]])) < 1e-12, name
    for name, gradient in joint_gradients.items():
        assert relative(gradient, added[name]) < 1e-12, name


@every_recipe
def test_more_rows_of_padding_change_no_bit(recipe):
    batch = tiny_batch(3)
    targets = batch.targets
    wider = Targets(
        torch.cat([targets.boxes, torch.zeros(3, 5, 4)], 1),
        torch.cat([targets.labels, torch.full((3, 5), -1)], 1),
        targets.image_seeds,
    )
    found = []
    for own in (targets, wider):
        detector = small_detector(recipe)
        found.append(backward(detector, replace(batch, targets=own)) | gradients(detector))
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


@every_recipe
@pytest.mark.parametrize("width", [0, 2])
def test_images_without_boxes_learn_that_nothing_is_there(recipe, width):
    detector = small_detector(recipe)
    losses = backward(detector, replace(tiny_batch(2), targets=make_targets([], [], width=width)))
    assert losses["anchor_box"].eq(0).all()
    assert losses["anchor_positive"].eq(0).all()
    assert (losses["class_focal"] > 0).all()
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert found["delta_tower.predict.weight"].eq(0).all()


@every_recipe
def test_boxes_without_area_give_finite_losses_and_gradients(recipe):
    flat = make_targets([([5.0, 5.0, 30.0, 5.0], 0), ([7.0, 7.0, 7.0, 7.0], 1)], [([5.0, 5.0, 30.0, 5.0], 0)])
    detector = small_detector(recipe)
    losses = backward(detector, replace(tiny_batch(2), targets=flat))
    assert all(loss.isfinite().all() for loss in losses.values())
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())


@every_recipe
def test_no_images_give_empty_losses_and_gradients_of_zero_for_every_parameter(recipe):
    detector = small_detector(recipe)
    losses = backward(detector, tiny_batch(2)[0:0])
    assert all(loss.shape == (0,) for loss in losses.values())
    found = gradients(detector)
    assert found.keys() == dict(detector.named_parameters()).keys()
    assert all(gradient.eq(0).all() for gradient in found.values())


@pytest.mark.parametrize("plan", ["block", "stage", "sqrt"])
@pytest.mark.parametrize("name", ["all batch", "group, giou"])
def test_what_is_computed_again_is_the_same_to_the_bit_and_counts_once(name, plan):
    found = []
    for recompute in ("none", plan):
        detector = small_detector(replace(RECIPES[name], recompute=recompute))
        found.append(backward(detector, tiny_batch(2)) | gradients(detector))
        norms = [module for module in detector.modules() if isinstance(module, CrossDeviceBatchNorm)]
        found[-1] |= {f"statistics {i}": norm.step_mean for i, norm in enumerate(norms)}
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_batch_statistics_of_the_head_are_those_of_all_levels_together():
    detector = small_detector(RECIPES["all batch"]).double().train()
    tower = detector.class_tower
    levels = [torch.randn(2, 16, size, size + 1, dtype=torch.float64) for size in (6, 3, 1)]
    seen = torch.cat([tower.convolutions[0](level).flatten(2) for level in levels], 2)
    norm = tower.norms[0]
    reference = nn.BatchNorm1d(16).double()
    reference.load_state_dict({name: norm.state_dict()[name] for name in reference.state_dict()})
    expected = reference(seen).relu()
    inputs: list[torch.Tensor] = []
    tower.convolutions[1].register_forward_pre_hook(lambda _layer, given: inputs.append(given[0]))
    tower(levels)
    found = torch.cat([level.flatten(2) for level in inputs], 2)
    assert relative(expected, found) < 1e-12
    assert relative(seen.mean((0, 2)), norm.step_mean) < 1e-12


def test_each_anchor_has_the_output_of_its_own_cell_and_place():
    detector = small_detector(FROZEN)
    levels = [torch.randn(1, 16, 4, 5), torch.randn(1, 16, 2, 3)]
    for tower, number in ((detector.class_tower, 3), (detector.delta_tower, 4)):
        maps: list[torch.Tensor] = []
        hook = tower.predict.register_forward_hook(lambda _layer, _given, output, maps=maps: maps.append(output))
        outputs = tower(levels)
        hook.remove()
        row, column, place = 1, 2, 7
        for own, level in zip(outputs, maps, strict=True):
            cell = level[0, :, row, column]
            anchor = (row * level.shape[3] + column) * 9 + place
            assert torch.equal(own[0, anchor], cell[place * number : (place + 1) * number])


def test_a_new_detector_scores_every_class_at_every_anchor_with_the_prior():
    detector = make_detector(with_model(FROZEN, head={"prior": 0.03}), 3)
    with torch.no_grad():
        detector.class_tower.predict.weight.zero_()
        batch = tiny_batch(1)
        found = detector.predict(detector.normalized(batch.pixels, batch.sizes))
    assert all((logits.sigmoid() - 0.03).abs().max() < 1e-6 for logits in found.logits)


def test_the_best_pairs_are_those_of_a_sort_of_all_pairs_and_ties_go_to_the_first():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, (3, 40, 5), generator=generator).float()  # many are equal
    for count in (1, 7, 39, 60, 500):
        values, anchors, classes = best_pairs(logits, count)
        flat = logits.flatten(1)
        order = flat.sort(dim=1, descending=True, stable=True).indices[:, :count]
        assert torch.equal(anchors * 5 + classes, order), count
        assert torch.equal(values, flat.gather(1, order))


def test_detections_are_padded_and_lie_in_their_image():
    detector = small_detector(FROZEN).eval()
    batch = tiny_batch(3)
    found = detector.detect(detector.normalized(batch.pixels, batch.sizes), batch.sizes)
    assert found.boxes.shape == (3, 10, 4)
    assert (found.labels >= 0).any(dim=1).all()
    assert found.labels.max() < 3
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        assert found.boxes[i, :, 2].max() <= width
        assert found.boxes[i, :, 3].max() <= height
        alone = batch[i : i + 1]
        own = detector.detect(detector.normalized(alone.pixels, alone.sizes), alone.sizes)
        torch.testing.assert_close(own.boxes[0], found.boxes[i], rtol=1e-4, atol=1e-4)


def test_weights_of_nan_give_losses_of_nan_and_find_nothing():
    detector = small_detector(FROZEN)
    with torch.no_grad():
        detector.class_tower.predict.weight.fill_(float("nan"))
    batch = tiny_batch(2)
    assert detector(batch)["class_focal"].isnan().all()
    found = detector.eval().detect(detector.normalized(batch.pixels, batch.sizes), batch.sizes)
    assert found.labels.eq(-1).all()


def test_no_images_have_no_detections():
    detector = small_detector(FROZEN).eval()
    assert detector.detect(torch.zeros(0, 3, 64, 64), torch.zeros(0, 2, dtype=torch.int64)).labels.shape == (0, 10)


def test_the_samples_are_the_positive_anchors_and_the_negative_ones_that_score_highest():
    detector = small_detector(FROZEN)
    batch = tiny_batch(2)
    images = detector.normalized(batch.pixels, batch.sizes)
    sampled = detector.samples(images, batch.sizes, batch.targets)
    anchors = torch.cat(detector.predict(images).anchors)
    matches = detector.match(anchors, batch.targets)
    assert torch.equal(sampled.is_positive.sum(1), matches.is_positive.sum(1))
    assert sampled.is_valid.all()
    scores = torch.cat(detector.predict(images).logits, 1).amax(2).sigmoid()
    best = scores[0][matches.is_negative[0]].max()
    first = int(sampled.is_positive[0].sum())
    place = (anchors == sampled.boxes[0, first]).all(1).nonzero()[0, 0]
    assert scores[0, place] == best


def test_bfloat16_losses_are_those_of_float32_within_its_precision():
    detector = small_detector(FROZEN)
    batch = tiny_batch(2)
    exact = detector(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = detector(batch)
    for name in RetinaNet.loss_names:
        assert rough[name].dtype == torch.float32
        assert relative(exact[name], rough[name]) < 0.2, name
    sum(rough[name].sum() for name in RetinaNet.loss_names).backward()
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())
