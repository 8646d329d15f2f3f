import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from megdet.errors import InputError
from megdet.inference.predict import detect_batch, detect_dataset
from megdet.inference.side_by_side import given_up_early, shares, side_by_side, threads_for
from megdet.inference.trained import place_model
from megdet.memory import is_out_of_memory
from megdet.model.choice import make_detector
from megdet.recipe_file import load_recipe
from megdet.runtime import operations_on_one_thread, usable_threads
from megdet.structures import BatchDetections
from small_runs import ALONE, CPU, val_set, write_small_set


@contextmanager
def threads_of_process(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_detections_have_the_same_bits_on_any_number_of_threads(tmp_path):
    write_small_set(tmp_path, "val", 10)
    data = {"data.val_annotations": str(tmp_path / "val.json"), "data.val_images": str(tmp_path / "val")}
    scales = {"evaluation.scales": (48, 64), "model.box_head.score_threshold": 0.1}
    # of its usual size, since oneDNN splits the sums of large layers only
    recipe = load_recipe("demo", {**data, **scales})
    torch.manual_seed(0)
    model = make_detector(recipe, 3)
    place_model(model, CPU, recipe.precision)
    found = []
    for count in (1, 2, 3):
        with threads_of_process(count):
            found.append(detect_dataset(model, recipe, val_set(recipe), [10, 20, 30], ALONE, workers=0))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) > 100


@pytest.mark.parametrize(
    ("images", "canvas", "sizes"),
    [(8, (64, 64), [8]), (8, (224, 224), [2, 2, 2, 2]), (3, (224, 224), [2, 1]), (3, (800, 1344), [1, 1, 1])],
)
def test_a_share_of_a_batch_has_about_as_many_pixels_whatever_its_canvas(images, canvas, sizes):
    found = shares(images, canvas)
    assert [len(range(images)[own]) for own in found] == sizes
    assert [image for own in found for image in range(images)[own]] == list(range(images))


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items_from_operations_on_one_thread(threads):
    def born_later() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    with threads_of_process(2):
        results = side_by_side(lambda item: (item, torch.get_num_threads()), range(20), threads)
        assert next(results) == (0, 1 if threads else 2)
        assert (torch.get_num_threads(), born_later()) == (2, 2)
        assert list(results) == [(item, 1 if threads else 2) for item in range(1, 20)]
        assert (torch.get_num_threads(), born_later()) == (2, 2)


def test_so_many_items_are_computed_at_once_and_few_more_are_taken():
    barrier, taken, left = threading.Barrier(2, timeout=60), [], []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        barrier.wait()  # none would come through alone
        left.append(item)
        return item

    for item in side_by_side(work, items(), 2):
        assert len(taken) <= item + 6
    assert sorted(left) == list(range(20))


def test_what_an_item_raises_is_raised_and_those_that_wait_are_not_begun():
    begun = []

    def work(item: int) -> None:
        begun.append(item)
        raise InputError(f"item {item}")

    with pytest.raises(InputError, match="item 0"):
        list(side_by_side(work, range(50), 1))
    assert len(begun) < 50


def test_the_threads_of_a_process_are_known_also_where_operations_have_one():
    with threads_of_process(3):
        with operations_on_one_thread(), operations_on_one_thread():
            assert (torch.get_num_threads(), usable_threads()) == (1, 3)
        assert torch.get_num_threads() == usable_threads() == 3


def test_a_batch_given_at_once_has_the_detections_of_its_shares():
    recipe = load_recipe("demo", {"model.box_head.score_threshold": 0.15})
    torch.manual_seed(0)
    model = make_detector(recipe, 3)
    place_model(model, CPU, recipe.precision)
    pixels, sizes = torch.randint(0, 256, (3, 3, 256, 320), dtype=torch.uint8), torch.tensor([[256, 320]] * 3)
    with threads_of_process(2):
        found = detect_batch(model, pixels, sizes, recipe.precision)
    alone = [detect_batch(model, pixels[own], sizes[own], recipe.precision) for own in shares(3, (256, 320))]
    assert len(alone) == 3
    for place, expected in enumerate(alone):
        assert torch.equal(found.labels[place : place + 1], expected.labels)
        torch.testing.assert_close(found.boxes[place : place + 1], expected.boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.scores[place : place + 1], expected.scores, rtol=1e-4, atol=1e-5)


def test_batches_of_detections_that_differ_in_length_are_joined_by_empty_rows():
    one = BatchDetections(torch.ones(1, 2, 4), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.int64))
    two = BatchDetections(torch.ones(2, 3, 4), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64))
    joined = BatchDetections.of_batches([one, two])
    assert joined.labels.tolist() == [[0, 0, -1], [0, 0, 0], [0, 0, 0]]
    assert (joined.boxes.shape, joined.scores[0].tolist(), joined.masks) == ((3, 3, 4), [1, 1, 0], None)


