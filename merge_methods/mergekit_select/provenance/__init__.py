"""From what, exactly? Locks and records of merges, what reproduces them, and what publishes them.

The formats are in-toto's and SLSA's (``statement``); docs/provenance.md describes every field.
"""

from mergekit_select.inputs.digests import Digests, default_store
from mergekit_select.inputs.recipe import read_text
from mergekit_select.provenance.locking import configuration, lock
from mergekit_select.provenance.merging import changed_inputs, require_opened, require_unchanged
from mergekit_select.provenance.parents import parents_of
from mergekit_select.provenance.recording import of_output, read_record, record, table
from mergekit_select.provenance.sources import compared, obtained
from mergekit_select.provenance.statement import BuildDefinition

__all__ = [
    "BuildDefinition",
    "Digests",
    "changed_inputs",
    "compared",
    "configuration",
    "default_store",
    "lock",
    "obtained",
    "of_output",
    "parents_of",
    "read_record",
    "read_text",
    "record",
    "require_opened",
    "require_unchanged",
    "table",
]
