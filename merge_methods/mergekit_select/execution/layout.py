"""Where every byte of the output goes, decided before anything is computed: files, headers, parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from mergekit_select.inputs.checkpoint import DTYPES
from mergekit_select.planner.writing import WrittenTensor, filled

_PART = 128 << 20  # bytes of a part, of which a process writes one at a time, unless a single tensor has more
_RANK = {torch_name: rank for rank, (torch_name, _) in enumerate(DTYPES.values())}
_CODE = {torch_name: code for code, (torch_name, _) in DTYPES.items()}


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file of the output.

    Attributes:
        name: As mergekit names it.
        tensors: In mergekit's order.
    """

    name: str
    tensors: Sequence[WrittenTensor]

    @cached_property
    def _table(self) -> tuple[bytes, Mapping[str, int], int]:
        """Header, where each tensor begins, and the file's size, as ``safetensors.torch.save_file`` makes them."""
        order = sorted(self.tensors, key=lambda t: (-_RANK[t.stored.dtype], t.planned.name))
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, starts = 0, {}
        for tensor in order:
            starts[tensor.planned.name] = end
            offsets = [end, end := end + tensor.stored.nbytes]
            dtype = _CODE[tensor.stored.dtype]
            entries[tensor.planned.name] = {"dtype": dtype, "shape": tensor.stored.shape, "data_offsets": offsets}
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end

    @property
    def header(self) -> bytes:
        """What stands before the tensors."""
        return self._table[0]

    @property
    def starts(self) -> Mapping[str, int]:
        """Where each tensor begins."""
        return self._table[1]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._table[2]


@dataclass(frozen=True)
class Part:
    """Neighbours in mergekit's order in one file: what is computed, written and recorded in one go.

    Attributes:
        number: Its place among all parts.
        file: Where it lies.
        tensors: In mergekit's order.
    """

    number: int
    file: OutputFile
    tensors: Sequence[WrittenTensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.stored.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Layout:
    """The whole output.

    Attributes:
        files: In order.
        parts: In order; each file's stand together.
    """

    files: Sequence[OutputFile]
    parts: Sequence[Part]

    @property
    def index(self) -> dict[str, object] | None:
        """The content of the index that mergekit writes; None where there is a single file."""
        if len(self.files) == 1:
            return None
        size = sum(tensor.stored.nbytes for file in self.files for tensor in file.tensors)
        weight_map = {tensor.planned.name: file.name for file in self.files for tensor in file.tensors}
        # mergekit writes this version whatever its own is.
        return {"metadata": {"total_size": size, "mergekit_version": "0.1.5"}, "weight_map": weight_map}

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def peak(self) -> int:
        """Bytes of the inputs and the result of the largest tensor."""
        return max(tensor.read + tensor.stored.nbytes for part in self.parts for tensor in part.tensors)


def lay_out(tensors: Sequence[WrittenTensor], shard_size: int) -> Layout:
    """Place tensors as mergekit's ``TensorWriter`` does.

    Args:
        tensors: In mergekit's order; at least one.
        shard_size: Most bytes of the tensors in a file that holds more than one; 0 or less for no bound.
    """
    shards = list(filled(tensors, shard_size, _size))
    files: list[OutputFile] = []
    parts: list[Part] = []
    for number, shard in enumerate(shards, start=1):
        name = "model" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}"
        file = OutputFile(f"{name}.safetensors", shard)
        files.append(file)
        for group in filled(shard, _PART, _size):
            parts.append(Part(len(parts), file, group))
    return Layout(files, parts)


def _size(tensor: WrittenTensor) -> int:
    return tensor.stored.nbytes
