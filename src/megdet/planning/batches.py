"""Which batch sizes pay, by the gradient noise scale (McCandlish et al., 2018, Sec. 2.3 and 2.4)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchWorth:
    """A mini-batch compared with the gradient noise scale B_noise, both in images, at a rate tuned for the batch.

    S(B) = S_min (1 + B_noise / B) steps and E(B) = E_min (1 + B / B_noise) images reach the same loss.
    """

    batch_size: int
    noise_scale: float

    @property
    def steps(self) -> float:
        """Steps to the same loss, as a multiple of the fewest possible."""
        return 1 + self.noise_scale / self.batch_size

    @property
    def examples(self) -> float:
        """Images to the same loss, and so the work, as a multiple of the fewest possible."""
        return 1 + self.batch_size / self.noise_scale

    @property
    def pays(self) -> bool:
        """Whether it is at most the noise scale: then the work is at most twice the least."""
        return self.batch_size <= self.noise_scale
