"""Write draws to stdout without end, as 16-bit words, for programs that test random numbers.

    python benchmarks/raw_draws.py tensor | dieharder -a -g 200

``tensor`` is the stream of one tensor. The others go through their streams element by element, so that two draws which
follow each other are those of one element under neighbouring seeds, names of layers, or rounds. docs/draws.md has
results.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

import torch

from mergekit_select.selection.draws import lowered_draws, stream_key

CHUNK = 1 << 16  # draws of a stream that are computed at once
TENSOR = "model.layers.{}.mlp.up_proj.weight"

KEYS: dict[str, Callable[[int], int]] = {
    "seeds": lambda i: stream_key(i, TENSOR.format(0)),
    "layers": lambda i: stream_key(0, TENSOR.format(i)),
    "rounds": lambda i: stream_key(0, TENSOR.format(0), i),
}


def chunk(keys: list[int], start: int, length: int) -> bytes:
    """Return draws ``start`` to ``start + length`` of all streams: the streams' first ones, then their second ones."""
    streams = torch.stack([lowered_draws(key, start, start + length) for key in keys])
    return streams.t().contiguous().numpy().tobytes()


def main() -> None:
    """Write until nobody reads on, or as many bytes as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["tensor", *KEYS])
    parser.add_argument("--streams", type=int, default=64, help="how many are neighbours (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the one tensor (default: 0)")
    parser.add_argument("--bytes", type=int, help="stop after at least so many (default: never)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.which == "tensor":
        keys = [stream_key(asked.seed, TENSOR.format(0))]
    else:
        keys = [KEYS[asked.which](i) for i in range(asked.streams)]
    start = 0
    try:
        while asked.bytes is None or 2 * start * len(keys) < asked.bytes:
            sys.stdout.buffer.write(chunk(keys, start, CHUNK))
            start += CHUNK
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
