"""What a merge must hold, from the bytes of its inputs: a reader of safetensors, and both methods in numpy.

Shares no code with the package, nor with torch, safetensors, transformers or mergekit. Draws and slots are those of
reference.py; what is done with them is written again, for whole tensors, and compared with reference.py in
test_architectures.py.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tests import reference

UNSIGNED = {"BOOL": "u1", "U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1", "BF16": "<u2", "F16": "<u2", "F32": "<u4"}
UNSIGNED |= {"I64": "<u8", "F64": "<u8"}
NOT_DRAWN = {"BOOL", "U8", "I64"}  # mergekit's business: copied where all agree

Integers = npt.NDArray[Any]
Weights = Callable[[str], Sequence[float]]


class Stored(NamedTuple):
    """A tensor as it lies in a file: the name of its dtype, its shape, and its elements' bits in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    bits: Integers


def read_file(file: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file: eight bytes of header length, the header in JSON, then the data."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {
        name: Stored(
            entry["dtype"],
            tuple(entry["shape"]),
            np.frombuffer(data[slice(*entry["data_offsets"])], UNSIGNED[entry["dtype"]]),
        )
        for name, entry in header.items()
    }


def read(folder: Path) -> dict[str, Stored]:
    """All tensors of a checkpoint, each of which lies in one shard, the one that the index names."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return read_file(folder / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {shard: read_file(folder / shard) for shard in set(weight_map.values())}
    assert sum(map(len, shards.values())) == len(weight_map)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def draws(seed: int, name: str, draw_round: int, count: int) -> Integers:
    """The first draws of a stream, as docs/draws.md has them."""
    with np.errstate(over="ignore"):
        z = np.arange(1, (count + 3) // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(reference.stream_key(seed, name, draw_round))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    quarters = (z[:, None] >> np.array([0, 16, 32, 48], np.uint64)) & np.uint64(0xFFFF)
    return (quarters.reshape(-1)[:count] ^ np.uint64(0x8000)).astype(np.int64)


def _choose(drawn: Integers, counts: Integers, among: Integers) -> Integers:
    """For each element the sub-model chosen among those that are True in its column of `among`."""
    reached = np.cumsum(counts[:, None] * among, axis=0)
    chosen: Integers = np.argmax(reached > (drawn * reached[-1] >> 16)[None], axis=0)
    return chosen


def merge(
    models: Sequence[Integers],
    base: Integers | None = None,
    *,
    weights: Sequence[float] | None = None,
    rounds: int | None = None,
    seed: int = 0,
    name: str = "",
) -> Integers:
    """The merged elements; arguments as in reference.merge, bits as unsigned integers."""
    stacked = np.stack(models)
    elements = np.arange(stacked.shape[1])
    counts = np.array(reference.slots(list(weights or [1.0] * len(models))))
    everyone = np.repeat(counts[:, None] > 0, len(elements), axis=1)
    drawn = draws(seed, name, 0, len(elements))
    if base is None:
        return stacked[_choose(drawn, counts, everyone), elements]
    if rounds is None or rounds >= int((counts > 0).sum()) - 1:
        differing = everyone & (stacked != base)
        return np.where(differing.any(axis=0), stacked[_choose(drawn, counts, differing), elements], base)
    left = everyone.copy()
    chosen = _choose(drawn, counts, left)
    for draw_round in range(1, rounds + 1):
        left[chosen, elements] = False
        again = _choose(draws(seed, name, draw_round, len(elements)), counts, left)
        chosen = np.where(stacked[chosen, elements] == base, again, chosen)
    return stacked[chosen, elements]


def expected(
    subs: Iterable[Mapping[str, Stored]],
    base: Mapping[str, Stored] | None = None,
    *,
    weights: Weights | None = None,
    rounds: int | None = None,
    seed: int = 0,
) -> dict[str, Stored]:
    """Every tensor of a merge of checkpoints that have the same tensors; `weights` tells those of a tensor."""
    subs = list(subs)
    result = {}
    for name, first in subs[0].items():
        bits = first.bits
        if first.dtype not in NOT_DRAWN:
            bits = merge(
                [sub[name].bits for sub in subs],
                base[name].bits if base is not None else None,
                weights=weights(name) if weights else None,
                rounds=rounds,
                seed=seed,
                name=name,
            )
        result[name] = Stored(first.dtype, first.shape, bits)
    return result


def assert_same(found: Mapping[str, Stored], wanted: Mapping[str, Stored]) -> None:
    """The same tensors, dtypes, shapes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name][:2] == tensor[:2], name
        assert np.array_equal(found[name].bits, tensor.bits), name


def assert_taken_from(found: Mapping[str, Stored], candidates: Sequence[Mapping[str, Stored]]) -> None:
    """Every element has the bits that one of the candidates has at the same place."""
    for name, tensor in found.items():
        same = [tensor.bits == model[name].bits for model in candidates]
        assert np.all(np.any(same, axis=0)), name
