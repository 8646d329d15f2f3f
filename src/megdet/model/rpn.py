"""The region proposal network (Ren et al., 2015) on a pyramid."""

from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from megdet.architecture_parts import Rpn as RpnRecipe
from megdet.layers.convert import NormFactory
from megdet.layers.convolution import convolved_levels
from megdet.layers.level_norm import normalized_levels
from megdet.model.proposals import Proposals
from megdet.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from megdet.ops.constants import constant
from megdet.ops.linear import linear
from megdet.ops.losses import box_loss, masked_cross_entropy_logits, mean_per_image
from megdet.ops.matching import match_boxes, sample_matches
from megdet.ops.nms import segmented_nms
from megdet.ops.ordering import NEVER, score_keys, top
from megdet.ops.roi_align import FeatureTable
from megdet.structures import Targets

DELTA_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class Rpn(nn.Module):
    """3 x 3 convolutions, one by default, and two 1 x 1 convolutions, shared by all levels."""

    def __init__(self, recipe: RpnRecipe, channels: int, anchors_per_cell: int, norm: NormFactory) -> None:
        super().__init__()
        self.recipe = recipe
        self.is_sparse = recipe.sparse_loss and recipe.norm == "none"
        for number in range(1, recipe.convolutions + 1):
            own = nn.Conv2d(channels, channels, 3, padding=1, bias=recipe.norm == "none")
            self.add_module("conv" if number == 1 else f"conv{number}", own)
            self.add_module("norm" if number == 1 else f"norm{number}", norm(channels))
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, 4 * anchors_per_cell, 1)
        for layer in (*(convolution for convolution, _ in self._convolutions()), self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def _convolutions(self) -> list[tuple[Any, Any]]:
        """The 3 x 3 convolutions and their norms."""
        ends = ["", *range(2, self.recipe.convolutions + 1)]
        return [(getattr(self, f"conv{end}"), getattr(self, f"norm{end}")) for end in ends]

    def forward(
        self, pyramid: list[Float[Tensor, "images channels _ _"]]
    ) -> tuple[list[Float[Tensor, "images _"]], list[Float[Tensor, "images _ 4"]]]:
        """Objectness logits and deltas of every anchor of each level, ordered as the anchors are."""
        logits, deltas, maps = [], [], pyramid
        for convolution, norm in self._convolutions():
            maps = normalized_levels(norm, convolved_levels(convolution, maps))
        for hidden in maps:
            logits.append(self.objectness(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.deltas(hidden).permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 4)))
        return logits, deltas

    @torch.no_grad()
    def propose(
        self,
        logits: list[Float[Tensor, "images _"]],
        deltas: list[Float[Tensor, "images _ 4"]],
        anchors: list[Float[Tensor, "_ 4"]],
        sizes: Int64[Tensor, "images 2"],
    ) -> Proposals:
        """The best anchors of each level, regressed, clipped to the image, after NMS; then the best of all levels."""
        recipe = self.recipe
        before = recipe.train_proposals_before_nms if self.training else recipe.test_proposals_before_nms
        after = recipe.train_proposals if self.training else recipe.test_proposals
        boxes, scores, identities, levels = [], [], [], []
        first_anchor = 0
        for level, level_anchors in enumerate(anchors):
            level_logits = logits[level].to(level_anchors.dtype)
            _, index = top(score_keys(level_logits), before)
            level_deltas = deltas[level].to(level_anchors.dtype).gather(1, index.unsqueeze(2).expand(-1, -1, 4))
            boxes.append(decode_boxes(level_deltas, level_anchors[index], DELTA_WEIGHTS))
            scores.append(level_logits.gather(1, index))
            identities.append(index + first_anchor)
            levels.append(torch.full_like(index, level))
            first_anchor += len(level_anchors)
        all_boxes, all_scores = clip_boxes(torch.cat(boxes, 1), sizes), torch.cat(scores, 1)
        edges = all_boxes[..., 2:] - all_boxes[..., :2]
        is_valid = (edges >= recipe.min_size).all(dim=2) & all_scores.isfinite()
        image = torch.arange(len(sizes), device=sizes.device).unsqueeze(1)
        segments = (image * len(anchors) + torch.cat(levels, 1)).masked_fill(~is_valid, -1)
        keep = segmented_nms(all_boxes.flatten(0, 1), all_scores.flatten(), segments.flatten(), recipe.nms_iou).view_as(
            segments
        )
        keys, index = top(score_keys(all_scores).masked_fill(~keep, NEVER), after)
        is_kept = keys != NEVER
        # empty rows are zeros: NaN of a diverged head must not reach RoIAlign, which turns coordinates into indices
        return Proposals(
            all_boxes.gather(1, index.unsqueeze(2).expand(-1, -1, 4)).masked_fill(~is_kept.unsqueeze(2), 0),
            torch.cat(identities, 1).gather(1, index).masked_fill(~is_kept, 0),
            is_kept,
        )

    def losses(
        self,
        logits: list[Float[Tensor, "images _"]],
        deltas: list[Float[Tensor, "images _ 4"]],
        anchors: list[Float[Tensor, "_ 4"]],
        targets: Targets,
        table: FeatureTable,
    ) -> dict[str, Float[Tensor, " images"]]:
        """Objectness and box loss of each image, sums over its sampled anchors divided by their number (Eq. 1).

        `rpn_positive` counts the sampled positive anchors. In the sparse form the dense maps in `logits` and `deltas`
        carry no gradient and the head runs again, with gradient, at the cells of the sampled anchors only.
        """
        recipe = self.recipe
        all_anchors = torch.cat(anchors)
        matches = match_boxes(
            all_anchors.unsqueeze(0),
            targets.boxes,
            targets.is_box,
            recipe.positive_iou,
            recipe.negative_iou,
            keep_best=True,
        )
        identities = torch.arange(len(all_anchors), device=all_anchors.device).unsqueeze(0)
        sample = sample_matches(matches, identities, targets.image_seeds, recipe.samples, recipe.positive_fraction)
        if self.is_sparse:
            sampled_logits, sampled_deltas = self._head_at(table, sample.index, [len(level) for level in anchors])
        else:
            sampled_logits = torch.cat(logits, 1).gather(1, sample.index)
            sampled_deltas = torch.cat(deltas, 1).gather(1, sample.index.unsqueeze(2).expand(-1, -1, 4))
        box_index = matches.box_index.gather(1, sample.index)
        boxes = targets.boxes if targets.boxes.shape[1] else targets.boxes.new_zeros(len(sample.index), 1, 4)
        matched = boxes.gather(1, box_index.unsqueeze(2).expand(-1, -1, 4))
        wanted = encode_boxes(matched, all_anchors[sample.index], DELTA_WEIGHTS)
        sampled_logits, sampled_deltas = sampled_logits.to(wanted.dtype), sampled_deltas.to(wanted.dtype)
        objectness = masked_cross_entropy_logits(sampled_logits, sample.is_positive, sample.is_valid)
        regression = box_loss(
            recipe.box_loss,
            sampled_deltas,
            wanted,
            all_anchors[sample.index],
            DELTA_WEIGHTS,
            recipe.smooth_l1_beta,
        )
        regression = regression * sample.is_positive
        return {
            "rpn_objectness": mean_per_image(objectness, sample.is_valid),
            "rpn_box": mean_per_image(regression, sample.is_valid),
            "rpn_positive": sample.is_positive.sum(1).to(wanted.dtype),
        }

    def _head_at(
        self, table: FeatureTable, index: Tensor, level_lengths: list[int]
    ) -> tuple[Float[Tensor, "images samples"], Float[Tensor, "images samples 4"]]:
        """The head's outputs at some anchors, from patches gathered around the anchors' cells.

        A patch is wider by a pixel on each side for every convolution; each convolution makes it smaller by as much,
        and the last is a matrix product.
        """
        images, samples = index.shape
        per_cell = self.objectness.out_channels
        device = index.device
        ends = tuple(accumulate(level_lengths))
        level = torch.bucketize(index, constant(ends, torch.int64, device), right=True)
        starts_of_levels = constant((0, *ends[:-1]), torch.int64, device)
        cell = torch.div(index - starts_of_levels[level], per_cell, rounding_mode="floor")
        heights = constant(table.heights, torch.int64, device)[level]
        widths = constant(table.widths, torch.int64, device)[level]
        starts = constant(table.starts, torch.int64, device)[level]
        *first, (last, _) = self._convolutions()
        reach = len(first) + 1
        offsets = torch.arange(-reach, reach + 1, device=index.device)
        y = (cell // widths).unsqueeze(2) + offsets
        x = (cell % widths).unsqueeze(2) + offsets
        is_inside = ((y >= 0) & (y < heights.unsqueeze(2))).unsqueeze(3) & (
            (x >= 0) & (x < widths.unsqueeze(2))
        ).unsqueeze(2)
        image = torch.arange(images, device=index.device).unsqueeze(1)
        base = (starts + image * heights * widths).reshape(images, samples, 1, 1)
        rows = base + y.unsqueeze(3) * widths.reshape(images, samples, 1, 1) + x.unsqueeze(2)
        patches = table.take(rows.masked_fill(~is_inside, 0).reshape(-1))
        patches = patches.reshape(images * samples, len(offsets), len(offsets), patches.shape[1])
        for convolution, _ in first:
            is_inside = is_inside[:, :, 1:-1, 1:-1]
            maps = F.relu(F.conv2d(patches.permute(0, 3, 1, 2), convolution.weight, convolution.bias))
            # outside the map the next convolution must read its zero padding, not outputs of this one
            patches = maps.permute(0, 2, 3, 1) * is_inside.flatten(0, 1).unsqueeze(3)
        weight = last.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = F.relu(linear(patches.reshape(images * samples, weight.shape[1]), weight, last.bias))
        slot = (index % per_cell).reshape(-1, 1)  # levels are whole cells, so this is the anchor's index in its cell
        logits = F.linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias).gather(1, slot)
        deltas = F.linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias).reshape(-1, per_cell, 4)
        own = deltas.gather(1, slot.unsqueeze(2).expand(-1, -1, 4))
        return logits.reshape(images, samples), own.reshape(images, samples, 4)
