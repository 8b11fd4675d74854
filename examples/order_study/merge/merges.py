"""Have mergekit make the merges of a study from their recipes; finished ones are reused."""

import contextlib
import importlib.metadata
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.order_study import parallel
from examples.order_study.errors import StudyError
from examples.order_study.merge.recipes import FIRST_WORDS, recipe
from examples.order_study.model import Model, inputs
from examples.order_study.settings import Study
from examples.order_study.store.folders import (
    Record,
    discard,
    is_made,
    read_record,
    weights_digest,
    write_record,
    write_whole,
    writing,
)
from examples.order_study.store.places import MERGES, RECIPES, RECORD

COMMAND = (sys.executable, "-m", "mergekit.scripts.run_yaml")  # what mergekit-yaml runs

_LAST_LINES = 15
_MADE_WITH = ("mergekit", "mergekit-select", "safetensors", "torch", "transformers")


def make_merges(
    study: Study, root: Path, models: Sequence[Model], report: Callable[[str], None], jobs: int = 1
) -> None:
    """Have merges of a study in `root`, which holds what they read; `report` is told what was done.

    Args:
        study: The settings.
        root: The folder of the study, in which mergekit runs.
        models: The merges.
        report: Takes one line at a time.
        jobs: How many merges are made at the same time.

    Raises:
        StudyError: mergekit failed; the message carries its last lines.
    """
    versions = _versions() if models else {}
    waiting = []
    running: list[subprocess.Popen[bytes]] = []
    for model in models:
        text = recipe(model, study)
        write_whole(root / model.recipe, text.encode())
        weights = {one.folder: weights_digest(root / one.folder) for one in inputs(model, study)}
        made_from = {"recipe": text, "weights_sha256": weights, "versions": versions}
        if not is_made(root / model.folder, made_from):
            waiting.append((root, model, made_from, study.threads, running))
    if len(waiting) < len(models):
        report(f"{root / MERGES}: {len(models) - len(waiting)} reused")

    def stop() -> None:
        for process in list(running):
            process.kill()

    with contextlib.closing(parallel.each(_merge, waiting, jobs, stop)) as made:
        for (_, model, *_), seconds in made:
            report(f"{root / model.folder}: merged in {seconds:.0f} s")


def _merge(
    root: Path, model: Model, made_from: dict[str, Any], threads: int, running: list[subprocess.Popen[bytes]]
) -> float:
    """Make one merge, aside from where it will be; return how long it took."""
    began, folder = time.monotonic(), root / model.folder
    aside = folder.with_name(f".{folder.name}.merging.unfinished")
    if aside.exists():
        shutil.rmtree(aside)
    out = aside / folder.name  # mergekit titles the model card after the folder it writes to
    aside.mkdir(parents=True)
    process = subprocess.Popen(
        [*COMMAND, model.recipe, f"./{out.relative_to(root)}", "--quiet", "--num-threads", str(threads)],
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    running.append(process)
    try:
        output, _ = process.communicate()
        complete = all(any(out.glob(name)) for name in ("config.json", "*.safetensors", "tokenizer_config.json"))
        if process.returncode != 0 or not complete:
            lines = output.decode(errors="replace").strip().splitlines()[-_LAST_LINES:]
            raise StudyError(
                f"mergekit must make a complete model of {root / model.recipe}, but it ended with exit status "
                f"{process.returncode} and these last lines: mend the cause and run again\n"
                + "\n".join(f"  {line}" for line in lines or ["(none)"])
            )
        with writing(folder) as unfinished:
            for file in sorted(out.iterdir()):
                shutil.move(file, unfinished / file.name)
            write_record(unfinished, Record(made_from=made_from, weights_sha256=weights_digest(unfinished)))
    finally:
        process.kill()
        process.wait()
        running.remove(process)
        shutil.rmtree(aside)
    return time.monotonic() - began


def _versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in _MADE_WITH}
    except importlib.metadata.PackageNotFoundError as error:
        raise StudyError(
            f"the merges are made by mergekit and its plugin mergekit-select, but {error.name} is not installed: "
            f"run `pip install {error.name}`"
        ) from error


def remove_others(
    root: Path, models: Sequence[Model], report: Callable[[str], None], sparing: tuple[str, ...] = ()
) -> None:
    """Remove recipes and merges of orders, seeds, rounds and steps that are not among `models`, the merges asked for.

    Only what this program wrote: recipes by their first line, merges by their record. What has a name that begins
    like one of `sparing` stays.
    """
    folders = {root / model.folder for model in models}
    for record in sorted((root / MERGES).glob(f"**/{RECORD}")):
        folder = record.parent
        if folder not in folders and not folder.name.startswith((".", *sparing)) and read_record(folder):
            discard(folder)
            while (folder := folder.parent) != root / MERGES and not any(folder.iterdir()):
                folder.rmdir()
            report(f"{record.parent}: removed, since these settings do not ask for it")
    recipes = {root / model.recipe for model in models}
    for file in (root / RECIPES).glob("*.yml"):
        if (
            file not in recipes
            and not file.name.startswith(sparing)
            and FIRST_WORDS in file.read_text(encoding="utf-8").partition("\n")[0]
        ):
            file.unlink()
