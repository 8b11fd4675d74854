"""From what, exactly? Locks and records of merges, what reproduces them, and what publishes them.

The formats are in-toto's and SLSA's (``statement``); docs/provenance.md describes every field.
"""

from mergekit_select.inputs.digests import Digests, default_store
from mergekit_select.inputs.recipe import read_text
from mergekit_select.provenance.locking import lock
from mergekit_select.provenance.recording import record
from mergekit_select.provenance.sources import compared, obtained

__all__ = ["Digests", "compared", "default_store", "lock", "obtained", "read_text", "record"]
