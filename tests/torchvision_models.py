"""Torchvision's own detectors with weights that find something."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

CLASSES = 5


def their_detector(
    eps: float, *, has_masks: bool = False, make: Callable[..., Any] | None = None, **options: Any
) -> nn.Module:
    """Random weights, statistics that are not trivial, and logits of a size that finds something."""
    make = make or (maskrcnn_resnet50_fpn if has_masks else fasterrcnn_resnet50_fpn)
    model = _random(make, eps, options)
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.mul_(3)
        model.rpn.head.bbox_pred.weight.mul_(3)
        model.roi_heads.box_predictor.cls_score.weight.mul_(12)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(5)
        if has_masks:
            model.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(2)
            model.roi_heads.mask_predictor.mask_fcn_logits.bias.normal_(0, 0.5)
    return model.eval()


def their_retinanet(make: Callable[..., Any], eps: float = 1e-5, **options: Any) -> nn.Module:
    """The same for `retinanet_resnet50_fpn` or its _v2; the background, which none of its anchors learns, scores 0."""
    model = _random(make, eps, options)
    with torch.no_grad():
        for own, predicts, factor in (
            (model.head.classification_head, "cls_logits", 4.0),
            (model.head.regression_head, "bbox_reg", 4.0),
        ):
            for layer in own.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.mul_(3.0)
                elif isinstance(layer, nn.GroupNorm):
                    nn.init.uniform_(layer.weight, 0.8, 1.2)
                    nn.init.normal_(layer.bias, 0, 0.1)
            getattr(own, predicts).weight.mul_(factor)
        bias = model.head.classification_head.cls_logits.bias
        bias.fill_(-6.0).view(-1, CLASSES + 1)[:, 0] = -100.0
    return model.eval()


def _random(make: Callable[..., Any], eps: float, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = make(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **options)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, *((0.2, 0.5) if name.endswith("bn3") else (0.8, 1.2)))
            nn.init.normal_(module.bias, 0, 0.1)
    return model
