"""The order of the training data: the one thing in which the sub-models of a study differ.

Redrawn: each epoch is a fresh permutation of the samples, cut into batches as it stands, so the composition of the
batches is redrawn with the order. Fixed: the samples are cut into batches once, the same for every order, and each
epoch is a fresh permutation of the batches. One batch of an epoch may be smaller; no sample is ever left out.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, Sampler

from examples.order_study.errors import StudyError
from examples.order_study.settings import Composition
from examples.quickstart.train import permutation


def batches(samples: int, seed: int, epoch: int, batch_size: int, composition: Composition) -> list[list[int]]:
    """The batches of an epoch in the order of a seed, as indices of samples."""
    if composition == "redrawn":
        return _cut(permutation(samples, seed, epoch), batch_size)
    # No neighbours of the file end up in one batch more often than others; no seed of an order is a word.
    fixed = _cut(permutation(samples, "composition", 0), batch_size)
    return [fixed[index] for index in permutation(len(fixed), seed, epoch)]


def places(samples: int, seed: int, epoch: int, batch_size: int, composition: Composition) -> NDArray[np.int64]:
    """[samples] the index of the batch of an epoch that each sample is in."""
    place = np.empty(samples, dtype=np.int64)
    for index, batch in enumerate(batches(samples, seed, epoch, batch_size, composition)):
        place[batch] = index
    return place


class EpochSampler(Sampler[int]):
    """Holds the epoch, which accelerate's data loader tells to the `sampler` of a batch sampler."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._samples))


class OrderedBatches(BatchSampler):
    """Gives the batches in the order of a seed, each in as many pieces as gradients are accumulated over."""

    def __init__(self, samples: int, seed: int, batch_size: int, composition: Composition, pieces: int = 1) -> None:
        self.sampler: EpochSampler = EpochSampler(samples)
        self.batch_size = batch_size // pieces
        self.drop_last = False
        self._arguments = (batch_size, composition)
        self._seed = seed
        self._pieces = pieces
        small = samples % batch_size
        # The Trainer counts pieces, not batches: one too few would move every batch that follows within the epoch.
        if composition == "fixed" and 0 < small < pieces:
            raise StudyError(
                f"a batch of fixed composition must give {pieces} pieces to accumulate gradients over, but the last "
                f"of {samples} samples leave one of {small}: lower gradient_accumulation or change batch_size"
            )

    def __len__(self) -> int:
        full, small = divmod(len(self.sampler), self._arguments[0])
        return full * self._pieces + min(small, self._pieces)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in batches(len(self.sampler), self._seed, self.sampler.epoch, *self._arguments):
            yield from _pieces(batch, self._pieces)


def _cut(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _pieces(batch: list[int], number: int) -> list[list[int]]:
    bounds = [len(batch) * piece // number for piece in range(number + 1)]
    return [batch[start:end] for start, end in itertools.pairwise(bounds) if end > start]
