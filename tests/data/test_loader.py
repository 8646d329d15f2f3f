import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from factories import with_model
from megdet.data import batches as batches_module
from megdet.data import loader
from megdet.data.annotations import AnnotationTable
from megdet.data.loader import LoadingFaults, group_batches, training_batches
from megdet.data.plan import TrainingPlan, evaluation_plan
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.structures import Batch
from small_runs import CPU, small_recipe, train_set, val_set, write_small_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    folder: Path = tmp_path_factory.mktemp("loader")
    write_small_set(folder, "train", 10)
    write_small_set(folder, "val", 5, seed=1)
    recipe = small_recipe(folder)
    return replace(recipe, data=replace(recipe.data, color_jitter=0.3))


def batches(
    recipe: Recipe,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    width: int | None = None,
    faults: LoadingFaults | None = None,
) -> list[Batch]:
    dataset = train_set(recipe, with_masks=True)
    plan = TrainingPlan(dataset.sizes, recipe)
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, ranks, width)
    return list(training_batches(dataset, plan, layout, rank, (1, 4), workers=workers, device=CPU, faults=faults))


def same(ours: Batch, theirs: Batch) -> bool:
    pairs = list(zip(ours.tensors(), theirs.tensors(), strict=True))
    return ours.image_index == theirs.image_index and all(torch.equal(a, b) for a, b in pairs)


def test_batches_come_in_the_order_of_the_plan(recipe):
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    planned = [group for step in range(1, 4) for group in plan.groups(step)]
    found = batches(recipe)
    assert [batch.image_index for batch in found] == [tuple(i.index for i in group.images) for group in planned]
    assert [tuple(batch.pixels.shape[2:]) for batch in found] == [group.canvas for group in planned]
    assert [b.targets.image_seeds.tolist() for b in found] == [[i.seed for i in group.images] for group in planned]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_batches_of_one_process(recipe, workers):
    alone, shared = batches(recipe), batches(recipe, workers)
    assert all(batch.targets.masks.bits.any() for batch in shared)
    assert len(alone) == len(shared) == 6
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))
    assert not same(alone[0], alone[1])


def test_shares_of_a_lane_are_slices_of_its_groups_on_the_same_canvas(recipe):
    whole = batches(recipe)
    shares = [batches(recipe, rank=rank, ranks=3, width=3) for rank in range(3)]
    for number, batch in enumerate(whole):
        parts = [own[number] for own in shares]
        assert sorted(len(part.pixels) for part in parts) == [1, 1, 2]
        assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
        assert torch.equal(torch.cat([part.sizes for part in parts]), batch.sizes)
        assert torch.cat([p.targets.image_seeds for p in parts]).tolist() == batch.targets.image_seeds.tolist()


def test_a_rank_without_an_image_gets_empty_batches(recipe):
    recipe = with_model(replace(recipe, bn_size=0, group_size=2), fpn={"norm": "none"})
    shares = [batches(recipe, rank=rank, ranks=3, width=3) for rank in range(3)]
    assert sorted(sum(len(batch.pixels) for batch in share) for share in shares) == [0, 12, 12]
    assert [len(share) for share in shares] == [12, 12, 12]


def test_an_idle_lane_has_no_batches(recipe):
    assert batches(recipe, workers=1, rank=2, ranks=3, width=1) == []


def test_what_a_loading_process_gets_is_a_copy_that_makes_the_same_batches(recipe):
    plan = TrainingPlan(train_set(recipe).sizes, recipe)
    plan.groups(0)  # fill the caches, which cannot be pickled
    shares = loader._TrainingShares(train_set(recipe), plan, slice(1, 3))
    copy = pickle.loads(pickle.dumps(shares))
    assert all(same(copy[key].batch, shares[key].batch) for key in ((0, 0), (2, 1)))


def test_what_a_loading_process_gets_is_small_for_a_data_set_of_the_size_of_coco(recipe):
    images, boxes = 118_287, 860_001
    counts = np.bincount(np.arange(boxes) % images, minlength=images)
    table = AnnotationTable(
        counts,
        np.zeros((boxes, 4), np.float32),
        np.zeros(boxes, np.int64),
        np.zeros(boxes, np.bool_),
        np.zeros(boxes, np.float32),
        np.arange(boxes),
    )
    dataset = replace(
        train_set(recipe),
        annotations=table,
        image_ids=tuple(range(images)),
        file_names=tuple(f"{number:012}.jpg" for number in range(images)),
        sizes=np.full((images, 2), 480),
    )
    plan = TrainingPlan(dataset.sizes, recipe)
    size = len(pickle.dumps(loader._TrainingShares(dataset, plan, slice(0, 2)), pickle.HIGHEST_PROTOCOL))
    assert size < boxes * 38 + images * 48, "the columns once, the names once, the sizes once"


