"""The operators of a graph: in torch as defined, and in onnxruntime as in torch."""

import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import nms
from torchvision.ops import roi_align as roi_align_of_torchvision

from megdet.export.onnx_operators import TRANSLATIONS
from megdet.ops.graph_operators import NOTHING, roi_align, survivors, top


class AllOperators(nn.Module):
    def forward(self, scores, boxes, fine, coarse, rois, image_index, level_index):
        best, places = top(scores, 7)
        keep = survivors(boxes, scores, 0.5, 0.1, 4)
        levels = [fine, coarse], [4, 8]
        return (
            best,
            places,
            keep,
            roi_align(*levels, rois, image_index, level_index, 3, 2, True),
            roi_align([fine], [4], rois, image_index, torch.zeros_like(level_index), 2, 0, False),
        )


def inputs(images: int, candidates: int, rois: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Scores with many ties, boxes that overlap, two levels, and RoIs that reach out of them."""
    random = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        low = torch.rand(*shape, 2, generator=random) * 25 - 5
        return torch.cat([low, low + torch.rand(*shape, 2, generator=random) * 20], -1)

    return (
        (torch.rand(images, candidates, generator=random) * 4).round() / 4,
        boxes(images, candidates),
        torch.randn(images, 3, 9, 11, generator=random),
        torch.randn(images, 3, 5, 6, generator=random),
        boxes(rois),
        torch.randint(0, images, (rois,), generator=random),
        torch.randint(0, 2, (rois,), generator=random),
    )


@pytest.fixture(scope="module")
def session():
    given = inputs(2, 12, 6)
    free = [dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO) for tensor in given]
    free[1].pop(2), free[4].pop(1), free[2].pop(1), free[3].pop(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(AllOperators(), given, dynamic_shapes=tuple(free), strict=False)
        made = torch.onnx.export(program, custom_translation_table=TRANSLATIONS, opset_version=18, verbose=False)
    return onnxruntime.InferenceSession(made.model_proto.SerializeToString())


@pytest.mark.parametrize(("images", "candidates", "rois"), [(2, 12, 6), (3, 5, 9), (1, 40, 1), (2, 3, 0)])
def test_onnxruntime_computes_what_torch_computes(session, images, candidates, rois):
    for seed in range(3):
        given = inputs(images, candidates, rois, seed)
        names = [own.name for own in session.get_inputs()]
        found = session.run(None, {name: own.numpy() for name, own in zip(names, given, strict=True)})
        for ours, theirs in zip(AllOperators()(*given), found, strict=True):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=2e-6)


def test_ties_go_to_the_lower_place_and_what_is_missing_is_nothing():
    best, places = top(torch.tensor([[1.0, 3.0, 3.0], [NOTHING, 2.0, NOTHING]]), 5)
    assert best.tolist() == [[3, 3, 1, NOTHING, NOTHING], [2] + [NOTHING] * 4]
    assert places.tolist() == [[1, 2, 0, 0, 0], [1, 0, 0, 0, 0]]


def test_survivors_are_those_of_torchvisions_nms_and_no_more_than_asked_for():
    scores, boxes, *_ = inputs(3, 30, 1)
    scores = scores + torch.rand(3, 30, generator=torch.Generator().manual_seed(1)) * 0.1
    keep = survivors(boxes, scores, 0.3, 0.5, 6)
    for row in range(3):
        own = (scores[row] > 0.5).nonzero().flatten()
        wanted = own[nms(boxes[row, own], scores[row, own], 0.3)][:6]
        assert keep[row].nonzero().flatten().tolist() == sorted(wanted.tolist())
        assert len(wanted) > 0


def test_a_roi_is_pooled_from_its_own_level_in_the_order_of_the_bins():
    _, _, fine, coarse, rois, image_index, level_index = inputs(2, 1, 8)
    pooled = roi_align([fine, coarse], [4, 8], rois, image_index, level_index, 3, 2, True)
    for level, (maps, stride) in enumerate(((fine, 4), (coarse, 8))):
        own = level_index == level
        with_image = torch.cat([image_index[own, None].float(), rois[own]], 1)
        wanted = roi_align_of_torchvision(maps, with_image, 3, 1 / stride, 2, True)
        assert len(wanted)
        torch.testing.assert_close(pooled[own], wanted.flatten(2).transpose(1, 2))
