"""Is an output, bit for bit, what its recipe says? Derives every tensor again and compares."""

from mergekit_select.planner.determinism import Determinism, determinism
from mergekit_select.verification.comparison import Difference
from mergekit_select.verification.verify import Verification, verify

__all__ = ["Determinism", "Difference", "Verification", "determinism", "verify"]
