"""The classes of a detector and those of a data set."""

from collections.abc import Sequence

from megdet.data.coco import CocoDataset
from megdet.errors import InputError, nearest


def category_ids_for(class_names: Sequence[str], dataset: CocoDataset) -> list[int | None]:
    """The data set's category id for each class of the detector, matched by name; None if the data set lacks it.

    Raises InputError if the data set has a class that the detector does not know, or two classes of one name that the
    detector does not have in the same order.
    """
    if tuple(class_names) == dataset.class_names:
        return list(dataset.category_ids)
    ids = dict(zip(dataset.class_names, dataset.category_ids, strict=True))
    unknown = [name for name in ids if name not in class_names]
    if unknown:
        hint = nearest(unknown[0], class_names) or ";"
        raise InputError(
            f"{dataset.annotations_file}: class '{unknown[0]}' is not among the detector's {len(class_names)} classes"
            f"{hint} rename it there, or leave it out by `megdet data sample --classes`"
        )
    twice = next((name for name in ids if max(class_names.count(name), dataset.class_names.count(name)) > 1), None)
    if twice is not None:
        raise InputError(
            f"{dataset.annotations_file}: two classes are called '{twice}', so classes cannot be matched by name"
        )
    return [ids.get(name) for name in class_names]
