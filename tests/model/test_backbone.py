import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import BatchNormAct2d, DropBlock2d, DropPath
from timm.models import build_model_with_cfg
from torch import nn

from factories import SHARED_DATA, relative
from megdet.architecture_parts import Backbone as BackboneRecipe
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.errors import InputError
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.frozen_norm import FrozenBatchNorm
from megdet.model.backbone import Backbone, load_pretrained

MOBILENET = SHARED_DATA / "weights_mobilenet_v2" / "mobilenet_v2-b0353104.pth"


def make(lane: Lane | None = None, weights: Path | None = None, **options: object) -> Backbone:
    torch.manual_seed(0)
    backbone = Backbone(BackboneRecipe(**{"name": "resnet18"} | options), lane)
    if weights is not None:
        load_pretrained(backbone, weights)
    return backbone


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", [64, 128, 256, 512]), ("mobilenetv2_100", [24, 32, 96, 320]), ("convnext_atto", [40, 80, 160, 320])],
)
def test_features_have_strides_4_to_32_and_the_channels_promised(name, channels):
    backbone = make(name=name).eval()
    features = backbone(torch.randn(1, 3, 64, 96))
    assert backbone.channels == channels
    assert [tuple(f.shape) for f in features] == [
        (1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]


def test_features_equal_those_of_torchvisions_network():
    theirs = torchvision.models.resnet18(weights=None).eval()
    ours = make().eval()
    ours.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 64, 64)
    c2 = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
    c3 = theirs.layer2(c2)
    c4 = theirs.layer3(c3)
    for a, b in zip([c2, c3, c4, theirs.layer4(c4)], ours(x), strict=True):
        assert relative(a, b) < 1e-5


def test_strides_can_stand_in_the_1x1_convolutions_of_bottlenecks():
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = make(name="resnet50", stride_in_1x1=True).eval()
    ours.body.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    for stage in (theirs.layer2, theirs.layer3, theirs.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    x = torch.randn(1, 3, 64, 64)
    expected = theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x)))))
    found = ours(x)
    for stage, own in zip((theirs.layer2, theirs.layer3, theirs.layer4), found[1:], strict=True):
        expected = stage(expected)
        assert relative(expected, own) < 1e-4
    assert relative(found[2], make(name="resnet50").eval()(x)[2]) > 0.1


def test_a_backbone_without_bottlenecks_has_no_strides_to_move():
    with pytest.raises(InputError, match="stride_in_1x1: resnet18 has no bottleneck"):
        make(stride_in_1x1=True)


@pytest.mark.parametrize(
    ("name", "stages", "is_frozen"),
    [
        ("resnet18", 0, ()),
        ("resnet18", 1, ("conv1", "bn1")),
        ("resnet18", 2, ("conv1", "bn1", "layer1")),
        ("resnet18", 4, ("conv1", "bn1", "layer1", "layer2", "layer3")),
        ("resnet18", 5, ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("mobilenetv2_100", 1, ("conv_stem", "bn1", "blocks.0")),
        ("mobilenetv2_100", 2, ("conv_stem", "bn1", "blocks.0", "blocks.1")),
        ("mobilenetv2_100", 4, ("conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4")),
    ],
)
def test_frozen_stages_are_the_first_and_freeze_weights_and_statistics(name, stages, is_frozen):
    body = make(SINGLE_LANE, name=name, frozen_stages=stages).body

    def should_freeze(key: str) -> bool:
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in is_frozen)

    for key, parameter in body.named_parameters():
        assert parameter.requires_grad is not should_freeze(key), key
    norms = [(key, m) for key, m in body.named_modules() if isinstance(m, CrossDeviceBatchNorm | FrozenBatchNorm)]
    assert len(norms) > 15
    for key, norm in norms:
        assert isinstance(norm, FrozenBatchNorm) is should_freeze(key), key


def test_the_eps_of_the_recipe_reaches_every_norm():
    for lane in (SINGLE_LANE, None):
        backbone = make(lane, norm_eps=0.25, frozen_stages=2)
        norms = [m for m in backbone.modules() if isinstance(m, CrossDeviceBatchNorm | FrozenBatchNorm)]
        assert {norm.eps for norm in norms} == {0.25}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("with_classifier", [False, True])
