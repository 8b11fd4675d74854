"""A merge that is under way: its engine, its layout, and the plan that its folder is of."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_select import __version__
from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.execution.adapters import with_own_cache
from mergekit_select.execution.layout import Layout, Part, lay_out
from mergekit_select.execution.request import Request
from mergekit_select.execution.workspace import PLANNING, Workspace
from mergekit_select.findings import some
from mergekit_select.inputs.files import RECORDS, model_names, state, sync
from mergekit_select.inputs.recipe import parse_recipes, read_text, validated
from mergekit_select.planner.companions import require_card
from mergekit_select.planner.determinism import Determinism, determinism
from mergekit_select.planner.engine import Engine
from mergekit_select.planner.opening import opened
from mergekit_select.planner.writing import input_files, written

# The options that change what is written.
_OPTIONS = (
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "lora_merge_dtype",
    "out_shard_size",
    "copy_tokenizer",
    "trust_remote_code",
    "write_model_card",
    "device",
)
_SCHEMA = 1


@dataclass(frozen=True)
class Job:
    """A merge that is under way.

    Attributes:
        request: What was asked for.
        recipe: The recipe's text.
        engine: Computes tensors.
        layout: Where every byte goes.
        workspace: What is done already.
        plan_id: Digest of all that the output depends on.
        inputs: Size, time of modification and time of change of each input file.
        determinism: What is known of the recipe's method.
    """

    request: Request
    recipe: str
    engine: Engine
    layout: Layout
    workspace: Workspace
    plan_id: str
    inputs: Mapping[str, Sequence[int]]
    determinism: Determinism

    def parts(self) -> Sequence[Part]:
        """Return the parts that this process is asked for: all, or those of its share of the files."""
        if self.request.share is None:
            return self.layout.parts
        number, count = self.request.share
        files = self.layout.files
        mine = {file.name for file in files[(number - 1) * len(files) // count : number * len(files) // count]}
        return [part for part in self.layout.parts if part.file.name in mine]

    def missing(self) -> list[Part]:
        """Return the parts of the whole merge that are not recorded."""
        if self.workspace.finished:
            return []
        done = self.workspace.recorded()
        return [part for part in self.layout.parts if part.number not in done]

    def cautions(self) -> list[str]:
        """Return what the reader should know of the method."""
        if self.determinism is not Determinism.UNKNOWN:
            return []
        method = self.engine.plan.config.merge_method
        return [f"{method} is not known to give the same bits again: if it draws from a generator, use mergekit-yaml"]

    def check_inputs(self) -> None:
        """Compare the input files with the plan.

        Raises:
            UnreadableError: One has changed.
        """
        for path, identity in self.inputs.items():
            if state(path) != identity:
                raise UnreadableError(f"{path} has changed during the merge: its size or one of its times is another")


@contextmanager
def opened_job(request: Request) -> Iterator[Job]:
    """Plan a merge and make its folder one of this plan, or find that it is.

    Raises:
        MergekitSelectError: The merge cannot be planned, or the folder belongs to another one.
    """
    options = MergeOptions(**request.options)
    recipe = read_text(request.recipe).replace("\r\n", "\n").replace("\r", "\n")  # as mergekit-yaml stores it
    recipes = parse_recipes(recipe, request.recipe)
    if len(recipes) > 1:
        raise PlanError(
            f"{request.recipe} holds {len(recipes)} merges; give --intermediate-dir DIR for those that have a name"
        )
    config = validated(recipes[0], request.recipe)
    kind = determinism(config.merge_method)
    if kind is Determinism.RANDOM:
        raise PlanError(
            f"merge needs a method that gives the same bits again, and {config.merge_method} draws from a generator "
            f"that all tensors share, so that no part can be computed alone; use mergekit-yaml"
        )
    workspace = Workspace(Path(request.out))
    with ExitStack() as stack:
        stack.callback(workspace.close)
        before = workspace.read_plan()
        require_no_other(workspace)
        if before is None:
            # One process at a time: mergekit takes a folder in the LoRA merge cache for a whole merge.
            workspace.acquire(PLANNING, wait=True)
            if workspace.read_plan() is None:
                workspace.clear()
        own = with_own_cache(config, options)
        engine = stack.enter_context(opened(config, own))
        if with_own_cache(config, options) != own:
            raise UnreadableError("an adapter or its model has changed while they were merged; repeat the command")
        if before is None:
            require_card(engine, recipe)
        _fix_union(engine, workspace)
        tensors = written(engine)
        if not tensors:
            raise PlanError(f"the recipe {request.recipe} makes no tensor")
        layout = lay_out(tensors, options.out_shard_size)
        _require_files_for(request, len(layout.files))
        inputs = {str(path): state(path) for path in input_files(engine)}
        plan = _describe(recipe, options, layout, inputs)
        if before is None:
            before = workspace.read_plan()  # another process may have had the lock first
        if before is None:
            workspace.write_plan(plan)
        workspace.release(PLANNING)
        if before is not None and before != plan:
            what = _difference(before, plan)
            raise PlanError(
                f"{workspace.out} holds {'a finished' if workspace.finished else 'an unfinished'} merge "
                f"of another plan: {what}; give what it was begun with, or another folder"
            )
        yield Job(request, recipe, engine, layout, workspace, plan["plan_id"], inputs, kind)


def _require_files_for(request: Request, files: int) -> None:
    """Refuse more shares than files, before the folder is one of this plan: another size would be another plan."""
    if request.share is not None and request.share[1] > files:
        raise PlanError(
            f"--shard k/N needs an output of at least N files, and this one has {files} for N = {request.share[1]}; "
            f"give a smaller N, or a smaller --out-shard-size"
        )


def require_no_other(workspace: Workspace) -> None:
    """Refuse an output folder with a model that this merge has not written.

    Raises:
        PlanError: It is such a folder.
    """
    out = workspace.out
    kept = model_names(out) + [name for name in RECORDS if (out / name).exists()]
    # Looked at after the files: another process may be moving its merge's there.
    if kept and not (workspace.moving or workspace.finished):
        raise PlanError(f"{out} must hold no other model, and holds {some(kept)}; remove it, or give another folder")


def _fix_union(engine: Engine, workspace: Workspace) -> None:
    """Build the tokenizer of a union once, since another process would order its vocabulary otherwise."""
    task = engine.plan.tokenizer
    if task is None or task.tokenizer_source != "union":
        return
    if workspace.finished:
        return
    if not workspace.union.exists():
        temporary = workspace.union.with_name(f"tokenizer.{os.getpid()}.tmp")
        engine.tokenizer(task).tokenizer.save_pretrained(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        temporary.rename(workspace.union)
    engine.use_union(workspace.union)


def _describe(
    recipe: str, options: MergeOptions, layout: Layout, inputs: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "schema": _SCHEMA,
        "recipe": recipe,
        "options": {name: getattr(options, name) for name in _OPTIONS},
        "versions": {
            "mergekit-select": __version__,
            **{package: version(package) for package in ("mergekit", "torch")},
        },
        "inputs": inputs,
        "files": {
            file.name: [[t.planned.name, t.stored.dtype, list(t.stored.shape)] for t in file.tensors]
            for file in layout.files
        },
        "parts": [[part.file.name, *(tensor.planned.name for tensor in part.tensors)] for part in layout.parts],
    }
    return {"plan_id": hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest(), **plan}


def _difference(before: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """Return the first thing in which two plans differ, for people."""
    if before.get("recipe") != plan["recipe"]:
        return "its recipe has another text"
    for part, what in (("options", "the option"), ("versions", "the version of"), ("inputs", "the input file")):
        old, new = before.get(part) or {}, plan[part]
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                change = "has changed since" if part == "inputs" else f"was {old.get(name)}, is {new.get(name)}"
                return f"{what} {name} {change}"
    return "its tensors are others"
