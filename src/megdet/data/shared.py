"""A data set that one process of a host reads and the others map: annotations are parsed and stored once a host."""

import dataclasses
import platform
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megdet.data.annotations import AnnotationTable
from megdet.data.coco import CocoDataset
from megdet.data.columns import Columns, id_column, ids_of, map_columns, text_column, text_of, write_columns
from megdet.data.far.folder import FarFolder, ImageFolder
from megdet.data.segmentations import mapped, unpacked
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.files import cannot_write, reason_of


def once_a_host(world: World, load: Callable[[], CocoDataset]) -> CocoDataset:
    """What `load` gives on the first rank of each host; every rank calls it and waits, at most the world's timeout.

    Raises:
        InputError: on every rank, the error of the first rank that could not load or map the data set.
    """
    if world.size == 1:
        return load()
    host = platform.node()
    with ExitStack() as opened:
        dataset = world.together(lambda: load() if world.local_rank == 0 else None)
        offer = world.together(lambda: None if dataset is None else _written(dataset, opened))
        offers = world.gather_objects((host, offer))

        def found() -> CocoDataset:
            if dataset is not None:
                return dataset
            try:
                return _mapped(Path(next(path for name, path in offers if name == host and path)))
            except (OSError, ValueError, StopIteration) as problem:
                raise InputError(
                    f"rank {world.rank} on {host} cannot map the data set read by the first rank there: {_why(problem)}"
                ) from None

        return world.together(found)  # all have mapped the file, so it may be deleted


def _why(error: Exception) -> str:
    return "no rank there is the first (LOCAL_RANK 0)" if isinstance(error, StopIteration) else reason_of(error)


def _written(dataset: CocoDataset, opened: ExitStack) -> str:
    table = dataset.annotations
    names = (dataset.class_names, dataset.category_ids, dataset.image_ids, dataset.file_names)
    facts = (dataset.num_dropped, dataset.num_weightless, dataset.masks_serve_pasting)
    masks = table.segmentations
    masks_file = None if masks is None else masks.shared_file()
    columns: Columns = {
        "files": text_column([str(file or "") for file in (dataset.annotations_file, masks_file)]),
        "image_folder": text_column(_folder_written(dataset.image_folder)),
        "names": text_column((*names, *facts)),
        "sizes": dataset.sizes,
        "counts": table.counts,
        "boxes": table.boxes,
        "labels": table.labels,
        "is_crowd": table.is_crowd,
        "areas": table.areas,
        "annotation_ids": id_column(table.annotation_ids),
    }
    if dataset.weights is not None:
        columns["weights"] = dataset.weights
    if dataset.stamps is not None:
        columns["stamps"] = dataset.stamps
    if masks is not None and table.places is not None:
        columns |= {"places": table.places, **({} if masks_file else masks.packed())}
    try:
        folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="megdet_data_"))
        file = Path(folder) / "dataset.safetensors"
        write_columns(file, columns, {})
    except OSError as error:
        raise cannot_write(Path(tempfile.gettempdir()), error) from error
    return str(file)


def _mapped(file: Path) -> CocoDataset:
    columns, _ = map_columns(file)
    annotations_file, masks_file = text_of(columns["files"])
    class_names, category_ids, image_ids, file_names, *facts = text_of(columns["names"])
    num_dropped, num_weightless, masks_serve_pasting = facts
    masks = mapped(Path(masks_file)) if masks_file else unpacked(columns) if "digest" in columns else None
    return CocoDataset(
        annotations_file=Path(annotations_file),
        image_folder=_folder_read(text_of(columns["image_folder"])),
        class_names=tuple(class_names),
        category_ids=tuple(category_ids),
        image_ids=tuple(image_ids),
        file_names=tuple(file_names),
        sizes=columns["sizes"],
        annotations=AnnotationTable(
            columns["counts"],
            columns["boxes"],
            columns["labels"],
            columns["is_crowd"],
            columns["areas"],
            ids_of(columns["annotation_ids"]),
            masks,
            columns.get("places"),
        ),
        num_dropped=num_dropped,
        weights=columns.get("weights"),
        num_weightless=num_weightless,
        masks_serve_pasting=masks_serve_pasting,
        stamps=columns.get("stamps"),
    )


def _folder_written(folder: ImageFolder) -> list[Any]:
    return [str(folder)] if isinstance(folder, Path) else [*dataclasses.astuple(folder)]


def _folder_read(written: list[Any]) -> ImageFolder:
    return Path(written[0]) if len(written) == 1 else FarFolder(*written)
