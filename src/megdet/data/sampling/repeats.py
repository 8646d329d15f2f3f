"""Images of rare classes that come more often: repeat-factor sampling, after LVIS (Gupta et al., 2019).

The repeat factor of a class that is in a part f of the images is max(1, sqrt(t / f)), that of an image the largest of
its classes. Differs from LVIS: an epoch keeps its length, so that steps, rates and checkpoints do not depend on the
classes. Of n images, image i comes n * r_i / (r_1 + ... + r_n) times an epoch on average, rounded up or down from one
epoch to the next; an image without a rare class may be left out of an epoch.
"""

import numpy as np
from numpy.typing import NDArray

from megdet.data.coco import CocoDataset


def repeat_factors(dataset: CocoDataset, threshold: float) -> NDArray[np.float64]:
    """(images,): the repeat factor of each image, 1 or more; crowds do not count."""
    table, num_classes = dataset.annotations, len(dataset.class_names)
    image = np.repeat(np.arange(len(dataset)), table.counts)[~table.is_crowd]
    label = table.labels[~table.is_crowd]
    pairs = np.unique(image * num_classes + label)  # each class of an image once
    image, label = pairs // num_classes, pairs % num_classes
    part = np.bincount(label, minlength=num_classes) / len(dataset)
    of_class = np.maximum(1.0, np.sqrt(threshold / np.where(part > 0, part, 1.0)))
    factors = np.ones(len(dataset))
    np.maximum.at(factors, image, of_class[label])
    return factors
