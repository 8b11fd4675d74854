"""Have mergekit make the merges of a study from their recipes; finished ones are reused."""

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from order_study.digests import weights_digest
from order_study.errors import StudyError
from order_study.folders import FolderRecord, discard, read_record, write_record, writing
from order_study.recipes import MERGES, RECIPES, Merge, inputs, plan, recipe
from order_study.settings import Study

RECORD = "merge.json"
COMMAND = (sys.executable, "-m", "mergekit.scripts.run_yaml")  # what mergekit-yaml runs
_LAST_LINES = 15
_MADE_WITH = ("mergekit", "mergekit-select", "safetensors", "torch", "transformers")


class MergeRecord(FolderRecord):
    """The contents of merge.json: all that decides the bits of a merge, and the bits."""

    recipe_sha256: str
    inputs_sha256: dict[str, str]  # weights of each model it reads, by its folder
    made_with: dict[str, str]
    weights_sha256: str | None = None


def make_merges(
    study: Study, root: Path, steps: Sequence[int], report: Callable[[str], None], jobs: int = 1
) -> list[Merge]:
    """Have all merges of a study in `root`, whose models are there; `report` is told what was done.

    Args:
        study: The settings.
        root: The folder of the study, in which mergekit runs.
        steps: The intermediate states that are merged too.
        report: Takes one line at a time.
        jobs: How many merges are made at the same time.

    Raises:
        StudyError: mergekit failed; the message carries its last lines.
    """
    merges = plan(study, steps)
    _remove_others(root, merges, report)
    made_with = _versions()
    missing: list[tuple[Merge, MergeRecord]] = []
    for merge in merges:
        text = recipe(merge, study)
        _write(root / merge.recipe, text)
        wanted = MergeRecord(
            recipe_sha256=hashlib.sha256(text.encode()).hexdigest(),
            inputs_sha256={path: weights_digest(root / path) for path in inputs(merge, study)},
            made_with=made_with,
        )
        if not _is_finished(root / merge.folder, wanted):
            missing.append((merge, wanted))
    if len(missing) < len(merges):
        report(f"{root / MERGES}: {len(merges) - len(missing)} reused")
    _make(root, missing, study.threads, report, jobs)
    return merges


def _versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in _MADE_WITH}
    except importlib.metadata.PackageNotFoundError as error:
        raise StudyError(
            f"the merges are made by mergekit and its plugin mergekit-select, but {error.name} is not installed: "
            f"run `pip install {error.name}`"
        ) from error


def _is_finished(folder: Path, wanted: MergeRecord) -> bool:
    record = read_record(folder, RECORD, MergeRecord)
    return (
        record is not None
        and record.model_copy(update={"weights_sha256": None}) == wanted
        and any(folder.glob("*.safetensors"))
        and weights_digest(folder) == record.weights_sha256
    )


def _remove_others(root: Path, merges: Sequence[Merge], report: Callable[[str], None]) -> None:
    """Remove recipes and merges of orders, seeds, rounds and steps that are no longer asked for.

    Only what this program wrote: recipes by their first words, merges by their record.
    """
    folders = {root / merge.folder for merge in merges}
    for record in sorted((root / MERGES).glob(f"**/{RECORD}")):
        folder = record.parent
        if folder not in folders and not folder.name.startswith(".") and read_record(folder, RECORD, MergeRecord):
            discard(folder)
            above = folder.parent
            while above != root / MERGES and not any(above.iterdir()):
                above.rmdir()
                above = above.parent
            report(f"{folder}: removed, since these settings do not ask for it")
    recipes = {root / merge.recipe for merge in merges}
    for file in (root / RECIPES).glob("*.yml"):
        if file not in recipes and "of an order study" in file.read_text(encoding="utf-8").partition("\n")[0]:
            file.unlink()


def _write(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def _make(
    root: Path,
    missing: Sequence[tuple[Merge, MergeRecord]],
    threads: int,
    report: Callable[[str], None],
    jobs: int,
) -> None:
    waiting = list(missing)
    running: list[_Running] = []
    with tqdm(total=len(waiting), desc="merging", unit="merge", leave=False, disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    running.append(_Running(root, *waiting.pop(0), threads))
                time.sleep(0.05)
                for one in [one for one in running if one.process.poll() is not None]:
                    one.finish()
                    running.remove(one)
                    bar.update()
                    report(f"{root / one.merge.folder}: merged in {time.monotonic() - one.began:.0f} s")
        finally:
            for one in running:
                one.close()


class _Running:
    """A merge that mergekit is making, aside from where it will be."""

    def __init__(self, root: Path, merge: Merge, record: MergeRecord, threads: int) -> None:
        self.merge = merge
        self.began = time.monotonic()
        self._root = root
        self._record = record
        folder = root / merge.folder
        self._place = folder.with_name(f".{folder.name}.merging.unfinished")
        if self._place.exists():
            shutil.rmtree(self._place)
        self._place.mkdir(parents=True)
        # mergekit titles the model card after the folder it writes to, so that has the name of the final one.
        self._out = self._place / folder.name
        self._output = self._place / "output.txt"
        options = ("--quiet", "--num-threads", str(threads))
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [*COMMAND, merge.recipe, f"./{self._out.relative_to(root)}", *options],
                cwd=root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def finish(self) -> None:
        """Check what mergekit left, and give it its name."""
        complete = all(any(self._out.glob(name)) for name in ("config.json", "*.safetensors", "tokenizer_config.json"))
        if self.process.returncode != 0 or not complete:
            lines = self._output.read_text(errors="replace").strip().splitlines()[-_LAST_LINES:]
            raise StudyError(
                f"mergekit must make a complete model of {self._root / self.merge.recipe}, but it ended with exit "
                f"status {self.process.returncode} and these last lines: mend the cause and run again\n"
                + "\n".join(f"  {line}" for line in lines or ["(none)"])
            )
        with writing(self._root / self.merge.folder) as unfinished:
            for file in sorted(self._out.iterdir()):
                shutil.move(file, unfinished / file.name)
            record = self._record.model_copy(update={"weights_sha256": weights_digest(unfinished)})
            write_record(unfinished, RECORD, record)
        self.close()

    def close(self) -> None:
        """Stop mergekit, where it still runs, and remove what it left aside."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self._place)