def test_weights_are_matched_by_name(suffix, with_classifier, tmp_path):
    source = torchvision.models.resnet18(weights=None, num_classes=7)
    source.bn1.running_mean.normal_()
    tensors = {k: v for k, v in source.state_dict().items() if with_classifier or not k.startswith("fc.")}
    tensors = dict(reversed(tensors.items()))  # the order must not matter
    file = tmp_path / f"weights{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, file)
    state = make(SINGLE_LANE, weights=file).body.state_dict()
    assert all(torch.equal(state[k], v) for k, v in tensors.items() if not k.startswith("fc.") and "tracked" not in k)


def test_weights_of_other_names_are_matched_by_order(tmp_path):
    source = timm.create_model("resnet18", num_classes=7)
    source.bn1.running_mean.normal_()
    tensors = {f"tensor{i}": v for i, v in enumerate(source.state_dict().values()) if v.dim()}
    file = tmp_path / "weights.pth"
    torch.save(tensors, file)
    body = make(weights=file).body
    for key, tensor in source.state_dict().items():
        if not key.startswith("fc.") and "tracked" not in key:
            assert torch.equal(body.state_dict()[key], tensor), key


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv2.weight"] = tensors.pop("conv1.weight")  # neither all names fit nor, at the end, the order


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layer4.1.bn2.bias"] = torch.zeros(3)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layer4.1.bn2.bias"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layer4.2.bn2.bias"] = torch.zeros(512)


@pytest.mark.parametrize("damage", [rename, reshape, drop, add])
def test_weights_of_another_model_are_refused_and_none_of_them_is_loaded(damage, tmp_path):
    model = make(SINGLE_LANE)
    before = copy.deepcopy(model.state_dict())
    whole = timm.create_model("resnet18")
    tensors = {k: torch.randn_like(v) for k, v in whole.state_dict().items() if v.dim()}
    damage(tensors)
    torch.save(tensors, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth: .*the file is of another model") as caught:
        load_pretrained(model, tmp_path / "weights.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_deeper_network_of_the_same_names_is_another_model(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"no place for the file's layer1\.2\.conv1\.weight"):
        make(weights=tmp_path / "weights.pth")


@pytest.mark.parametrize("content", [b"", b"not weights at all", None])
def test_a_file_that_holds_no_weights_is_refused_in_one_line(content, tmp_path):
    for suffix in (".pth", ".safetensors"):
        file = tmp_path / f"weights{suffix}"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(
            InputError, match=r"backbone\.weights .*(no such file|neither a safetensors file)"
        ) as caught:
            make(weights=file)
        assert "\n" not in str(caught.value)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="not hold a plain dictionary of tensors"):
        make(weights=tmp_path / "weights.pth")


def test_an_unknown_backbone_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match=r"backbone\.name resnet5O: timm has no such model; did you mean 'resnet5"):
        make(name="resnet5O")


def is_deterministic(backbone: Backbone) -> bool:
    """Whether two forwards in training mode give the same, and none draws a random number."""
    backbone.train()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    with torch.no_grad():
        first, second = backbone(x), backbone(x)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and torch.equal(
        torch.get_rng_state(), before
    )


@pytest.mark.parametrize("name", ["nextvit_small", "focalnet_tiny_lrf", "convnext_atto"])
def test_a_backbone_that_timm_builds_with_dropped_paths_is_built_without(name):
    theirs = timm.create_model(name, features_only=True)
    has_drops = any(isinstance(module, DropPath) and module.drop_prob for module in theirs.modules())
    assert has_drops is (name != "convnext_atto"), "timm's own default"
    ours = make(None, name=name)
    assert not any(isinstance(module, DropPath) and module.drop_prob for module in ours.modules())
    assert is_deterministic(ours)


class Noisy(nn.Module):
    """A network of four stages, whose third holds one layer."""

    def __init__(self, layer: Callable[[], nn.Module], **_: object) -> None:
        super().__init__()
        widths = (3, 8, 8, 8, 8)
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            stride = 2 if number else 4
            stage = nn.Sequential(nn.Conv2d(before, after, stride, stride))
            if number == 2:
                stage.append(layer())
            self.add_module(f"stage{number}", stage)
        self.feature_info = [
            {"num_chs": 8, "reduction": 4 << number, "module": f"stage{number}"} for number in range(4)
        ]
        self.pretrained_cfg: dict[str, object] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.Sequential(*self.children())(x)


