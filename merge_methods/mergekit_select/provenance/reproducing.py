"""Make a merge again from its record, and say whether it is the same."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mergekit.options import MergeOptions

from mergekit_select import kinds
from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.findings import Finding, Findings, Severity
from mergekit_select.inputs.digests import Digests
from mergekit_select.planner.opening import opened, with_adapter_cache
from mergekit_select.planner.plan import PlannedTensor
from mergekit_select.provenance.locking import recorded_options
from mergekit_select.provenance.merging import downloaded_differences, merge, require_unchanged
from mergekit_select.provenance.origins import Needs, Origin, examine, needs, read_origin, require_space
from mergekit_select.provenance.parents import configurations, located, parents_of
from mergekit_select.provenance.pinning import renamed
from mergekit_select.provenance.recording import identities, read_record, read_tensors, record
from mergekit_select.provenance.sources import obtained
from mergekit_select.provenance.statement import TensorTable

Verdict = Literal["same", "not same", "undecided", "made", "possible", "not possible"]
Progress = Callable[[Iterable[PlannedTensor]], Iterable[PlannedTensor]]


@dataclass(frozen=True)
class Reproduction:
    """The answer.

    Attributes:
        target: What was made again.
        verdict: ``made`` where there is nothing to compare with; ``possible`` and ``not possible`` where nothing was
            made.
        needs: What it takes.
        findings: What is in the way, and what the reader should know.
        tensors: How many tensors were compared.
        differing: Those that are not the same, with the reason.
    """

    target: str
    verdict: Verdict
    needs: Needs
    findings: tuple[Finding, ...]
    tensors: int = 0
    differing: tuple[str, ...] = ()


def reproduce(
    target: str,
    out: Path | None,
    options: MergeOptions,
    *,
    locations: Mapping[str, str] | None = None,
    dry_run: bool = False,
    digests: Digests | None = None,
    progress: Progress = lambda tensors: tensors,
) -> Reproduction:
    """Make a merge again, and compare its tensors with those recorded.

    Nothing from a hub is executed. Without ``out``, no tensor is written.

    Args:
        target: A lock, the folder of a merge, or OWNER/NAME[@REVISION].
        out: Where to; a folder that is not there, or empty.
        options: Where caches are, and on which device; those that change a byte are the recorded ones.
        locations: Where models lie now; see ``inputs.references.relocated``.
        dry_run: Whether to say what it would take, and stop.
        digests: Remembers what was hashed.
        progress: Wraps the tensors as they are gone through.

    Raises:
        UnreadableError: The target, its record or a model cannot be read, or ``out`` is in use.
        PlanError: mergekit refuses the merge, or a lock is to be made without ``out``.
    """
    if out is not None and os.path.exists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UnreadableError(f"OUT must be a folder that is not there, or empty, got {out}; give another")
    findings, digests = Findings(), digests or Digests()
    origin = read_origin(target, options, digests, findings)
    if origin.folder is None and out is None and not dry_run:
        raise PlanError(f"{target} is a lock, which holds no tensors to compare with: give OUT, or --dry-run")
    definition = origin.definition
    if definition.external_parameters.options.get("trust_remote_code"):
        findings.add(kinds.REMOTE_CODE_RECORDED, "options")
    parents = parents_of(definition.resolved_dependencies)
    moved = located(definition.recipe, target, locations or {})
    names = {parent.reference: examine(parent, moved, options, digests, findings) for parent in parents}
    wanted = needs(parents, origin.tensors, options)
    require_space(wanted, out, options, findings)
    if not findings.of(Severity.ERROR) and not dry_run:
        for parent in parents:
            if names[parent.reference] == parent.pinned:
                findings += downloaded_differences(parent, options, digests)
    if findings.of(Severity.ERROR) or dry_run:
        verdict: Verdict = "not possible" if findings.of(Severity.ERROR) else "possible"
        return Reproduction(target, verdict, wanted, tuple(findings))
    text = renamed(definition.recipe, target, names)
    with with_adapter_cache(options) as own:
        exact = recorded_options(definition, own.model_copy(update={"quiet": True}))
        found = _made(text, origin, out, exact, digests, locations or {}, progress)
    expected = origin.tensors
    if expected is None and origin.folder is not None:
        expected = read_tensors(obtained(target, options))
    if expected is None:
        return Reproduction(target, "made", wanted, tuple(findings), len(found.tensors))
    differing = tuple(_differences(expected, found))
    certain = origin.recorded and definition.external_parameters.reproducible in ("bits", "bits on the same platform")
    verdict = "same" if not differing else "not same" if certain else "undecided"
    return Reproduction(target, verdict, wanted, tuple(findings), len(found.tensors), differing)


def _made(
    text: str,
    origin: Origin,
    out: Path | None,
    options: MergeOptions,
    digests: Digests,
    locations: Mapping[str, str],
    progress: Progress,
) -> TensorTable:
    """Merge, into a folder or tensor by tensor without writing any."""
    if out is not None:
        started = datetime.datetime.now(datetime.timezone.utc)
        merge(text, origin.target, out, options)
        require_unchanged(origin.definition, digests, locations)
        record(out, options, origin.definition, started=started, digests=digests)
        kept = read_record(out)
        assert kept is not None
        return kept[1]
    merges = configurations(text, origin.target)
    if len(merges) > 1:
        raise PlanError(f"{origin.target} is made by several merges, which need a folder; give OUT")
    with opened(merges[0][1], options) as engine:
        merged = ((planned.name, engine.merged(planned)) for planned in progress(engine.tensors))
        return identities((name, tensor) for name, tensor in merged if tensor is not None)


def _differences(expected: TensorTable, found: TensorTable) -> Iterable[str]:
    for name in sorted(expected.tensors.keys() | found.tensors.keys()):
        before, after = expected.tensors.get(name), found.tensors.get(name)
        if before is None or after is None:
            yield f"{name}: {'not recorded' if before is None else 'recorded, and not made'}"
        elif before != after:
            yield (
                f"{name}: recorded {before.dtype} {before.shape} {before.sha256}, "
                f"made {after.dtype} {after.shape} {after.sha256}"
            )
