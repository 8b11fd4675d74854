"""The command ``merge``."""

from __future__ import annotations

import datetime
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from mergekit_select.cli._errors import NO, YES, one_line_errors
from mergekit_select.cli._options import merge_options, report_options
from mergekit_select.cli._output import bar, counting, hide_bars, print_report
from mergekit_select.errors import PlanError, UnreadableError, escaped
from mergekit_select.inputs.bounds import MOST_RECIPE_BYTES, read_file

if TYPE_CHECKING:
    from mergekit_select.execution.job import Job
    from mergekit_select.execution.local import Outcome
    from mergekit_select.execution.request import Request
    from mergekit_select.inputs.digests import Digests
    from mergekit_select.provenance import BuildDefinition

_CONFIGS = ("config.json", "adapter_config.json")  # what a folder with a model or an adapter has
_STOPPED = "interrupted; the parts that are finished are kept, and the same command merges the rest"
_EXAMPLES = """\b
Examples:
  mergekit-select merge recipes/select.yml out/
  mergekit-select merge recipes/select.yml out/ --shard 3/16
  mergekit-select merge recipes/select.yml out/ --finish
  mergekit-select merge recipes/select.yml out/ --ray auto
  mergekit-select merge recipes/two-stage.yml out/ --intermediate-dir ./models/stages
"""


