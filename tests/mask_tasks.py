"""Ground truth and detections with masks, small enough for hand arithmetic."""

import numpy as np
from pycocotools import mask as rle

from megdet.evaluation.coco_numbers import Evaluation, evaluate_detections

SIZE = (30, 40)
"""height and width of the images here"""


def encoded(mask: np.ndarray, *, packed: bool = True) -> dict:
    own = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    if packed:
        return {"size": list(mask.shape), "counts": own["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges, len(flat)]).tolist()}


def box_mask(x: int, y: int, width: int, height: int, size=SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def truth_of(*masks, sizes=True, **keys) -> dict:
    """One image whose objects are all of the first class of two."""
    image = {"id": 1, "height": SIZE[0], "width": SIZE[1]} if sizes else {"id": 1}
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "segmentation": mask} | keys
        for i, mask in enumerate(masks, start=1)
    ]
    return {"images": [image], "categories": [{"id": 1, "name": "cat"}, {"id": 2}], "annotations": annotations}


def found_of(*masks, **keys) -> list[dict]:
    found = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}
    return [found | {"score": 0.9 - 0.01 * i, "segmentation": mask} | keys for i, mask in enumerate(masks)]


def evaluated(truth, found) -> Evaluation:
    return evaluate_detections(truth, found, has_masks=True)
