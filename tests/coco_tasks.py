"""Small tasks of COCO's evaluation: one image of two classes, and detections in it; many images drawn at random."""

import numpy as np


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


def random_task(seed, num_images=6, num_classes=3, num_detections=160):
    """Detections that are jittered ground truth or noise, with many equal scores, crowds and every size of object."""
    random = np.random.default_rng(seed)
    image_ids = (7 + 3 * random.permutation(num_images)).tolist()
    categories = [{"id": 2 + 5 * i, "name": f"class {i}"} for i in range(num_classes)]

    def box():
        return [*random.uniform(0, 300, 2).tolist(), *np.exp(random.uniform(1.5, 5.3, 2)).tolist()]

    annotations = []
    for identity in range(1, 40):
        annotation = {"id": identity, "image_id": int(random.choice(image_ids)), "bbox": box()}
        annotation["category_id"] = categories[random.integers(num_classes - 1)]["id"]  # the last has no boxes
        annotation["iscrowd"] = int(random.random() < 0.15)
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3] * random.uniform(0.4, 1.0)
        annotations.append(annotation)
    detections = []
    for _ in range(num_detections):
        if random.random() < 0.6:
            of = annotations[random.integers(len(annotations))]
            x, y, w, h = of["bbox"]
            moved = [x + w * random.normal(0, 0.05), y + h * random.normal(0, 0.05), w, h]
            found = {"image_id": of["image_id"], "category_id": of["category_id"], "bbox": moved}
        else:
            found = {"image_id": int(random.choice(image_ids)), "bbox": box()}
            found["category_id"] = categories[random.integers(num_classes)]["id"]
        detections.append(found | {"score": float(np.round(random.random(), 1))})
    return {"images": [{"id": i} for i in image_ids], "categories": categories, "annotations": annotations}, detections
