"""Compare the files beside an output's weights with those that its recipe gives: tokenizer, templates, settings.

None other may be there that transformers, with peft installed, would load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mergekit_select import kinds
from mergekit_select.errors import one_line
from mergekit_select.findings import Findings
from mergekit_select.inputs.bounds import read_file
from mergekit_select.inputs.files import companion_names, names_in

MOST_BYTES = 1 << 30  # of one file; the largest tokenizers have some tens of MB


def companion_problems(root: Path, expected: Path, aligned: bool, reordered: bool) -> Findings:
    """Compare the files beside the weights with those that the recipe gives; return what differs.

    Args:
        root: The output.
        expected: A folder with what the merge writes.
        aligned: Whether mergekit makes the tokenizer; otherwise it copies files.
        reordered: Whether it does so in another order every time.

    Raises:
        UnreadableError: A file is not regular, or far too large.
    """
    found = {name: root / name for name in companion_names(root)}
    given = {name: expected / name for name in names_in(expected)}
    problems = Findings()
    for name in sorted(given.keys() - found.keys()):
        problems.add(kinds.COMPANION_MISSING, name)
    for name in sorted(found.keys() - given.keys()):
        kind = kinds.ADAPTER_BESIDE if name.startswith("adapter_") else kinds.COMPANION_EXTRA
        problems.add(kind, name)
    differing = {}
    for name in sorted(given.keys() & found.keys()):
        left, right = (read_file(paths[name], MOST_BYTES) for paths in (given, found))
        if left != right:
            place = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), None)
            length = f"{len(right)} bytes instead of {len(left)}"
            differing[name] = length if place is None else f"byte {place} differs"
    if differing and aligned:  # other versions write other text for the same tokenizer
        differing = _as_loaded(found, expected, differing)
    for name, problem in differing.items():
        problems.add(kinds.TOKENIZER_REORDERED if reordered else kinds.COMPANION_DIFFERS, name, problem=problem)
    return problems


def _as_loaded(found: Mapping[str, Path], folder: Path, differing: dict[str, str]) -> dict[str, str]:
    """Compare two tokenizers as the installed transformers loads them."""
    root = next(path for name, path in found.items() if "/" not in name).parent
    written = []
    with tempfile.TemporaryDirectory(prefix="mergekit-select-") as scratch:
        for number, source in enumerate((folder, root)):
            target = Path(scratch, str(number))
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
                tokenizer.save_pretrained(str(target))
            except Exception as error:  # each class of tokenizer has errors of its own
                return dict.fromkeys(differing, f"transformers cannot load the tokenizer: {one_line(error)}")
            written.append({name: (target / name).read_bytes() for name in names_in(target)})
    same = written[0].keys() if written[0] == written[1] else ()
    return {name: problem for name, problem in differing.items() if name not in same}
