from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from factories import TINY, relative, tiny_detector, with_model
from megdet.architecture import FasterRcnn, Model, RetinaNet
from megdet.architecture_parts import Backbone as BackboneRecipe
from megdet.architecture_parts import StridedFpn
from megdet.bounds import faults_of
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.deformable import DeformableConv2d
from megdet.model.backbone import Backbone, load_pretrained
from megdet.model.choice import make_detector
from megdet.ops.roi_align import feature_table, roi_levels
from megdet.recipe import RecomputePlan


def make(lane: Lane | None = None, recompute: RecomputePlan = "none", **options: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneRecipe(**{"name": "test_resnet"} | options), lane, recompute)


def deformable(backbone: Backbone) -> dict[str, DeformableConv2d]:
    return {name: m for name, m in backbone.body.named_modules() if isinstance(m, DeformableConv2d)}


def moved(backbone: Backbone) -> Backbone:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if not parameter.any():  # the last norm of a block, which silences it
                parameter.fill_(0.5)
    for layer in deformable(backbone).values():
        nn.init.normal_(layer.offsets.weight, std=0.05)
        nn.init.normal_(layer.offsets.bias, std=0.5)
    return backbone


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "test_resnet", "regnetx_002"])
@pytest.mark.parametrize("output_stride", [32, 16])
def test_a_backbone_with_deformable_stages_starts_as_the_plain_one(name, output_stride):
    plain = make(name=name, output_stride=output_stride).eval()
    ours = make(name=name, output_stride=output_stride, deformable_stages=(4, 5)).eval()
    found = deformable(ours)
    assert found
    assert ours.state_dict().keys() > plain.state_dict().keys()
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(plain(x), ours(x), strict=True):
        assert relative(a, b) < 1e-5


def test_the_convolutions_of_the_stages_asked_for_are_deformable_and_no_others():
    shapes = {
        "resnet18": {f"layer{s}.{block}.conv{c}" for s in (2, 4) for block in (0, 1) for c in (1, 2)},
        "resnext50_32x4d": {f"layer2.{block}.conv2" for block in range(4)} | {f"layer4.{b}.conv2" for b in range(3)},
    }
    for name, expected in shapes.items():
        found = deformable(make(name=name, deformable_stages=(3, 5)))
        assert found.keys() == expected
        plain = dict(make(name=name).body.named_modules())
        for path, layer in found.items():
            theirs = plain[path]
            assert (layer.stride, layer.padding, layer.dilation, layer.groups) == (
                *(theirs.stride, theirs.padding, theirs.dilation, theirs.groups),
            )
            assert layer.offsets.groups == 1
            assert layer.offsets.out_channels == 18


def test_trained_weights_of_plain_convolutions_land_in_the_deformable_ones(tmp_path):
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = make(deformable_stages=(5,), deformable_modulated=True)
    load_pretrained(backbone, tmp_path / "weights.pth")
    (path, layer), *_ = deformable(backbone).items()
    assert torch.equal(layer.weight, source.get_submodule(path).weight)
    assert layer.offsets.weight.eq(0).all()
    assert layer.offsets.out_channels == 27


@pytest.mark.parametrize("plan", ["block", "stage", "sqrt"])
def test_recomputed_deformable_stages_give_the_same_bits(plan):
    found = []
    for recompute in ("none", plan):
        backbone = moved(make(SINGLE_LANE, recompute, deformable_stages=(4, 5), deformable_modulated=True)).train()
        torch.manual_seed(2)
        features = backbone(torch.randn(2, 3, 64, 64))
        sum(feature.square().sum() for feature in features).backward()
        found.append({name: p.grad for name, p in backbone.named_parameters()} | dict(backbone.named_buffers()))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert all(found[0][name].abs().max() > 0 for name in found[0] if "offsets" in name)


def test_frozen_stages_do_not_reach_the_deformable_ones():
    backbone = make(SINGLE_LANE, deformable_stages=(4,), frozen_stages=3)
    for name, parameter in backbone.body.named_parameters():
        assert parameter.requires_grad is name.startswith(("layer3", "layer4")), name
    assert any(isinstance(m, CrossDeviceBatchNorm) for m in backbone.body.layer3.modules())


def refusal(**options: object) -> str:
    with pytest.raises(InputError) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_backbone_whose_stages_cannot_be_deformed_is_refused_in_one_line():
    key = "model.backbone.deformable_stages [5]"
    assert refusal(name="convnext_atto", deformable_stages=(5,)) == (
        f"{key}: stage 5 of convnext_atto has no 3 x 3 convolution"
    )
    assert f"{key}: the stages of this backbone are not known; set it to []" in refusal(
        name="hrnet_w18_small", deformable_stages=(5,)
    )
    assert refusal(name="tf_efficientnet_lite0", deformable_stages=(4,)) == (
        "model.backbone.deformable_stages [4]: blocks.3.0.conv_dw of tf_efficientnet_lite0 is not a plain convolution "
        "with zero padding (Conv2dSame): choose another backbone"
    )


def faults(**options: object) -> list[tuple[str, str]]:
    model: Model = FasterRcnn(backbone=BackboneRecipe(**options))
    return list(faults_of(model, "model."))


@pytest.mark.parametrize("stages", [(2,), (6,), (4, 4)])
def test_stages_that_cannot_be_are_refused(stages):
    assert faults(deformable_stages=stages) == [
        ("model.backbone.deformable_stages", "it must be some of the stages 3, 4 and 5, each once")
    ]


