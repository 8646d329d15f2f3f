"""Verbs that make data sets of data sets: convert, split, merge, sample."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from megdet.cli.options import CONSOLE, Arguments
from megdet.data.coco import load_coco
from megdet.data.far.folder import folder_of, local_folder
from megdet.data.formats.converted import Converted, link_images
from megdet.data.subsets import merge_documents, read_document, sample_document, split_document
from megdet.errors import InputError


def run_convert(arguments: Arguments) -> None:
    """Write COCO files and link the images beside them, or write VOC or YOLO."""
    _refuse_options_of_others(arguments)
    if arguments.images is not None:
        local_folder(arguments.images, "data convert")
    if arguments.to != "coco":
        _write_for_others(arguments)
        return
    converted = _converted(arguments)
    table = Table("annotations", "images", "count", "boxes", "classes")
    parts = []
    for part in converted:
        images = link_images(part, arguments.out)
        numbers = str(part.num_images), str(part.num_boxes), str(len(part.class_names))
        table.add_row(str(part.annotations_file), str(images), *numbers)
        parts.append(
            {
                "annotations": str(part.annotations_file),
                "image_folder": str(images),
                "images": part.num_images,
                "boxes": part.num_boxes,
                "classes": part.class_names,
            }
        )
    CONSOLE.print(table)
    arguments.print_json({"parts": parts})


def _converted(arguments: Arguments) -> list[Converted]:
    """The result of the chosen reader, which is imported here, since one is used."""
    source, out, images = arguments.source, arguments.out, arguments.images
    match arguments.source_format:
        case "voc":
            from megdet.data.formats.voc import convert_voc

            own = {"zero_based": arguments.zero_based, "difficult_as_crowd": arguments.difficult_as_crowd}
            return convert_voc(source, out, **own)
        case "yolo":
            from megdet.data.formats.yolo import convert_yolo

            return convert_yolo(source, out, images)
        case "csv":
            from megdet.data.formats.csv_table import convert_csv

            return convert_csv(source, out, images)
        case "labelme":
            from megdet.data.formats.labelme import convert_labelme

            return convert_labelme(source, out, images)
        case "cvat":
            from megdet.data.formats.cvat import convert_cvat

            return convert_cvat(source, out, images)
        case "label-studio":
            from megdet.data.formats.label_studio import convert_label_studio

            return convert_label_studio(source, out, images)
    from megdet.data.formats.hugging_face import convert_hugging_face

    return convert_hugging_face(str(source), out, "xyxy" if arguments.corners else "xywh")


def _write_for_others(arguments: Arguments) -> None:
    from megdet.data.formats.writing import write_voc, write_yolo

    if arguments.images is None:
        raise InputError(f"--to {arguments.to} needs --images, the folder of the images of {arguments.source}")
    dataset = load_coco(arguments.source, arguments.images, keep_empty=True)
    split = arguments.split or arguments.source.stem
    written = (write_yolo if arguments.to == "yolo" else write_voc)(dataset, arguments.out, split)
    what = "left out" if arguments.to == "yolo" else "marked difficult"
    CONSOLE.print(
        f"{written.folder}: split {split}, {written.num_images} images, {written.num_boxes} boxes, "
        f"{written.num_crowds} crowds {what}, {dataset.num_dropped} boxes without area left out"
    )
    numbers = {"images": written.num_images, "boxes": written.num_boxes, "crowds": written.num_crowds}
    arguments.print_json({"folder": str(written.folder), "split": split, **numbers})


def _refuse_options_of_others(arguments: Arguments) -> None:
    """Refuse options without effect, and conversions that there are not."""
    source, target = arguments.source_format, arguments.to
    if source == "coco" and target == "coco":
        raise InputError("from COCO to COCO there is nothing to do: give --to voc or --to yolo")
    if source != "coco" and target != "coco":
        raise InputError(f"convert {source} to COCO first, and the result with --from coco --to {target}")
    given = {
        "--images": arguments.images is not None and source in ("voc", "hf"),
        "--split": arguments.split is not None and target == "coco",
        "--zero-based": arguments.zero_based and source != "voc",
        "--difficult-as-crowd": arguments.difficult_as_crowd and source != "voc",
        "--corners": arguments.corners and source != "hf",
    }
    for option, is_wrong in given.items():
        if is_wrong:
            raise InputError(f"{option} has no effect with --from {source} --to {target}: leave it out")


def run_split(arguments: Arguments) -> None:
    """Write one COCO file a part."""
    parts = split_document(
        read_document(arguments.annotations), arguments.parts, group=arguments.group, seed=arguments.seed
    )
    files = {name: arguments.out / f"{name}.json" for name in parts}
    for path in files.values():
        if path.exists():  # before the first is written
            raise InputError(f"{path} exists: choose another folder, or delete it")
    table = Table("class", *parts)
    table.add_row("images", *(str(len(part.images)) for part in parts.values()))
    for row in next(iter(parts.values())).categories:
        counts = [sum(own["category_id"] == row["id"] for own in part.annotations) for part in parts.values()]
        table.add_row(row["name"], *map(str, counts))
    for name, part in parts.items():
        part.write(files[name])
    CONSOLE.print(table)
    CONSOLE.print(", ".join(map(str, files.values())))
    numbers = {name: {"images": len(part.images), "boxes": len(part.annotations)} for name, part in parts.items()}
    arguments.print_json({name: {"annotations": str(files[name]), **own} for name, own in numbers.items()})


def run_merge(arguments: Arguments) -> None:
    """Write one COCO file of several, and link the folder above all images."""
    folders = [_without_dots(local_folder(folder_of(images), "data merge")) for _, images in arguments.data]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder")
    common = _common_folder(folders)
    documents = [read_document(Path(annotations)) for annotations, _ in arguments.data]
    merged = merge_documents(documents, folders, common)
    file = arguments.out / "annotations" / "all.json"
    merged.write(file)
    names = tuple(row["name"] for row in merged.categories)
    part = Converted(file, common, len(merged.images), len(merged.annotations), names)
    images = link_images(part, arguments.out)
    CONSOLE.print(f"{file}: {part.num_images} images in {images}, {part.num_boxes} boxes, {len(names)} classes")
    numbers = {"images": part.num_images, "boxes": part.num_boxes, "classes": names}
    arguments.print_json({"annotations": str(file), "image_folder": str(images), **numbers})


def _without_dots(folder: Path) -> Path:
    """The absolute path without `..`; links below the last of them stay."""
    whole = folder.absolute()
    count = max((place + 1 for place, part in enumerate(whole.parts) if part == ".."), default=0)
    return Path(*whole.parts[:count]).resolve().joinpath(*whole.parts[count:]) if count else whole


def _common_folder(folders: Sequence[Path]) -> Path:
    try:
        common = Path(os.path.commonpath(folders))
    except ValueError:  # on two drives
        common = folders[0].parent if len(folders) == 1 else Path(folders[0].anchor)
    if common == Path(common.anchor):
        raise InputError(f"{folders[0]} and {folders[-1]} have no folder in common: put or link them into one")
    return common


def run_sample(arguments: Arguments) -> None:
    """Write a COCO file with some of the images."""
    names = [name for name in arguments.classes.split(",") if name]
    document = read_document(arguments.annotations)
    part = sample_document(document, arguments.images, class_names=names, seed=arguments.seed)
    part.write(arguments.out)
    CONSOLE.print(f"{arguments.out}: {len(part.images)} images, {len(part.annotations)} boxes")
    numbers = {"images": len(part.images), "boxes": len(part.annotations)}
    arguments.print_json({"annotations": str(arguments.out), **numbers})
