"""Batches of far images are those of a local folder to the bit, wherever they come from and whoever loads them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from far_servers import tar_of, zip_of
from megdet.data.coco import CocoDataset, training_set
from megdet.data.far.folder import folder_of
from megdet.data.far.opening import far_content
from megdet.data.loader import training_batches
from megdet.data.plan import TrainingPlan
from megdet.data.shared import once_a_host
from megdet.distributed.layout import choose_layout
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.recipe import Recipe
from megdet.structures import Batch
from megdet.training.datasets import fingerprint
from megdet.training.ledger import image_digests
from small_runs import CPU, small_recipe, write_small_set

COUNT, STEPS = 10, 3


@pytest.fixture
def recipe(tmp_path, cache_folder, server) -> Recipe:
    """Ten images in the folder of the server."""
    write_small_set(tmp_path, "train", COUNT)
    server.folder.rmdir()
    (tmp_path / "train").rename(server.folder)
    small = small_recipe(tmp_path)
    data = replace(
        small.data,
        train_images=str(server.folder),
        cache_folder=str(tmp_path / "copies"),
        color_jitter=0.3,
        crop=(40, 40),
        scale_jitter=(0.5, 2.0),
    )
    return replace(small, data=data)


def at(recipe: Recipe, address: str, **changes: object) -> Recipe:
    return replace(recipe, data=replace(recipe.data, train_images=address, **changes))


def batches(
    recipe: Recipe,
    *,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    dataset: CocoDataset | None = None,
) -> Iterator[Batch]:
    dataset = dataset or training_set(recipe.data, masks="all")
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, ranks, ranks)
    plan = TrainingPlan(dataset.sizes, recipe)
    return training_batches(dataset, plan, layout, rank, (first, STEPS), workers=workers, device=CPU)


def are_equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        a.image_index == b.image_index
        and all(torch.equal(*pair) for pair in zip(a.tensors(), b.tensors(), strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("kind", ["http", "zip", "tar", "memory", "zip over http"])
def test_the_batches_are_those_of_a_local_folder_also_after_a_resume(tmp_path, recipe, server, kind):
    local = list(batches(recipe))
    match kind:
        case "http":
            address = server.address
        case "zip":
            address = zip_of(server.folder, tmp_path / "a.zip", "in/side")
        case "tar":
            address = tar_of(server.folder, tmp_path / "a.tar")
        case "memory":
            files = {f"/far/{file.name}": file.read_bytes() for file in server.folder.iterdir()}
            fsspec.filesystem("memory").pipe(files)
            address = "memory://far"
        case _:
            zip_of(server.folder, tmp_path / "a.zip")
            (tmp_path / "a.zip").rename(server.folder / "a.zip")
            address = f"zip://::{server.address}/a.zip"
    far = at(recipe, address)
    here, there = (training_set(own.data, masks="all") for own in (recipe, far))
    assert fingerprint(here) == fingerprint(there)
    assert are_equal(list(batches(far)), local)
    assert are_equal(list(batches(far, first=1)), local[2:])  # two groups a step
    assert image_digests(there) == image_digests(here)


def test_with_copies_each_file_is_fetched_once_and_without_them_once_an_epoch(recipe, server):
    local = list(batches(recipe))
    far = at(recipe, server.address)
    assert are_equal(list(batches(far)), local)
    fetched = Counter(own.name for own in server.asked if not own.range)
    assert fetched == {f"{number}.png": 1 for number in range(COUNT)}
    server.asked.clear()
    assert are_equal(list(batches(far)), local)
    assert server.asked == []  # a second start finds headers and copies
    none = at(recipe, server.address, far_cache_gib=0.0)
    assert are_equal(list(batches(none)), local)
    assert len(server.asked) == sum(len(batch.image_index) for batch in local)


def test_copies_that_are_too_few_change_no_batch(tmp_path, recipe, server):
    local = list(batches(recipe))
    size = (server.folder / "0.png").stat().st_size
    far = at(recipe, server.address, far_cache_gib=3 * size / 2**30)
    assert are_equal(list(batches(far)), local)
    assert 0 < sum(file.stat().st_size for file in tmp_path.rglob("*.copy")) <= 3 * size
    assert len(server.asked) > 2 * COUNT


def test_decoded_images_are_cached_as_those_of_local_files_are(tmp_path, recipe, server):
    local = list(batches(recipe))
    far = at(recipe, server.address, cache="decoded", far_cache_gib=0.0)
    assert are_equal(list(batches(far)), local)
    server.asked.clear()
    assert are_equal(list(batches(far)), local)
    assert server.asked == []
    assert [*tmp_path.rglob("*.pixels")]


@pytest.mark.parametrize("kind", ["http", "zip"])
def test_forked_processes_read_what_the_parent_has_opened_and_share_copies(tmp_path, recipe, server, kind):
    far = at(recipe, server.address if kind == "http" else zip_of(server.folder, tmp_path / "a.zip"))
    local = list(batches(recipe))
    dataset = training_set(far.data, masks="all")
    assert are_equal(list(batches(far, dataset=dataset)), local)  # opened here before the fork
    server.asked.clear()
    assert are_equal(list(batches(far, workers=2, dataset=dataset)), local)
    assert server.asked == []
    assert far_content(dataset.image_path(0)) == (server.folder / dataset.file_names[0]).read_bytes()


def test_a_loading_process_tells_the_user_of_a_server_that_fails(recipe, server, caplog):
    far = at(recipe, server.address, far_cache_gib=0.0)
    dataset = training_set(far.data, masks="all")
    server.fault_of = lambda number: 503 if number % 4 == 0 else None
    assert are_equal(list(batches(far, workers=2, dataset=dataset)), list(batches(recipe)))
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{server.address}: the server answers 503: such requests are made again"]


def test_a_changed_file_is_never_read_from_an_old_copy_where_its_server_lists_it(tmp_path, recipe, server):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/changing/{file.name}": file.read_bytes() for file in server.folder.iterdir()})
    far = at(recipe, "memory://changing")
    old = list(batches(far))
    copies = len([*tmp_path.rglob("*.copy")])
    assert copies == COUNT
    changed = (server.folder / "3.png").read_bytes() + b" "  # the same picture, another file
    memory.pipe("/changing/3.png", changed)
    assert are_equal(list(batches(far)), old)
    assert len([*tmp_path.rglob("*.copy")]) == copies + 1
    assert far_content(training_set(far.data, masks="all").image_path(3)) == changed


def _of_rank(world: World, recipe: Recipe) -> tuple[list[Batch], bool]:
    dataset = once_a_host(world, lambda: training_set(recipe.data, masks="all"))
    found = list(batches(recipe, rank=world.rank, ranks=world.size, dataset=dataset))
    world.barrier()
    return found, dataset.image_folder == folder_of(recipe.data.train_images, recipe.data)


@pytest.mark.distributed
def test_two_ranks_share_copies_and_together_have_the_batches_of_one(recipe, server):
    far = at(recipe, server.address)
    whole = list(batches(recipe))
    (first, same_folder), (second, same) = run_in_ranks(_of_rank, 2, far)
    assert same_folder
    assert same
    for batch, *parts in zip(whole, first, second, strict=True):
        assert batch.image_index == tuple(index for part in parts for index in part.image_index)
        assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))
    headers = [own for own in server.asked if own.range]
    assert len(headers) <= 2 * COUNT  # of one rank
    server.asked.clear()
    list(batches(far))
    assert server.asked == []  # what both have fetched


def test_the_copies_of_a_run_lie_in_its_cache_folder(tmp_path, recipe, server):
    list(batches(at(recipe, server.address)))
    assert Path(recipe.data.cache_folder) == tmp_path / "copies"
    assert len([*(tmp_path / "copies/files").glob("??/*.copy")]) == COUNT
