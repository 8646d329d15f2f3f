import threading
import time
from concurrent.futures import ThreadPoolExecutor

from megdet.data.room import Room


def test_images_are_decoded_together_only_as_far_as_their_pixels_allow():
    room, inside, most = Room(100), [], []
    lock = threading.Lock()

    def decode(pixels):
        with room.taken(pixels):
            with lock:
                inside.append(pixels)
                most.append(list(inside))
            time.sleep(0.002)
            with lock:
                inside.remove(pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, [40, 50, 30, 300, 20, 100, 60, 70, 10] * 5))
    assert all(sum(together) <= 100 or together == [300] for together in most)
    assert any(len(together) > 1 for together in most)
    assert len(most) == 45