def _parse_share(_context: click.Context, _option: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise click.BadParameter(f"must be k/N with 1 <= k <= N, such as 1/4, got {value!r}")
    return int(match[1]), int(match[2])


@click.command("merge", epilog=_EXAMPLES)
@click.argument("recipe", type=click.Path(readable=False))
@click.argument("out", type=click.Path(readable=False))
@click.option("--jobs", type=click.IntRange(min=1), help="Processes  [default: as cores and memory allow]")
@click.option("--shard", "share", metavar="k/N", callback=_parse_share, help="Merge only the k-th of N shares")
@click.option(
    "--ray", metavar="ADDRESS|auto", help="Merge on the Ray cluster at host:port, or on one found or begun here"
)
@click.option(
    "-I", "--intermediate-dir", "intermediate", metavar="DIR", help="Where merges with a name go, of mergekit-multi"
)
@click.option("--finish", "only_finish", is_flag=True, help="Only finish a merge whose shares are all merged")
@click.option("--rehash", is_flag=True, help="Read what is recorded as done again, and compute anew what is damaged")
@click.option("--provenance/--no-provenance", default=True, help="Record what the merge was made from")
@report_options
@merge_options(
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "transformers_cache",
    "lora_merge_cache",
    "lora_merge_dtype",
    "out_shard_size",
    "copy_tokenizer",
    "trust_remote_code",
    "write_model_card",
    "lazy_unpickle",
    "device",
    "num_threads",
    built=False,
)
@one_line_errors(refused=NO)
def command(
    merge_options: dict[str, Any],
    recipe: str,
    out: str,
    jobs: int | None,
    share: tuple[int, int] | None,
    ray: str | None,
    intermediate: str | None,
    only_finish: bool,
    rehash: bool,
    provenance: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge RECIPE into OUT as mergekit-yaml does, side by side, and again where it was interrupted.

    The folder gets the same tensors, bit for bit, and the same files. The same command goes on after any
    interruption. Until all is done, OUT holds no model, and what is done lies in OUT/.merge. With
    --intermediate-dir, RECIPE may hold several merges, as for mergekit-multi.

    Exit codes: 0 done, 1 refused, 2 usage, or something cannot be read or written.
    """
    if ray is not None and (jobs or share or only_finish or rehash):
        raise click.UsageError(
            "--ray decides itself who merges what: give it without --jobs, --shard, --finish, --rehash"
        )
    if sys.platform == "win32":
        raise PlanError("merge needs file locks that Windows does not have (fcntl); use mergekit-yaml, or WSL")
    hide_bars(quiet)
    if quiet:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is loaded
    from mergekit_select.check import ignored_keys
    from mergekit_select.execution.cluster import merge_on_ray
    from mergekit_select.execution.local import PROCESS_BYTES, merge
    from mergekit_select.execution.request import Request

    ignored = [str(found) for found in ignored_keys(recipe)]
    for line in ignored:
        click.echo(escaped(line), err=True)
    request = Request(recipe, out, merge_options, share)
    merges: Sequence[tuple[str | None, Request]] = [(None, request)]
    shown: Any = None
    record: _Record | None = None

    def begin(job: Job, processes: int) -> None:
        nonlocal shown
        if not quiet:
            each = (PROCESS_BYTES + job.layout.peak) / 2**30
            click.echo(f"{_processes(processes)} of {each:.1f} GiB at most", err=True)
        if record is not None:
            record.look_up(job, name)
        shown = bar("Merging" if name is None else f"Merging {name}", "B", quiet)
        shown.total, shown.unit_scale = sum(part.nbytes for part in job.layout.parts), True
        show(job)

    def show(job: Job) -> None:
        left = job.missing()
        done = sum(len(part.tensors) for part in job.layout.parts) - sum(len(part.tensors) for part in left)
        shown.set_postfix_str(f"{done} tensors", refresh=False)
        shown.update(shown.total - sum(part.nbytes for part in left) - shown.n)

    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        # A share alone does not read all inputs: verify --record writes the record of a merge in shares.
        if provenance and share is None:
            record = _Record(request, stack.enter_context(counting("Hashing", quiet)))
        if intermediate is not None:
            from mergekit_select.execution.stages import staged

            merges = staged(request, intermediate)
        for name, one in merges:
            try:
                if ray is not None:
                    outcome = merge_on_ray(one, ray, started=begin, progress=show)
                else:
                    outcome = merge(
                        one, jobs=jobs, only_finish=only_finish, rehash=rehash, started=begin, progress=show
                    )
            except KeyboardInterrupt as stopped:
                raise KeyboardInterrupt(_STOPPED) from stopped
            finally:
                if shown is not None:
                    shown.close()
            outcomes.append(outcome)
            if not outcome.finished:
                break  # what needs it cannot begin
            if record is not None:
                record.write(outcome, name)
    cautions = [note for outcome in outcomes for note in outcome.notes]
    notes = [*ignored, *cautions]
    data = {"ok": True, "finished": outcome.finished, "missing": outcome.missing, "jobs": outcome.jobs}
    lines = [*map(_described, outcomes), *cautions]
    print_report("merge", {**data, "folders": [each.out for each in outcomes], "notes": notes}, lines, as_json)
    raise click.exceptions.Exit(YES)


def _described(outcome: Outcome) -> str:
    if outcome.finished:
        return f"{outcome.out}: finished, with {_processes(outcome.jobs)}"
    return f"{outcome.out}: this share is merged, {outcome.missing} parts of others are missing"


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count > 1)}"


class _Record:
    """What a merge is made from: hashed from the start, looked up once the merge is planned, written at its end."""

    def __init__(self, request: Request, digests: Digests) -> None:
        self._request, self._digests = request, digests
        self._started = datetime.datetime.now(datetime.timezone.utc)
        self._content = _content(request.recipe)
        self._whole: BuildDefinition | None = None
        self._opened: set[str] = set()
        digests.ahead(_folders(self._content))

    def look_up(self, job: Job, name: str | None) -> None:
        from mergekit_select.provenance import lock, read_text, require_opened

        recipe = self._request.recipe
        self._options = job.engine.plan.options
        if self._whole is None:
            text = read_text(recipe)
            if text.encode() != self._content:
                raise UnreadableError(f"{recipe} has changed while the merge was planned; merge into another folder")
            self._whole = lock(text, recipe, self._options, digests=self._digests)
        self._opened |= job.inputs.keys()
        require_opened(self._definition(name), self._opened)

    def write(self, outcome: Outcome, name: str | None) -> None:
        from mergekit_select.provenance import read_record, record, require_unchanged, table

        if not outcome.anew and read_record(outcome.out) is not None:
            return  # a record says what was there when the merge was finished
        definition = self._definition(name)
        require_unchanged(definition, self._digests)
        computed = table(outcome.tensors)
        record(outcome.out, self._options, definition, tensors=computed, started=self._started, digests=self._digests)

    def _definition(self, name: str | None) -> BuildDefinition:
        from mergekit_select.provenance.stages import of_stage

        assert self._whole is not None
        return of_stage(self._whole, self._request.recipe, name)


def _content(recipe: str) -> bytes:
    """Return what a recipe file holds; nothing where it cannot be read, which the merge will say."""
    with suppress(UnreadableError):
        return read_file(Path(recipe), MOST_RECIPE_BYTES)
    return b""


def _folders(recipe: bytes) -> Iterator[Path]:
    """Yield the models' folders that a recipe seems to name; finding out takes mergekit, which loads for seconds."""
    seen: set[str] = set()
    with suppress(UnicodeError, yaml.YAMLError):  # the merge will say what is wrong
        for event in yaml.parse(recipe.decode()):
            parts = event.value.split("+") if isinstance(event, yaml.ScalarEvent) else ()
            for part in dict.fromkeys(parts):
                if part not in seen and any(os.path.isfile(os.path.join(part, name)) for name in _CONFIGS):
                    yield Path(part)
                seen.add(part)