def test_processes_of_a_gpu_come_from_a_server_that_never_used_it():
    assert loader._start_method(torch.device("cuda")) == "forkserver"
    assert loader._start_method(CPU) is None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_processes_make_the_same_batches_however_they_start(recipe, monkeypatch, method):
    alone = batches(recipe)
    monkeypatch.setattr(loader, "_start_method", lambda _: method)
    assert all(same(a, b) for a, b in zip(alone, batches(recipe, 2), strict=True))


def test_evaluation_batches_are_whole_groups_without_colour_jitter(recipe):
    dataset = val_set(recipe)
    plan = evaluation_plan(dataset.sizes, recipe)
    plain = list(group_batches(dataset, plan, workers=0, device=CPU))
    assert [batch.image_index for batch in plain] == [tuple(i.index for i in group.images) for group in plan]
    assert all(same(a, b) for a, b in zip(plain, group_batches(dataset, plan, workers=2, device=CPU), strict=True))
    calm = replace(recipe, data=replace(recipe.data, color_jitter=0.0))
    assert all(
        same(a, b) for a, b in zip(plain, group_batches(val_set(calm), plan, workers=0, device=CPU), strict=True)
    )


def test_no_groups_are_no_batches_whatever_the_workers(recipe):
    assert list(group_batches(val_set(recipe), [], workers=2, device=CPU)) == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["none", "decoded"])
def test_a_file_that_changes_after_its_header_was_read_is_named_with_what_to_do(tmp_path, workers, kind):
    write_small_set(tmp_path, "train", 8)
    recipe = small_recipe(tmp_path)
    recipe = cached(recipe, tmp_path / "cache", kind)
    dataset = train_set(recipe)
    plan = TrainingPlan(dataset.sizes, recipe)
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, 1)
    file, (height, width) = tmp_path / "train" / "5.png", dataset.sizes[5].tolist()
    mend = rf"put a sound image of {width} x {height} pixels in its place and give the same command again; .* replace"
    whole = file.read_bytes()
    for content, fault in (
        (whole[:200], "cannot be read as an image"),
        ((tmp_path / "train" / "4.png").read_bytes(), rf"the file is \d+ x \d+ pixels now, it was {width} x {height}"),
        (None, "no such image file"),
    ):
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(InputError, match=rf"5\.png: {fault}.*{mend}") as caught:
            list(training_batches(dataset, plan, layout, 0, (0, 2), workers=workers, device=CPU))
        assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    assert len(list(training_batches(dataset, plan, layout, 0, (0, 2), workers=workers, device=CPU))) == 4