def test_knobs_that_would_do_nothing_are_refused():
    ((key, why),) = faults(deformable_stages=(3, 4), frozen_stages=3)
    assert key == "model.backbone.deformable_stages"
    assert why.startswith("frozen_stages is 3, and the offsets of a frozen stage would stay 0")
    assert [key for key, _ in faults(deformable_modulated=True)] == ["model.backbone.deformable_modulated"]
    assert [key for key, _ in faults(output_stride=4)] == ["model.backbone.output_stride"]
    assert faults(deformable_stages=(4, 5), frozen_stages=3, deformable_modulated=True, output_stride=8) == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenetv2_100", "convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("output_stride", [16, 8])
def test_an_atrous_backbone_keeps_its_stride_and_its_weights(name, output_stride):
    plain, atrous = make(name=name).eval(), make(name=name, output_stride=output_stride).eval()
    strides = tuple(min(stride, output_stride) for stride in (4, 8, 16, 32))
    assert atrous.strides == strides
    assert atrous.channels == plain.channels
    features = atrous(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape) for f in features] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(plain.channels, strides, strict=True)
    ]
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, atrous.state_dict()[name])


def test_every_second_pixel_of_an_atrous_stage_is_that_of_the_strided_one():
    """What dilation is for: the same weights see the same places, between which there are others now."""
    plain = make(name="resnet18").eval()
    atrous = make(name="resnet18", output_stride=16).eval()
    x = torch.randn(1, 3, 128, 128)
    assert relative(plain(x)[3], atrous(x)[3][:, :, ::2, ::2]) < 1e-5
    assert relative(plain(x)[2], atrous(x)[2]) == 0


@pytest.mark.parametrize(
    ("output_stride", "strides"),
    [(32, (4, 8, 16, 32, 64)), (16, (4, 8, 16, 16, 32)), (8, (4, 8, 8, 8, 16))],
)
def test_anchors_and_pooling_of_a_pyramid_follow_the_strides_of_its_backbone(output_stride, strides):
    detector = tiny_detector(with_model(TINY, backbone={"name": "test_resnet", "output_stride": output_stride})).eval()
    pyramid = detector.features(torch.zeros(1, 3, 128, 128))
    assert [level.shape[2] for level in pyramid] == [128 // stride for stride in strides]
    for level, anchors in enumerate(detector.anchors_of(pyramid, (128, 128))):
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        assert centres.max() == 128 - strides[level]
    # each pixel holds where its centre is in the image: a bin must read its own middle
    maps = [((torch.arange(128 // s) + 0.5) * s).expand(1, 1, 128 // s, -1) for s in strides]
    for edge in (20.0, 45.0, 60.0, 100.0):
        bins = detector.pooling(feature_table(maps), torch.tensor([[[14.0, 14.0, 14.0 + edge, 14.0 + edge]]]))
        middles = 14 + (torch.arange(7) + 0.5) * edge / 7
        level = int(roi_levels(torch.tensor([[0.0, 0.0, edge, edge]]), 4, detector.pooling.canonical_size))
        inside = middles < 128 - strides[level]
        torch.testing.assert_close(bins.reshape(7, 7)[:, inside], middles[inside].expand(7, -1))


@pytest.mark.parametrize(("output_stride", "strides"), [(16, (8, 16, 16, 32, 64)), (8, (8, 8, 8, 16, 32))])
def test_the_levels_of_an_atrous_retinanet_have_the_strides_of_its_anchors(output_stride, strides):
    backbone = BackboneRecipe(name="test_resnet", output_stride=output_stride)
    recipe = replace(TINY, model=RetinaNet(backbone=backbone, fpn=StridedFpn(channels=8)))
    detector = make_detector(recipe, 2).eval()
    assert detector.anchors.strides == strides
    assert [level.shape[2] for level in detector.features(torch.zeros(1, 3, 128, 128))] == [128 // s for s in strides]


@pytest.mark.parametrize("output_stride", [16, 8])
def test_the_merged_levels_of_an_atrous_pyramid_are_sums_pixel_by_pixel(output_stride):
    """Between levels of one stride nothing is enlarged: P4 is the 3 x 3 convolution of C4's and C5's laterals."""
    detector = tiny_detector(with_model(TINY, backbone={"name": "test_resnet", "output_stride": output_stride})).eval()
    x, fpn = torch.randn(1, 3, 64, 96), detector.fpn
    _, _, c4, c5 = detector.backbone(x)
    expected = fpn.output[2](fpn.lateral[2](c4) + fpn.lateral[3](c5))
    assert relative(expected, detector.features(x)[2]) < 1e-5


@pytest.mark.parametrize("name", ["densenet121", "dla34", "botnet26t_256"])
def test_a_backbone_that_timm_does_not_build_atrous_is_refused(name):
    """The first takes no stride, the second asserts that it is 32, the third has a weight for each place of the map."""
    assert refusal(name=name, output_stride=16) == (
        f"model.backbone.output_stride 16: timm does not build {name} with it: set it to 32 or choose another backbone"
    )


def test_weights_of_a_file_are_those_of_the_atrous_backbone(tmp_path: Path):
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone = make(output_stride=16)
    load_pretrained(backbone, tmp_path / "weights.pth")
    own = backbone.body.state_dict()
    wanted = {name for name in own if not name.endswith("num_batches_tracked")}
    assert wanted < source.state_dict().keys()
    assert all(torch.equal(own[name], t) for name, t in source.state_dict().items() if name in wanted)
