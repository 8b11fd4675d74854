"""Which bits? Draws, slots, and the kernels that copy each element of a merged tensor from where they say.

This room never imports mergekit. ``draws`` and ``slots`` are what ``docs/draws.md`` specifies and freezes, ``plan`` is
what decides the bits of one tensor, ``kernel_c`` and ``kernel_torch`` are the two ways to carry it out.
"""

from mergekit_select.selection.draws import draw
from mergekit_select.selection.merge import Drawn, drawn, kernel_name, resample, select

__all__ = ["Drawn", "draw", "drawn", "kernel_name", "resample", "select"]
