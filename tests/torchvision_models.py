"""Torchvision's own detector with weights that find something."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn

CLASSES = 5


def their_detector(eps: float, make: Callable[..., Any] = fasterrcnn_resnet50_fpn, **options: Any) -> nn.Module:
    """Random weights, statistics that are not trivial, and logits of a size that finds something."""
    torch.manual_seed(0)
    model = make(weights=None, weights_backbone=None, num_classes=CLASSES + 1, **options)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, *((0.2, 0.5) if name.endswith("bn3") else (0.8, 1.2)))
            nn.init.normal_(module.bias, 0, 0.1)
    with torch.no_grad():
        model.rpn.head.cls_logits.weight.mul_(3)
        model.rpn.head.bbox_pred.weight.mul_(3)
        model.roi_heads.box_predictor.cls_score.weight.mul_(12)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(5)
    return model.eval()