def killing(recipe: Recipe, times: int, count: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes that load a batch of step 2 be killed, so often."""
    parent, real = os.getpid(), loader.load_batch

    def load_batch(dataset, images, *more):
        if images[0].seed == dying and os.getpid() != parent and len(count.read_text()) < times:
            with count.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(dataset, images, *more)

    count.write_text("")
    dying = TrainingPlan(train_set(recipe).sizes, recipe).groups(2)[0].images[0].seed
    monkeypatch.setattr(loader, "load_batch", load_batch)
    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(batches_module, "LOOK_SECONDS", 0.5)


def test_a_loading_process_that_is_killed_is_started_anew_and_its_batches_are_the_same(
    recipe, tmp_path, monkeypatch, caplog
):
    expected, faults, handler = batches(recipe), LoadingFaults(), signal.getsignal(signal.SIGCHLD)
    killing(recipe, 2, tmp_path / "count", monkeypatch)
    found = batches(recipe, 2, faults=faults)
    assert [same(a, b) for a, b in zip(expected, found, strict=True)] == [True] * len(expected)
    assert faults.restarts == 2
    assert [record.message.partition(", ")[2] for record in caplog.records] == [
        "which loads images, was ended by SIGKILL: its batches are loaded again by a new one"
    ] * 2
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_batch_whose_loading_process_is_killed_each_time_is_given_up_in_one_line(recipe, tmp_path, monkeypatch):
    killing(recipe, 9, tmp_path / "count", monkeypatch)
    with pytest.raises(InputError, match=r"^process \d+, which .* by SIGKILL, and loading was started anew 3 times"):
        batches(recipe, 1)


def test_a_killed_process_that_has_closed_its_files_and_is_not_gone_yet_is_known_as_dead():
    def dying():
        os.closerange(3, 4096)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    def items():
        raise ConnectionResetError("what the receiver of a batch sees")
        yield

    process = multiprocessing.get_context("fork").Process(target=dying)
    process.start()
    with pytest.raises(batches_module._DeadProcessError, match="was ended by SIGKILL"):
        batches_module._next(items(), [process])


@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_a_slow_batch_is_waited_for_and_one_that_never_comes_is_not(recipe, monkeypatch, seconds):
    real = loader.load_batch

    def load_batch(*arguments):
        time.sleep(seconds)
        return real(*arguments)

    monkeypatch.setattr(loader, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(batches_module, "LONGEST_WAIT", 600.0 if seconds == 1 else 1.0)
    expected = batches(recipe)
    monkeypatch.setattr(loader, "load_batch", load_batch)
    if seconds == 1:
        assert all(same(a, b) for a, b in zip(expected, batches(recipe, 2), strict=True))
    else:
        with pytest.raises(
            InputError, match=r"no batch has come from the loading processes for 1 seconds, though they"
        ):
            batches(recipe, 2)


@pytest.mark.parametrize("kept_free", [0.0, 1e18], ids=["full when it is written", "seen to be full"])
def test_batches_go_through_pipes_where_the_shared_memory_is_full(recipe, monkeypatch, caplog, kept_free):
    def full(_tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    expected = batches(recipe)
    monkeypatch.setattr(batches_module, "_KEPT_FREE", kept_free)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    found = batches(recipe, 2)
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert all(a.pixels.stride() == b.pixels.stride() for a, b in zip(expected, found, strict=True))
    (line,) = [record.message for record in caplog.records]
    assert "has no room for the batches" in line
    assert "--shm-size" in line


SMALL_SHARED_MEMORY = """
mount -t tmpfs -o size=64m tmpfs /dev/shm || exit 77
exec "$@"
"""
LARGE_BATCHES = """
import sys
from dataclasses import replace
from pathlib import Path
from small_runs import small_recipe
from test_loader import batches
recipe = small_recipe(Path(sys.argv[1]))
recipe = replace(recipe, bn_size=8, data=replace(recipe.data, short_edges=(1000,), max_long_edge=1333))
for batch in batches(recipe, workers=2):
    print(batch.pixels.numel() > 20_000_000, int(batch.pixels.min()) == 0)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_large_batches_arrive_in_a_container_with_64_mb_of_shared_memory(tmp_path):
    write_small_set(tmp_path, "train", 16, same_size=True)
    command = ["unshare", "--mount", "sh", "-c", SMALL_SHARED_MEMORY, "sh", sys.executable, "-c", LARGE_BATCHES]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [*command, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("only the administrator of a machine can give a process another /dev/shm")
    assert done.stdout.split() == ["True"] * 6, done.stderr
    assert "has no room for the batches" in done.stderr
    assert "Traceback" not in done.stderr


def cached(recipe: Recipe, folder: Path, kind: str, **changes) -> Recipe:
    data = replace(recipe.data, short_edges=(48,), cache=kind, cache_folder=str(folder), **changes)
    return replace(recipe, data=data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["decoded", "resized"])
def test_batches_are_the_same_bits_with_and_without_a_cache(recipe, tmp_path, kind, workers, caplog):
    plain = batches(cached(recipe, tmp_path, "none"))
    kept = cached(recipe, tmp_path / "cache", kind)
    assert not (tmp_path / "cache").exists()
    for _ in range(2):  # the first run fills the cache, the second reads it
        assert all(same(a, b) for a, b in zip(plain, batches(kept, workers), strict=True))
    files = list((tmp_path / "cache").rglob("*"))
    assert sum(file.suffix == ".pixels" for file in files) == len({i for b in plain for i in b.image_index})
    assert {file.suffix for file in files if file.is_file()} == {".pixels"}, "nothing half written is left"
    assert not caplog.records


def test_a_fault_of_the_cache_is_said_once_whatever_the_processes(recipe, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    plain = batches(cached(recipe, tmp_path, "none"))
    kept = cached(recipe, tmp_path / "file", "decoded")
    assert all(same(a, b) for a, b in zip(plain, batches(kept, 2), strict=True))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no more images can be cached" in caplog.text
