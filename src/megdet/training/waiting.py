"""How long a step waits for its images."""

import time
from collections.abc import Iterator

from megdet.structures import Batch


class Waiting:
    """Iterates over batches and adds up the time spent waiting for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            started = time.perf_counter()
            batch = next(self.batches, None)
            self.seconds += time.perf_counter() - started
            if batch is None:
                return
            yield batch
