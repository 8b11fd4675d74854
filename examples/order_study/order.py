"""The order of the training data: the one thing in which the sub-models of a study differ.

Each epoch is a fresh permutation of the samples, cut into batches as it stands, so the composition of the
batches is redrawn with the order. The last batch of an epoch may be smaller; no sample is ever left out.
"""

import hashlib
from collections.abc import Iterator

from torch.utils.data import Sampler


def permutation(samples: int, seed: int, epoch: int) -> list[int]:
    """The order of `samples` samples in an epoch, counted from 0.

    Sorted by a hash, hence the same on every machine and with every version of every library.
    """

    def key(index: int) -> bytes:
        return hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()

    return sorted(range(samples), key=key)


class OrderSampler(Sampler[int]):
    """Gives the samples in the order of a seed; accelerate's data loader tells it which epoch begins."""

    def __init__(self, samples: int, seed: int) -> None:
        self._samples = samples
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        return iter(permutation(self._samples, self._seed, self._epoch))
