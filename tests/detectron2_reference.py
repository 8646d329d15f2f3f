"""Detectron2's R50-FPN Faster R-CNN after its documentation, small and plain: names, layers, anchors, pooling.

It shares no code with ours; convolutions, RoIAlign and NMS are torch's and torchvision's.
"""

import math

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

CLASSES = 5
BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}
MEAN_BGR = torch.tensor([103.53, 116.28, 123.675]).reshape(3, 1, 1)
State = dict[str, Tensor]


def random_state(seed: int = 0) -> State:
    """Random weights under detectron2's names that find something."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {"pixel_mean": MEAN_BGR.clone(), "pixel_std": torch.ones(3, 1, 1)}

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    def convolution(name: str, out: int, into: int, size: int, std: float | None = None, norm: float = 0.0) -> None:
        state[f"{name}.weight"] = normal(out, into, size, size, std=std or math.sqrt(2 / (into * size * size)))
        if norm:
            state[f"{name}.norm.weight"] = norm * (0.8 + 0.4 * torch.rand(out, generator=generator))
            state[f"{name}.norm.bias"] = normal(out, std=0.1)
            state[f"{name}.norm.running_mean"] = normal(out, std=0.1)
            state[f"{name}.norm.running_var"] = 0.5 + torch.rand(out, generator=generator)
        else:
            state[f"{name}.bias"] = normal(out, std=0.01)

    bottom = "backbone.bottom_up"
    convolution(f"{bottom}.stem.conv1", 64, 3, 7, norm=0.02)  # pixels are not divided by a deviation
    into = 64
    for stage, blocks in BLOCKS.items():
        width = 64 * 2 ** (stage - 2)
        for block in range(blocks):
            name = f"{bottom}.res{stage}.{block}"
            if block == 0:
                convolution(f"{name}.shortcut", 4 * width, into, 1, norm=1.0)
            convolution(f"{name}.conv1", width, into, 1, norm=1.0)
            convolution(f"{name}.conv2", width, width, 3, norm=1.0)
            convolution(f"{name}.conv3", 4 * width, width, 1, norm=0.3)
            into = 4 * width
        convolution(f"backbone.fpn_lateral{stage}", 256, into, 1, std=math.sqrt(1 / into))
        convolution(f"backbone.fpn_output{stage}", 256, 256, 3, std=math.sqrt(1 / (9 * 256)))
    convolution("proposal_generator.rpn_head.conv", 256, 256, 3)
    convolution("proposal_generator.rpn_head.objectness_logits", 3, 256, 1, std=0.01)
    convolution("proposal_generator.rpn_head.anchor_deltas", 12, 256, 1, std=0.001)
    for name, out, into, std in (
        ("roi_heads.box_head.fc1", 1024, 256 * 49, math.sqrt(1 / (256 * 49))),
        ("roi_heads.box_head.fc2", 1024, 1024, math.sqrt(1 / 1024)),
        ("roi_heads.box_predictor.cls_score", CLASSES + 1, 1024, 0.015),
        ("roi_heads.box_predictor.bbox_pred", 4 * CLASSES, 1024, 0.01),
    ):
        state[f"{name}.weight"], state[f"{name}.bias"] = normal(out, into, std=std), normal(out, std=0.01)
    return state


def _convolution(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    y = F.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2)
    if f"{name}.norm.weight" not in state:
        return y
    gain, bias, mean, var = (
        state[f"{name}.norm.{part}"].reshape(-1, 1, 1) for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (y - mean) / (var + 1e-5).sqrt() * gain + bias


def features(state: State, bgr: Tensor) -> list[Tensor]:
    """P2 to P6 of one image of blue, green and red from 0 to 255, whose edges are multiples of 32."""
    x = (bgr - MEAN_BGR.to(bgr)).unsqueeze(0)
    x = F.max_pool2d(F.relu(_convolution(state, "backbone.bottom_up.stem.conv1", x, 2)), 3, 2, 1)
    found = []
    for stage, blocks in BLOCKS.items():
        for block in range(blocks):
            name, stride = f"backbone.bottom_up.res{stage}.{block}", 2 if block == 0 and stage > 2 else 1
            y = F.relu(_convolution(state, f"{name}.conv1", x, stride))  # STRIDE_IN_1X1
            y = F.relu(_convolution(state, f"{name}.conv2", y))
            y = _convolution(state, f"{name}.conv3", y)
            x = F.relu(y + (_convolution(state, f"{name}.shortcut", x, stride) if block == 0 else x))
        found.append(x)
    merged, pyramid = None, []
    for stage in (5, 4, 3, 2):
        lateral = _convolution(state, f"backbone.fpn_lateral{stage}", found[stage - 2])
        merged = lateral if merged is None else lateral + F.interpolate(merged, scale_factor=2.0, mode="nearest")
        pyramid.insert(0, _convolution(state, f"backbone.fpn_output{stage}", merged))
    return [*pyramid, F.max_pool2d(pyramid[-1], 1, 2)]


def anchors(level: int, height: int, width: int) -> Tensor:
    """Of a level of stride 2 ** level: by row, column and ratio; offset 0, not rounded."""
    stride, size = 2**level, 8 * 2**level
    rows = []
    for y in range(height):
        for x in range(width):
            for ratio in (0.5, 1.0, 2.0):
                w = math.sqrt(size**2 / ratio)
                h = ratio * w
                rows.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
    return torch.tensor(rows)


def apply_deltas(deltas: Tensor, boxes: Tensor, weights: tuple[float, float, float, float]) -> Tensor:
    """Of (n, 4) each."""
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    dx, dy, dw, dh = (deltas[:, i] / weights[i] for i in range(4))
    x, y = boxes[:, 0] + 0.5 * w + dx * w, boxes[:, 1] + 0.5 * h + dy * h
    w, h = (own * d.clamp(max=math.log(1000 / 16)).exp() for own, d in ((w, dw), (h, dh)))
    return torch.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], 1)


def detect(state: State, bgr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, 4), scores and classes of one image, best first."""
    size = bgr.shape[1:]
    pyramid = features(state, bgr)
    boxes, scores, levels = [], [], []
    head = "proposal_generator.rpn_head"
    for number, level in enumerate(pyramid):
        hidden = F.relu(_convolution(state, f"{head}.conv", level))
        logits = _convolution(state, f"{head}.objectness_logits", hidden).permute(0, 2, 3, 1).flatten()
        deltas = _convolution(state, f"{head}.anchor_deltas", hidden)
        deltas = deltas.reshape(3, 4, *level.shape[2:]).permute(2, 3, 0, 1).reshape(-1, 4)
        best, index = logits.topk(min(1000, len(logits)))
        own = anchors(number + 2, *level.shape[2:]).to(deltas)
        boxes.append(apply_deltas(deltas[index], own[index], (1, 1, 1, 1)))
        scores.append(best)
        levels.append(torch.full_like(index, number))
    proposals = torchvision.ops.clip_boxes_to_image(torch.cat(boxes), size)
    is_left = ((proposals[:, 2:] - proposals[:, :2]) > 0).all(1)
    proposals, logits, level = proposals[is_left], torch.cat(scores)[is_left], torch.cat(levels)[is_left]
    proposals = proposals[torchvision.ops.batched_nms(proposals, logits, level, 0.7)[:1000]]
    edges = ((proposals[:, 2] - proposals[:, 0]) * (proposals[:, 3] - proposals[:, 1])).sqrt()
    level = torch.floor(4 + torch.log2(edges / 224 + 1e-8)).clamp(2, 5)
    pooled = torch.zeros(len(proposals), 256, 7, 7).to(proposals)
    for number in range(2, 6):
        own = level == number
        rois = torch.cat([torch.zeros(int(own.sum()), 1).to(proposals), proposals[own]], 1)
        pooled[own] = torchvision.ops.roi_align(pyramid[number - 2], rois, 7, 1 / 2**number, 0, aligned=True)
    hidden = pooled.flatten(1)
    for name in ("fc1", "fc2"):
        hidden = F.relu(F.linear(hidden, *(state[f"roi_heads.box_head.{name}.{kind}"] for kind in ("weight", "bias"))))
    logits, deltas = (
        F.linear(hidden, state[f"roi_heads.box_predictor.{name}.weight"], state[f"roi_heads.box_predictor.{name}.bias"])
        for name in ("cls_score", "bbox_pred")
    )
    probabilities = logits.softmax(1)[:, :-1]
    roi, label = (probabilities > 0.05).nonzero(as_tuple=True)
    own = deltas.reshape(len(deltas), -1, 4)[roi, label]
    found = torchvision.ops.clip_boxes_to_image(apply_deltas(own, proposals[roi], (10, 10, 5, 5)), size)
    score = probabilities[roi, label]
    keep = torchvision.ops.batched_nms(found, score, label, 0.5)[:100]
    keep = keep[((found[keep, 2:] - found[keep, :2]) > 0).all(1)]  # its postprocessing drops empty boxes
    return found[keep], score[keep], label[keep]
