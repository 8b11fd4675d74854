"""Write down what a merge was made from and what came out, and say whether a folder still is that."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_select import kinds
from mergekit_select.bits import digest, dtype_name
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import Findings
from mergekit_select.inputs.checkpoint import StoredTensor
from mergekit_select.inputs.digests import Digests, root_digest
from mergekit_select.inputs.files import RECIPE, WEIGHTS, is_of_model, names_in, published_names
from mergekit_select.inputs.recipe import read_text
from mergekit_select.inputs.references import matches
from mergekit_select.provenance.documents import STATEMENT, TENSORS, read_document, write_document
from mergekit_select.provenance.locking import PACKAGES
from mergekit_select.provenance.parents import parents_of, roles_of
from mergekit_select.provenance.statement import (
    BUILDER,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    TENSOR_TABLE,
    BuildDefinition,
    Builder,
    Metadata,
    Predicate,
    Resource,
    RunDetails,
    Statement,
    Subject,
    TensorEntry,
    TensorTable,
)
from mergekit_select.verification.output import Output, open_output

CARD = "README.md"
PICTURE = "selected.png"
SIGNATURE = "model.sig"
BESIDE = frozenset({CARD, PICTURE, SIGNATURE, STATEMENT, TENSORS})  # written when a merge is recorded or published


def record(
    folder: Path,
    options: MergeOptions,
    definition: BuildDefinition,
    *,
    tensors: TensorTable | None = None,
    started: datetime.datetime | None = None,
    digests: Digests | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> Statement:
    """Write ``merge_tensors.json`` and ``merge_provenance.json`` into the folder of a merge.

    Args:
        folder: What the merge wrote.
        options: Its options.
        definition: What it was made from, as ``lock`` gave it before the merge.
        tensors: Its tensors, where their digests are known; otherwise they are read.
        started: When it began.
        digests: Remembers what was hashed.
        progress: Wraps the tensors' names as they are gone through.

    Raises:
        UnreadableError: The folder or a model cannot be read, the folder holds files of several merges, or the files
            cannot be written.
    """
    digests = digests or Digests()
    if tensors is None:
        output = open_output(folder)
        if output.problems:
            problem = output.problems[0]
            raise UnreadableError(
                f"only what one merge wrote can be recorded, and {folder / problem.place} is not: {problem.text}"
            )
        tensors = _tensors_of(output, progress)
    write_document(folder / TENSORS, tensors)
    names = _recorded_names(folder)
    hashed = digests.of_all((folder / name for name in names), keep=False)
    files = {name: digest["sha256"] for name, digest in zip(names, hashed, strict=True)}
    table = Digests().of(folder / TENSORS)["sha256"]
    try:
        named = [Subject(name=name, digest={"sha256": sha256}) for name, sha256 in files.items()]
    except ValidationError as error:
        raise UnreadableError(f"{folder} cannot be recorded: {one_line(error)}; rename the file") from error
    subject = [Subject(name=".", digest={"sha256": root_digest(files)}), *named]
    finished = datetime.datetime.now(datetime.timezone.utc)
    details = RunDetails(
        builder=Builder(id=BUILDER, version={**versions(), "device": options.device or "cpu"}),
        metadata=Metadata(started_on=_time(started), finished_on=_time(finished)),
        byproducts=[Resource(name=TENSORS, digest={"sha256": table})],
    )
    statement = Statement.model_validate(
        {
            "_type": STATEMENT_TYPE,
            "subject": subject,
            "predicateType": PREDICATE_TYPE,
            "predicate": Predicate(build_definition=definition, run_details=details),
        }
    )
    write_document(folder / STATEMENT, statement)
    for name in (STATEMENT, TENSORS):  # of a process that was killed while it wrote them
        for left in folder.glob(f"{name}.*.tmp"):
            left.unlink(missing_ok=True)
    return statement


def _recorded_names(folder: Path) -> list[str]:
    """Return the files that a merge writes, whatever else lies in its folder."""
    return [name for name in published_names(folder) if is_of_model(name) or name == RECIPE]


def of_output(definition: BuildDefinition, folder: Path, kept: tuple[Statement, TensorTable] | None) -> BuildDefinition:
    """Return the definition of a merge that was not seen: of its options, those that the folder tells.

    Args:
        definition: As ``lock`` gives it.
        folder: What the merge wrote.
        kept: Its record, if it has one: what that holds stays.
    """
    recorded = {} if kept is None else kept[0].definition.external_parameters.options
    if "out_shard_size" in recorded:
        return definition
    options = dict(definition.external_parameters.options)
    del options["out_shard_size"]
    weights = [name for name in names_in(folder) if WEIGHTS.fullmatch(name)]
    options["safe_serialization"] = not any(name.endswith(".bin") for name in weights)
    external = definition.external_parameters.model_copy(update={"options": options})
    return definition.model_copy(update={"external_parameters": external})


def table(tensors: Mapping[str, tuple[StoredTensor, str]]) -> TensorTable:
    """Return the identity of tensors from their descriptions and digests, as ``execution`` gives them."""
    entries = {
        name: TensorEntry(dtype=stored.dtype, shape=list(stored.shape), sha256=sha256)
        for name, (stored, sha256) in sorted(tensors.items())
    }
    return TensorTable.model_validate({"schema": TENSOR_TABLE, "tensors": entries})


def identities(tensors: Iterable[tuple[str, torch.Tensor]]) -> TensorTable:
    """Return the identity of tensors by name; one is in memory at a time."""
    stored = (
        (name, StoredTensor(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.nbytes), digest(tensor))
        for name, tensor in tensors
    )
    return table({name: (described, sha256) for name, described, sha256 in stored})


def read_tensors(folder: Path, progress: Callable[[Iterable[str]], Iterable[str]] = lambda names: names) -> TensorTable:
    """Return the identity of every tensor in a folder.

    Raises:
        UnreadableError: A file is damaged.
    """
    return _tensors_of(open_output(folder), progress)


def _tensors_of(output: Output, progress: Callable[[Iterable[str]], Iterable[str]]) -> TensorTable:
    return identities((name, output.read(name)) for name in progress(sorted(output.files)))


def read_record(folder: Path) -> tuple[Statement, TensorTable] | None:
    """Return a folder's record; None where it has none.

    Raises:
        UnreadableError: It breaks a rule of its format, or the two files do not belong together.
    """
    if not os.path.exists(folder / STATEMENT):
        return None
    statement = read_document(folder / STATEMENT, Statement)
    expected = {product.name: product.digest for product in statement.predicate.run_details.byproducts}.get(TENSORS)
    found = Digests().of(folder / TENSORS)["sha256"]
    if expected != {"sha256": found}:
        recorded = (expected or {}).get("sha256")
        raise UnreadableError(
            f"{folder / TENSORS}: {STATEMENT} must give its sha256, got {found} and {recorded}; get both files again"
        )
    return statement, read_document(folder / TENSORS, TensorTable)


def changes(folder: Path, statement: Statement, digests: Digests | None = None) -> Findings:
    """Say which files of a folder are not what its record says."""
    found = Findings()
    digests = digests or Digests()
    for subject in statement.subject:
        path, expected = folder / subject.name, subject.digest.get("sha256")
        if subject.name == ".":
            continue
        if not os.path.exists(path):
            found.add(kinds.FOLDER_LACKS, subject.name)
        elif (now := digests.of(path)["sha256"]) != expected:
            found.add(kinds.FOLDER_CHANGED, subject.name, now, expected=expected)
    found += added(_recorded_names(folder), statement)
    return found


def added(names: Iterable[str], statement: Statement) -> Findings:
    """Say which files of a merge its record does not have: what is loaded would be another model."""
    found, recorded = Findings(), {subject.name for subject in statement.subject}
    for name in names:
        if name not in recorded and is_of_model(name):
            found.add(kinds.FOLDER_ADDED, name)
    return found


def pins(recipe: Path, statement: Statement, locations: Mapping[str, str]) -> dict[str, str]:
    """Return where the models of a recipe are to be taken from: at the recorded commits.

    Args:
        recipe: The recipe.
        statement: The record.
        locations: Where models lie now; these go before what is recorded.
    """
    named = roles_of(read_text(recipe), str(recipe)) if os.path.exists(recipe) else {}
    found = {
        parent.reference: parent.pinned
        for parent in parents_of(statement.definition.resolved_dependencies)
        if parent.commit is not None and parent.reference in named and parent.pinned != parent.reference
    }
    # A reference with a revision of its own must not go where the same repository without one does.
    found = {reference: reference for reference in named if reference.partition("@")[0] in found} | found
    kept = {old: new for old, new in found.items() if not any(matches(old, moved) for moved in locations)}
    return {**kept, **locations}


def versions() -> dict[str, str]:
    """Return the versions of what computes a merge here."""
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**packages, "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}


def _time(moment: datetime.datetime | None) -> str | None:
    return None if moment is None else moment.strftime("%Y-%m-%dT%H:%M:%SZ")
