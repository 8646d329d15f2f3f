import os
import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_factories import image_row, two_images, with_masks, write_set
from megdet.data import coco_file, shared
from megdet.data.coco import CocoDataset, load_coco
from megdet.data.loader import group_batches
from megdet.data.plan import evaluation_plan
from megdet.data.shared import once_a_host
from megdet.distributed.local_ranks import RankError, run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.training.datasets import fingerprint
from small_runs import small_recipe

pytestmark = pytest.mark.distributed


def on_two_hosts(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Ranks 0 and 1 on one host, the others on another."""
    monkeypatch.setattr(platform, "node", lambda: "a" if world.rank < 2 else "b")
    return replace(world, local_rank=world.rank % 2)


def load_and_tell(world: World, annotations: Path, images: Path) -> tuple[bool, bool, str, list[str]]:
    """Whether this rank parsed the file, whether its boxes are mapped; the fingerprint, and what is left behind."""
    parsed = []
    with pytest.MonkeyPatch.context() as patch:
        world = on_two_hosts(world, patch)
        patch.setenv("TMPDIR", str(annotations.parent / "tmp"))
        patch.setattr(shared.tempfile, "tempdir", None)
        real = coco_file.parse
        patch.setattr(coco_file, "parse", lambda *arguments: parsed.append(1) or real(*arguments))
        dataset = once_a_host(world, lambda: load_coco(annotations, images, keep_empty=True))
    array = dataset.annotations.boxes
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    batch = next(
        group_batches(dataset, evaluation_plan(dataset.sizes, small_recipe(images)), workers=0, device=world.device)
    )
    world.barrier()
    left = [path.name for path in (annotations.parent / "tmp").rglob("*.safetensors")]
    return bool(parsed), array is not None, fingerprint(dataset), [*left, str(batch.targets.boxes.tolist())]


@pytest.mark.parametrize("ids", [(7, 3), ("β", 1 << 70)])
def test_one_process_of_each_host_parses_and_the_others_map_what_it_read(tmp_path, monkeypatch, ids):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "no cache"))
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    document = two_images()
    for table, key in (("images", "id"), ("annotations", "image_id")):
        for row in document[table]:
            row[key] = ids[(7, 3).index(row[key])]
    document["annotations"][0]["id"] = ids[1]
    files = write_set(tmp_path, document)
    alone = fingerprint(load_coco(*files, keep_empty=True))
    found = run_in_ranks(load_and_tell, 3, *files)
    assert [own[:2] for own in found] == [(True, False), (False, True), (True, False)]
    assert {own[2] for own in found} == {alone}
    assert {len(own[3]) for own in found} == {1}, "the shared file is gone"
    assert found[0][3] == found[1][3]


def load_masks(world: World, annotations: Path, images: Path, cache: str) -> tuple[str, str, list[list[float]]]:
    """The file that this rank has its masks from, the fingerprint, and the numbers of a batch's masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        dataset = once_a_host(world, lambda: load_coco(annotations, images, keep_empty=True, with_masks=True))
    array = dataset.annotations.segmentations.vertices
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    groups = evaluation_plan(dataset.sizes, small_recipe(images))
    masks = next(group_batches(dataset, groups, workers=0, device=world.device)).targets.masks
    file = "memory" if array is None else Path(array.filename).name.partition("-")[0]
    return file, fingerprint(dataset), [masks.bits.tolist(), masks.frames.tolist()]


@pytest.mark.parametrize(
    ("cache", "sources"), [("cache", ["masks"] * 3), ("file", ["memory", *["dataset.safetensors"] * 2])]
)
def test_masks_are_mapped_from_the_cache_by_all_ranks_or_from_what_the_first_wrote(tmp_path, cache, sources):
    (tmp_path / "file").touch()
    files = write_set(tmp_path, with_masks(two_images()))
    found = run_in_ranks(load_masks, 3, *files, str(tmp_path / cache))
    assert [own[0] for own in found] == sources
    assert found[0][1:] == found[1][1:] == found[2][1:]
    assert np.any(found[0][2][0])
    alone = fingerprint(load_coco(*files, keep_empty=True, with_masks=True))
    assert found[0][1] == alone


def load_here(world: World, annotations: Path, images: Path, dying: int) -> CocoDataset:
    if world.rank == dying:
        os._exit(3)
    return once_a_host(world, lambda: load_coco(annotations, images, keep_empty=True))


def test_what_the_first_refuses_every_rank_refuses(tmp_path):
    document = two_images()
    document["annotations"][0]["bbox"] = [1, 2, 3]
    files = write_set(tmp_path, document)
    with pytest.raises(InputError, match="annotation 11: bbox is not a list"):
        run_in_ranks(load_here, 2, *files, -1)


def test_a_first_process_that_dies_is_named_and_not_waited_for(tmp_path):
    files = write_set(tmp_path, {**two_images(), "images": [image_row(7, "a.jpg"), image_row(3, "b.jpg")]})
    with pytest.raises(RankError, match="rank 0 of 2 ended with exit code 3"):
        run_in_ranks(load_here, 2, *files, 0, timeout=60.0)


def load_without_the_file(world: World, annotations: Path, images: Path) -> None:
    if world.rank == 1:
        platform.node = lambda: "elsewhere"
    once_a_host(world, lambda: load_coco(annotations, images, keep_empty=True))


def test_a_rank_without_a_first_process_on_its_host_says_so(tmp_path):
    with pytest.raises(
        InputError, match=r"rank 1 on elsewhere cannot map .* no rank there is the first \(LOCAL_RANK 0"
    ):
        run_in_ranks(load_without_the_file, 2, *write_set(tmp_path, two_images()))


def test_the_fingerprint_follows_every_part_of_the_data(tmp_path):
    def of(change=len) -> str:
        document = two_images()
        change(document)
        return fingerprint(load_coco(*write_set(tmp_path, document), keep_empty=True))

    def moved(document):
        document["annotations"][0]["image_id"] = 7

    found = [
        of(),
        of(lambda document: document["annotations"][0]["bbox"].__setitem__(0, 2)),
        of(lambda document: document["annotations"][0].update(category_id=4)),
        of(lambda document: document["annotations"][0].update(iscrowd=1)),
        of(lambda document: document["images"][0].update(file_name="c.jpg")),
        of(lambda document: document["images"][0].update(id=8) or document["annotations"][1].update(image_id=8)),
        of(lambda document: document["categories"][0].update(name="wolf")),
        of(lambda document: document["images"].reverse()),
        of(moved),
    ]
    assert len(set(found)) == len(found)
    assert of() == found[0]
