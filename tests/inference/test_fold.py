from dataclasses import replace

import pytest
import torch

from factories import TINY, relative, tiny_batch, tiny_detector, with_model
from megdet.inference.fold import fold_batch_norms
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.layers.frozen_norm import FrozenBatchNorm

BACKBONES = ["resnet18", "mobilenetv2_100", "efficientnet_b0"]


@pytest.mark.parametrize("bn_size", [0, 2])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_folded_detector_finds_the_same(name, bn_size):
    recipe = with_model(replace(TINY, bn_size=bn_size), backbone={"name": name}, fpn={"norm": "batch"})
    if not bn_size:
        recipe = with_model(recipe, fpn={"norm": "frozen"})
    model = tiny_detector(recipe).double().eval()
    batch = tiny_batch(2)
    images = model.normalized(batch.pixels, batch.sizes)
    features, found = model.fpn(model.backbone(images)), model.detect(images, batch.sizes)
    folded = fold_batch_norms(model)
    norms = [m for m in model.modules() if isinstance(m, CrossDeviceBatchNorm | FrozenBatchNorm)]
    assert folded > 20
    assert norms == []
    for before, after in zip(features, model.fpn(model.backbone(images)), strict=True):
        assert relative(before, after) < 1e-10
    again = model.detect(images, batch.sizes)
    assert torch.equal(found.labels, again.labels)
    assert relative(found.boxes, again.boxes) < 1e-9


def test_a_norm_whose_convolution_has_other_readers_or_runs_twice_is_left_alone():
    model = tiny_detector(TINY).double().eval()
    block = model.backbone.body.layer1[0]
    norm, original = block.bn1, block.forward
    block.forward = lambda x: original(x) + block.bn1(block.conv1(x))  # conv1 and bn1 now run twice
    fold_batch_norms(model)
    assert block.bn1 is norm


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="eval"):
        fold_batch_norms(tiny_detector(TINY).train())
