"""Requests that wait are looked at together, and none spoils another's answer."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest

from app_servers import png, served, three_objects
from megdet.api.images import Pixels
from megdet.app.batcher import Batcher, Found, FullError, TooManyPixelsError
from megdet.detections import Detections
from megdet.errors import InputError

_SECONDS = 60.0


class Held:
    """A detector whose first call waits until it may go on; it notes how bright the images of each call were."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, images: Sequence[Pixels]) -> list[Detections]:
        self.calls.append([int(image.values.max()) for image in images])
        self.begun.set()
        assert self.may_go_on.wait(_SECONDS)
        if any(image.values.max() == 13 for image in images):
            raise RuntimeError("no image of this brightness")
        return three_objects(images)


@pytest.fixture
def held() -> Iterator[Held]:
    own = Held()
    yield own
    own.may_go_on.set()


def ask(batcher: Batcher, content: bytes, run: int = 0) -> Future[Found]:
    with batcher.place() as place:
        return place.submit(run, content)


def wait_for_queue(batcher: Batcher, number: int) -> None:
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: len(batcher._jobs) == number, _SECONDS)


def test_what_waits_is_looked_at_together_up_to_a_number_and_everybody_gets_his_own(held):
    with Batcher([served(held, together=3)]) as batcher:
        asked = [ask(batcher, png(value=100))]
        assert held.begun.wait(_SECONDS)
        for value in (101, 102, 103, 104):
            asked.append(ask(batcher, png(width=value, value=value)))
            wait_for_queue(batcher, len(asked) - 1)
        held.may_go_on.set()
        found = [own.result(_SECONDS) for own in asked]
    assert held.calls == [[100], [101, 102, 103], [104]]
    assert [own.together for own in found] == [1, 3, 3, 3, 1]
    assert [own.detections.size for own in found] == [(30, width) for width in (40, 101, 102, 103, 104)]
    assert (batcher.answered, batcher.calls, batcher.waiting) == (5, 3, 0)


def test_images_for_two_runs_are_never_mixed(held):
    other = Held()
    other.may_go_on.set()
    with Batcher([served(held), served(other, "second")]) as batcher:
        asked = [ask(batcher, png(value=1))]
        assert held.begun.wait(_SECONDS)
        for number, run in enumerate((1, 0, 1), start=2):
            asked.append(ask(batcher, png(value=number), run))
            wait_for_queue(batcher, number - 1)
        held.may_go_on.set()
        assert [own.result(_SECONDS).together for own in asked] == [1, 2, 1, 2]
    assert (held.calls, other.calls) == ([[1], [3]], [[2, 4]])


def test_an_image_on_which_the_detector_fails_does_not_spoil_the_others(held):
    with Batcher([served(held)]) as batcher:
        asked = [ask(batcher, png(value=1))]
        assert held.begun.wait(_SECONDS)
        for number, value in enumerate((12, 13, 14), start=1):
            asked.append(ask(batcher, png(value=value)))
            wait_for_queue(batcher, number)
        held.may_go_on.set()
        with pytest.raises(RuntimeError, match="no image of this brightness"):
            asked[2].result(_SECONDS)
        assert [len(asked[number].result(_SECONDS).detections) for number in (0, 1, 3)] == [3, 3, 3]
    assert held.calls[1:] == [[12, 13, 14], [12], [13], [14]]
    assert batcher.waiting == 0


def test_a_file_that_is_no_image_and_one_that_is_too_large_are_refused_alone(held):
    held.may_go_on.set()
    with Batcher([served(held, pixels=1200)]) as batcher:
        sound, broken, large = (ask(batcher, own) for own in (png(30, 40), b"no image", png(30, 41)))
        with pytest.raises(TooManyPixelsError, match=r"41 x 30 pixels are more than data\.max_pixels 1200"):
            large.result(_SECONDS)
        with pytest.raises(InputError, match="cannot be read as an image"):
            broken.result(_SECONDS)
        assert len(sound.result(_SECONDS).detections) == 3
    assert batcher.waiting == 0


def test_decoded_images_that_wait_have_no_more_pixels_in_all_than_one_may_have(held):
    held.may_go_on.set()
    with Batcher([served(held, together=8, pixels=1200)]) as batcher:
        asked = [ask(batcher, png(30, 40, value)) for value in range(5)]
        assert [own.result(_SECONDS).together for own in asked] == [1] * 5
    assert sorted(held.calls) == [[0], [1], [2], [3], [4]]


def test_an_image_for_which_nobody_waits_any_more_is_left_out(held):
    with Batcher([served(held)]) as batcher:
        first = ask(batcher, png(value=1))
        assert held.begun.wait(_SECONDS)
        gone, last = ask(batcher, png(value=2)), ask(batcher, png(value=3))
        wait_for_queue(batcher, 2)
        assert gone.cancel()
        held.may_go_on.set()
        assert first.result(_SECONDS).together == last.result(_SECONDS).together == 1
    assert held.calls == [[1], [3]]
    assert batcher.waiting == 0


def test_no_more_requests_wait_than_may_and_a_place_is_given_back(held):
    with Batcher([served(held)], most_waiting=2) as batcher:
        first = ask(batcher, png())
        assert held.begun.wait(_SECONDS)
        with batcher.place():  # of a client that sends nothing
            assert batcher.waiting == 2
            with pytest.raises(FullError, match=r"as many requests wait as may \(2\)"), batcher.place():
                pass
        assert batcher.waiting == 1
        held.may_go_on.set()
        first.result(_SECONDS)
    assert batcher.waiting == 0


def test_the_detector_waits_a_moment_for_a_request_on_its_way_and_no_longer(held):
    held.may_go_on.set()
    with Batcher([served(held)], gather_seconds=_SECONDS) as batcher, batcher.place() as place:
        first = ask(batcher, png(value=1))
        wait_for_queue(batcher, 1)
        assert place.submit(0, png(value=2)).result(_SECONDS).together == first.result(_SECONDS).together == 2
    with Batcher([served(held)], gather_seconds=0.01) as batcher, batcher.place():
        assert ask(batcher, png(value=3)).result(_SECONDS).together == 1
