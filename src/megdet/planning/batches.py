"""Which batch sizes pay, by the gradient noise scale (McCandlish et al., 2018, Sec. 2.3 and 2.4)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchWorth:
    """A mini-batch against its gradient noise scale B_noise, both in images, at a rate that is tuned for the batch.

    S(B) = S_min (1 + B_noise / B) steps and E(B) = E_min (1 + B / B_noise) images reach the same loss.
    """

    batch_size: int
    noise_scale: float

    @property
    def steps(self) -> float:
        """Times the fewest steps for the same progress."""
        return 1 + self.noise_scale / self.batch_size

    @property
    def examples(self) -> float:
        """Times the fewest images for the same progress, and with them the work."""
        return 1 + self.batch_size / self.noise_scale

    @property
    def pays(self) -> bool:
        """Whether it is at most the noise scale: up to there twice the least work is done at most."""
        return self.batch_size <= self.noise_scale
