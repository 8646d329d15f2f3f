"""The graph of a detector, before it becomes a file: it finds what the detector finds."""

import copy

import pytest
import torch

from export_kinds import CLASSES, KINDS, detector_of
from factories import tiny_batch
from megdet.inference.fold import fold_batch_norms
from megdet.model.graph import detection_graph


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_of_each_kind_of_detector_finds_what_the_detector_finds(kind):
    model = detector_of(KINDS[kind])
    ours = copy.deepcopy(model)
    fold_batch_norms(model)
    graph = detection_graph(model)
    for images, canvas in ((1, 64), (2, 96), (3, 50)):
        batch = tiny_batch(images, canvas=canvas, seed=images)
        with torch.no_grad():
            found = ours.detect(ours.normalized(batch.pixels, batch.sizes), batch.sizes)
            boxes, scores, labels, *masks = graph(batch.pixels, batch.sizes)
        assert (found.labels >= 0).any()
        assert torch.equal(found.labels, labels)
        assert (found.boxes - boxes).abs().max() < 1e-2
        assert (found.scores - scores).abs().max() < 1e-4
        assert bool(masks) == model.has_masks
        if masks:
            assert (found.masks - masks[0]).abs().max() < 1e-4


def test_an_image_without_a_detection_has_rows_for_nothing_alone():
    model = detector_of(KINDS["faster_rcnn"])
    with torch.no_grad():
        model.box_head.classes.bias[-1] = 50.0  # the background
    graph = detection_graph(model)
    batch = tiny_batch(2)
    with torch.no_grad():
        boxes, scores, labels = graph(batch.pixels, batch.sizes)
    assert labels.unique().tolist() == [-1]
    assert not boxes.any()
    assert not scores.any()


def test_labels_are_those_of_the_classes():
    graph = detection_graph(detector_of(KINDS["retinanet"]))
    batch = tiny_batch(2)
    with torch.no_grad():
        labels = graph(batch.pixels, batch.sizes)[2]
    assert {*labels.unique().tolist()} <= {-1, *range(len(CLASSES))}
