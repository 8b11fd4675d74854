"""The model card of a published merge: what it is, what it was made from, and how to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, constants

from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.inputs.files import read_json
from mergekit_select.provenance.documents import STATEMENT, TENSORS
from mergekit_select.provenance.parents import Parent
from mergekit_select.provenance.recording import PICTURE
from mergekit_select.provenance.statement import Statement

_PROJECT = "https://github.com/mergekit-select/mergekit-select"
_PROMISES = {
    "bits": "Its bits depend on nothing but these models and the recipe, so that you can make the very same:",
    "bits on the same platform": "Its bits depend on these models, the recipe and the platform. To make it again:",
    "random": "Its method draws at random anew in every run, so another run gives other bits. To make one like it:",
    "unknown": "Whether its method gives the same bits again is not known. To try:",
}


def card(
    repository: str,
    statement: Statement,
    parents: Sequence[Parent],
    licence: str | None,
    table: str | None,
    picture: bool,
    results: Sequence[EvalResult],
) -> str:
    """Return a model card.

    Args:
        repository: OWNER/NAME.
        statement: The record of the merge.
        parents: What it was made from.
        licence: As the hub calls it; None for none.
        table: What ``inspect`` says.
        picture: Whether its picture is published, too.
        results: Evaluation results.
    """
    definition = statement.definition
    method = next(
        (str(d["merge_method"]) for d in yaml.safe_load_all(definition.recipe) if d and "merge_method" in d), "merge"
    )
    name = repository.rpartition("/")[2]
    hub_parents = list(dict.fromkeys(parent.path for parent in parents if parent.commit))
    # The hub's metadata holds ids without revisions; the table below holds the commits.
    data = ModelCardData(
        base_model=hub_parents or None,
        base_model_relation="merge" if hub_parents else None,
        eval_results=list(results) or None,
        library_name="transformers",
        license=licence,
        model_name=name if results else None,
        tags=["mergekit", "merge", "mergekit-select"],
    )
    rows = [f"| {_link(p)} | {', '.join(p.roles)} | {p.licence or 'not known'} |" for p in parents]
    version = statement.predicate.run_details.builder.version
    promise, command = _PROMISES[definition.external_parameters.reproducible], f"mergekit-select reproduce {repository}"
    local = [parent.reference for parent in parents if parent.commit is None]
    if local:
        promise = "Some of its models are in no public place. Whoever has copies of them can make it again:"
        command = " \\\n    ".join([command, *(f"--map {shlex.quote(reference)}=FOLDER" for reference in local)])
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name}",
        f"A merge of {_counted(parents)} by `{method}`, made with [mergekit](https://github.com/arcee-ai/mergekit) "
        f"{version.get('mergekit', '')} and [mergekit-select]({_PROJECT}).",
        "## Made from\n\n| model, at its commit | used as | licence |\n| --- | --- | --- |\n" + "\n".join(rows),
        f"## Make it again\n\n{promise}\n\n```sh\npip install mergekit-select=={version.get('mergekit-select', '')}\n"
        f"{command}\n```\n\n"
        f"`{STATEMENT}` says from which bytes this model was made (in-toto Statement v1, SLSA provenance v1), and "
        f"`{TENSORS}` holds the digest of every tensor. `mergekit-select verify {repository}` compares the files "
        f"with the former, and derives every tensor again.",
        f"## Recipe\n\n```yaml\n{definition.recipe.strip()}\n```",
    ]
    if table is not None:
        drawn = f"![What was selected, by layer and by kind of module]({PICTURE})\n\n" if picture else ""
        parts.append(f"## What was selected\n\n{drawn}```text\n{table}\n```")
    if results:
        lines = [f"| {r.dataset_name} | {r.metric_name or r.metric_type} | {r.metric_value} |" for r in results]
        parts.append("## Evaluation\n\n| data set | metric | value |\n| --- | --- | --- |\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _counted(parents: Sequence[Parent]) -> str:
    models = sum("model" in parent.roles for parent in parents)
    counted = f"{models} model{'s' * (models != 1)}"
    return f"{counted} over a base" if any("base" in parent.roles for parent in parents) else counted


def read_results(path: Path) -> list[EvalResult]:
    """Read evaluation results: a JSON object with a list ``results`` of what EvalResult of huggingface_hub takes.

    Raises:
        UnreadableError: The file cannot be read, or a result lacks something.
    """
    entries: Any = read_json(path).get("results")
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise UnreadableError(f"{path} must hold a list of objects under the key results")
    try:
        return [EvalResult(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise UnreadableError(
            f"{path}: results must be what huggingface_hub.EvalResult takes: {one_line(error)}"
        ) from error


def _link(parent: Parent) -> str:
    if parent.commit is None:
        return f"`{parent.path}` (a local folder)"
    return f"[{parent.path}]({constants.ENDPOINT}/{parent.path}/tree/{parent.commit}) `{parent.commit[:12]}`"
