"""Would this merge work? Asked of the recipe, the models' configs, tokenizers and headers, before a tensor is read."""

from mergekit_select.check.check import check
from mergekit_select.check.recipe import ignored_keys
from mergekit_select.inputs.leftovers import remove_leftovers

__all__ = ["check", "ignored_keys", "remove_leftovers"]
