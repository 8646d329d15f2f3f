"""Global convolutions and boundary refinement, and pyramids whose lateral connections are made of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from factories import TINY, TINY_FROZEN, gradients, relative, tiny_batch, tiny_detector, with_model
from megdet.architecture import RetinaNet
from megdet.architecture_parts import Backbone, StridedFpn
from megdet.bounds import faults_of
from megdet.inference.fold import fold_batch_norms
from megdet.layers.convert import norm_factory
from megdet.model.choice import make_detector
from megdet.model.large_kernel import BoundaryRefinement, GlobalConvolution


@pytest.mark.parametrize(("size", "hidden", "map_size"), [(3, 4, (5, 7)), (7, 2, (4, 9)), (15, 3, (1, 6))])
def test_a_global_convolution_is_the_plain_one_whose_weights_are_the_sum_of_two_products(size, hidden, map_size):
    """Also where the kernel is larger than the map."""
    torch.manual_seed(0)
    layer = GlobalConvolution(3, hidden, 5, size, bias=False).double()
    (tall, then_wide), (wide, then_tall) = layer.tall_first, layer.wide_first
    dense = torch.einsum("omx,miy->oiyx", then_wide.weight[:, :, 0], tall.weight[..., 0])
    dense = dense + torch.einsum("omy,mix->oiyx", then_tall.weight[..., 0], wide.weight[:, :, 0])
    x = torch.randn(2, 3, *map_size, dtype=torch.float64)
    assert relative(F.conv2d(x, dense, padding=size // 2), layer(x)) < 1e-12


def test_a_boundary_refinement_adds_to_the_map_what_two_convolutions_make_of_it_by_hand():
    layer = BoundaryRefinement(1, norm_factory("none"), bias=True)
    with torch.no_grad():
        for step in (layer.first, layer.second):
            step[0].weight.zero_()
            step[0].weight[0, 0, 1, 2] = 1.0  # the pixel to the right
            step[0].bias.fill_(0.5)
    row = torch.tensor([1.0, -2.0, 3.0, 0.0])
    # first: -1.5, 3.5, 0.5, 0.5, cut to 0, 3.5, 0.5, 0.5; second: 4, 1, 1, 0.5
    assert layer(row.reshape(1, 1, 1, 4)).flatten().tolist() == [5.0, -1.0, 4.0, 0.5]


LARGE = with_model(TINY, fpn={"large_kernel": 5})
RECIPES = {
    "frozen": with_model(TINY_FROZEN, fpn={"large_kernel": 5}),
    "batch": with_model(LARGE, fpn={"norm": "batch"}),
    "group": with_model(LARGE, fpn={"norm": "group"}),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_pyramid_with_large_kernels_trains_every_weight_and_is_recomputed_to_the_bit(recipe):
    found = []
    for own in (recipe, replace(recipe, recompute="stage")):
        detector = tiny_detector(own)
        losses = detector(tiny_batch(2))
        sum(losses[name].sum() for name in detector.loss_names).backward()
        found.append(gradients(detector) | {name: loss.detach() for name, loss in losses.items()})
    plain, again = found
    assert plain.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    own = {name: value for name, value in plain.items() if name.startswith("fpn.lateral")}
    assert own.keys() == {name for name, _ in detector.named_parameters() if name.startswith("fpn.lateral")}
    assert all(value.any() and value.isfinite().all() for value in own.values())


def test_retinanet_has_them_too_and_a_lateral_connection_is_what_its_parts_are():
    model = RetinaNet(backbone=Backbone(name="test_resnet"), fpn=StridedFpn(channels=8, large_kernel=3))
    detector = make_detector(replace(TINY, model=model), 2).eval()
    convolution, norm, refinement = detector.fpn.lateral[0]
    x = torch.randn(1, detector.backbone.channels[1], 6, 5)
    expected = convolution.tall_first(x) + convolution.wide_first(x)
    expected = expected + refinement.second(F.relu(refinement.first(expected)))
    assert isinstance(norm, nn.Identity)
    assert relative(expected, detector.fpn.lateral[0](x)) < 1e-6


def test_with_its_norms_folded_the_pyramid_is_the_same_and_the_norms_behind_sums_stay():
    detector = tiny_detector(RECIPES["batch"]).double().eval()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    before = detector.features(x)
    fold_batch_norms(detector)
    assert all(relative(a, b) < 1e-10 for a, b in zip(before, detector.features(x), strict=True))
    stay = [name for name, module in detector.fpn.named_modules() if "Norm" in type(module).__name__]
    assert stay == [f"lateral.{level}.1" for level in range(4)]


@pytest.mark.parametrize("map_size", [(1, 1), (2, 1), (1, 5)])
def test_bfloat16_gradients_on_maps_smaller_than_the_kernel_are_those_of_float32(map_size):
    torch.manual_seed(0)
    layer = GlobalConvolution(8, 8, 8, 7, bias=True)
    x = torch.randn(2, 8, *map_size).to(memory_format=torch.channels_last)
    layer(x).square().sum().backward()
    expected = gradients(layer)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().square().sum().backward()
    assert all(relative(expected[name], value) < 0.05 for name, value in gradients(layer).items())


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_kernel_without_a_middle_is_refused(size):
    assert list(faults_of(with_model(TINY, fpn={"large_kernel": size}).model, "model.")) == [
        ("model.fpn.large_kernel", "it must be an odd number from 3 on, or 0")
    ]