@pytest.mark.parametrize(
    ("canvas", "batch_size", "threads"), [((320, 320), 1, 6), ((800, 800), 4, 4), ((800, 800), 9, 6)]
)
def test_large_images_are_at_most_a_batch_at_a_time(canvas, batch_size, threads):
    with threads_of_process(6):
        assert threads_for(canvas, batch_size) == threads


class Slow(nn.Module):
    """Notes when it is computed; the first time it lets the caller of the threads go on."""

    def __init__(self, is_reached: threading.Event, may_go_on: threading.Event) -> None:
        super().__init__()
        self.is_reached, self.may_go_on, self.count = is_reached, may_go_on, 0

    def forward(self, x: int) -> int:
        self.count += 1
        self.is_reached.set()
        assert self.may_go_on.wait(60)
        return x


def test_what_is_in_work_is_given_up_at_the_next_layer_where_nobody_waits_for_it():
    is_reached, may_go_on = threading.Event(), threading.Event()
    model = nn.Sequential(*(Slow(is_reached, may_go_on) for _ in range(3)))

    def items() -> Iterator[int]:
        yield 0
        assert is_reached.wait(60)
        threading.Timer(0.2, may_go_on.set).start()
        raise KeyboardInterrupt

    with given_up_early(model), pytest.raises(KeyboardInterrupt):
        list(side_by_side(model, items(), 1))
    assert [layer.count for layer in model] == [1, 0, 0]
    assert model(3) == 3, "another call is not given up"


def test_a_model_that_is_trained_meanwhile_trains_again_after_the_last_of_several_threads():
    recipe = load_recipe("demo", {"model.box_head.score_threshold": 0.15})
    torch.manual_seed(0)
    model = make_detector(recipe, 3)
    place_model(model, CPU, recipe.precision)
    model.eval()
    pixels, sizes = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), torch.tensor([[64, 64]])
    expected = detect_batch(model, pixels, sizes, recipe.precision)
    model.train()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: detect_batch(model, pixels, sizes, recipe.precision), range(9)))
    assert all(own.labels.tolist() == expected.labels.tolist() for own in found)
    assert all(module.training for module in model.modules())


def test_a_thread_that_cannot_be_started_is_an_error_and_no_wait(monkeypatch):
    start, count = threading.Thread.start, []

    def start_one(thread: threading.Thread) -> None:
        count.append(thread)
        if len(count) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="can't start new thread") as error:
        list(side_by_side(lambda item: item, range(5), 3))
    assert is_out_of_memory(error.value)


def test_a_thread_that_cannot_begin_is_an_error_and_no_wait(monkeypatch):
    def no_memory(*_: object) -> torch.Tensor:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "zeros", no_memory)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(side_by_side(lambda item: item, range(5), 3))


def test_an_interrupt_while_threads_begin_ends_them(monkeypatch):
    class Interrupted(threading.Barrier):
        def wait(self, timeout: float | None = None) -> int:
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr("megdet.inference.side_by_side.Barrier", Interrupted)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        list(side_by_side(lambda item: item, range(5), 3))
    assert torch.get_num_threads() == number_of_a_new_thread() == before


def number_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_later_threads_keep_their_number_though_several_detect_at_once():
    with threads_of_process(3):
        for _ in range(5):
            with ThreadPoolExecutor(6) as pool:
                list(pool.map(lambda _: list(side_by_side(lambda item: item, range(4), 2)), range(12)))
            assert torch.get_num_threads() == number_of_a_new_thread() == 3


def test_the_first_item_is_asked_for_before_there_are_threads():
    before = threading.active_count()

    def items() -> Iterator[int]:
        yield threading.active_count()

    assert list(side_by_side(lambda item: item, items(), 2)) == [before]


def test_memory_that_does_not_suffice_for_a_data_set_is_said_in_one_line(tmp_path, monkeypatch):
    write_small_set(tmp_path, "val", 3)
    data = {"data.val_annotations": str(tmp_path / "val.json"), "data.val_images": str(tmp_path / "val")}
    recipe = load_recipe("demo", data)
    model = make_detector(recipe, 3)
    place_model(model, CPU, recipe.precision)

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    before = [module.training for module in model.modules()]
    monkeypatch.setattr(model.backbone, "forward", no_memory)
    with pytest.raises(InputError, match=r"not suffice .* on cpu: lower evaluation.batch_size, or give fewer threads"):
        detect_dataset(model, recipe, val_set(recipe), [10, 20, 30], ALONE, workers=0)
    assert [module.training for module in model.modules()] == before
    assert any(before)
