"""Small tasks of COCO's evaluation: one image of two classes, and detections in it."""


def ground_truth(*boxes, image_id=1, category_id=1, **keys):
    """One image and two classes; every box is of the first class."""
    annotations = [
        {"id": i, "image_id": image_id, "category_id": category_id, "bbox": list(box)} | keys
        for i, box in enumerate(boxes)
    ]
    categories = [{"id": category_id, "name": "cat"}, {"id": 2, "name": "dog"}]
    return {"images": [{"id": image_id}], "categories": categories, "annotations": annotations}


def detection(*box, score=0.9, image_id=1, category_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}
