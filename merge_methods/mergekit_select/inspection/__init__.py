"""What would be taken from where? Counts of what the sub-models changed and of what a merge would select."""

from mergekit_select.inspection.inspect import Inspection, TensorTally, inspect

__all__ = ["Inspection", "TensorTally", "inspect"]
