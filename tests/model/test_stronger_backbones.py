"""The base models of the winning entry: deeper, with grouped convolutions, with squeeze-and-excitation."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import SEModule

from factories import gradients, relative
from megdet.architecture_parts import Backbone as BackboneRecipe
from megdet.distributed.lane import SINGLE_LANE, Lane
from megdet.model.backbone import Backbone, load_pretrained

QUICK = ("resnext50_32x4d", "seresnext50_32x4d")
LARGE = (
    *("resnet101", "resnet152", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("seresnext101_32x4d", "senet154", "legacy_senet154", "legacy_seresnext50_32x4d"),
)


def make(name: str, lane: Lane | None = None, **options: object) -> Backbone:
    torch.manual_seed(0)
    return Backbone(BackboneRecipe(name=name, **options), lane)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_a_base_model_takes_timms_file_gives_timms_features_and_trains_every_weight(name, tmp_path: Path):
    torch.manual_seed(1)
    whole = timm.create_model(name, num_classes=7).eval()
    for tensor in (own for key, own in whole.state_dict().items() if key.endswith("running_mean")):
        tensor.normal_(0, 0.1)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    backbone = make(name, SINGLE_LANE).eval()
    load_pretrained(backbone, tmp_path / "weights.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, expected = backbone(x), whole.forward_features(x)
    assert backbone.channels == [256, 512, 1024, 2048]
    assert [tuple(level.shape[2:]) for level in found] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert relative(expected, found[3]) < 1e-4

    again = make(name, SINGLE_LANE)
    again.load_state_dict(backbone.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in backbone.state_dict().items())
    again.train()
    torch.stack([level.mean() for level in again(x)]).sum().backward()
    trained = gradients(again)
    assert trained.keys() == {key for key, _ in again.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in trained.values())


def test_squeeze_and_excitation_looks_at_one_image_and_all_of_its_canvas():
    """An image alone is what it is beside others; a wider canvas is another one, far from its border too."""
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    wider = torch.nn.functional.pad(images, (0, 192))
    moves = {}
    for name in ("test_byobnet", "test_resnet"):
        backbone = make(name).double().eval()
        for key, tensor in backbone.state_dict().items():
            if key.endswith("weight") and not tensor.any():  # the last norm of a block, which silences it
                tensor.fill_(0.5)
        alone = [torch.cat(levels) for levels in zip(backbone(images[:1]), backbone(images[1:]), strict=True)]
        together = backbone(images)
        assert all(relative(a, b) < 1e-12 for a, b in zip(alone, together, strict=True))
        moves[name] = relative(together[0][:, :, :6, :6], backbone(wider)[0][:, :, :6, :6])
    assert any(isinstance(module, SEModule) for module in make("test_byobnet").modules())
    assert moves["test_byobnet"] > 1e-3
    assert moves["test_resnet"] < 1e-12