LAYERS = {
    "Dropout": lambda: nn.Dropout(0.1),
    "Dropout2d": lambda: nn.Dropout2d(0.25),
    "AlphaDropout": lambda: nn.AlphaDropout(0.1),
    "DropPath": lambda: DropPath(0.1),
    "DropBlock2d": lambda: DropBlock2d(0.1),
    "StochasticDepth": lambda: torchvision.ops.StochasticDepth(0.2, "row"),
    "MultiheadAttention": lambda: nn.MultiheadAttention(8, 2, dropout=0.3),
    "RReLU": nn.RReLU,
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5),
}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], nn.Module]], None]:
    """A function that lets `test_noisy`, a model of timm's, have a layer in its third stage."""

    def put(layer: Callable[[], nn.Module]) -> None:
        def test_noisy(pretrained: bool = False, **options: object) -> nn.Module:
            options |= {"pretrained_cfg": {"classifier": ""}, "feature_cfg": {"out_indices": (0, 1, 2, 3)}}
            return build_model_with_cfg(Noisy, "test_noisy", pretrained, layer=layer, **options)

        monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_noisy", test_noisy)

    return put


@pytest.mark.parametrize("kind", LAYERS)
def test_a_backbone_with_a_random_layer_is_refused_and_the_layer_named(kind, stage):
    stage(LAYERS[kind])
    with pytest.raises(
        InputError, match=rf"^model\.backbone\.name test_noisy: its layer stage2\S1 \({kind}\) is random"
    ):
        make(name="test_noisy")


@pytest.mark.parametrize(
    "layer", [lambda: nn.Dropout(0.0), lambda: DropPath(0.0), nn.ReLU, lambda: BatchNormAct2d(8), nn.Identity]
)
def test_a_layer_that_drops_nothing_is_accepted(layer, stage):
    stage(layer)
    assert is_deterministic(make(name="test_noisy"))


def test_a_random_layer_inside_a_norm_is_found_before_the_norms_are_exchanged(stage):
    stage(lambda: BatchNormAct2d(8, drop_layer=partial(DropBlock2d, 0.1)))
    for lane in (SINGLE_LANE, None):
        with pytest.raises(InputError, match=r"its layer stage2\S1\.drop \(DropBlock2d\) is random"):
            make(lane, name="test_noisy")


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bat_resnext26ts", r"stages_0\.0\.attn\.dropout \(Dropout2d\)"),
        ("maxxvit_rmlp_nano_rw_256", r"stages_0\.blocks\.0\.attn_block\.attn\.rel_pos\.mlp\.drop1 \(Dropout\)"),
    ],
)
def test_timms_own_backbones_whose_dropout_has_no_rate_to_set_are_refused(name, layer):
    with pytest.raises(InputError, match=f"backbone.name {name}: its layer {layer} is random") as caught:
        make(name=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_backbone_without_feature_maps_of_these_strides_is_refused(name):
    with pytest.raises(InputError, match=f"backbone.name {name}: "):
        make(name=name)


def test_stages_that_cannot_be_told_apart_are_refused_only_if_some_are_to_be_frozen():
    make(name="hrnet_w18_small")
    with pytest.raises(InputError, match="set it to 0"):
        make(name="hrnet_w18_small", frozen_stages=2)


def test_a_last_convolution_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="resnet18 has no convolution before its classifier"):
        make(last_convolution=True)


@pytest.mark.skipif(not MOBILENET.is_file(), reason="torchvision's mobilenet_v2 file is not beside the repository")
@pytest.mark.parametrize("last_convolution", [False, True])
def test_torchvisions_mobilenet_file_gives_torchvisions_features(last_convolution):
    theirs = torchvision.models.mobilenet_v2(weights=None).eval()
    theirs.load_state_dict(torch.load(MOBILENET, weights_only=True))
    ours = make(SINGLE_LANE, name="mobilenetv2_100", weights=MOBILENET, last_convolution=last_convolution).eval()
    x = torch.randn(1, 3, 64, 64)
    outputs, after = [], x
    with torch.no_grad():
        for layer in theirs.features:
            after = layer(after)
            outputs.append(after)
        features = ours(x)
    expected = [outputs[3], outputs[6], outputs[13], outputs[18 if last_convolution else 17]]
    assert ours.channels == [24, 32, 96, 1280 if last_convolution else 320]
    for a, b in zip(expected, features, strict=True):
        assert relative(a, b) < 1e-5
