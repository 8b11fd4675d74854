"""The command line: `train` makes base and sub-models, `compare` prints their loss, `run` does a whole study."""

from collections.abc import Sequence
from pathlib import Path

import click
import transformers
from tqdm import tqdm

from order_study.compare import Row, compare, table
from order_study.config import load_study
from order_study.errors import StudyError
from order_study.settings import Study
from order_study.study import TEXT_FOLDER, train_study


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train sub-models of one base in different data orders, and compare them with their merges."""
    # Loading these models takes a blink; transformers would draw a bar for each.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as transformers ships it


@main.command("train")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models"),
    show_default=True,
    help="Folder for the text, the base and the sub-models.",
)
def train_command(out: Path) -> None:
    """Train a tiny base and three sub-models on text that CPython carries: about two minutes.

    Finished models are reused; changed settings or another text train them again.
    """
    try:
        train_study(Study(), out, click.echo)
    except (StudyError, OSError) as error:
        raise click.ClickException(str(error)) from error


@main.command("compare")
@click.option(
    "--text",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("models") / TEXT_FOLDER,
    show_default=True,
    help="Folder with the text that `train` wrote.",
)
@click.argument("models", nargs=-1, required=True, metavar="NAME=PATH...")
def compare_command(folder: Path, models: Sequence[str]) -> None:
    """Print held-out loss of models on disk, the first of which is the base of the others."""
    named: dict[str, Path] = {}
    for model in models:
        name, separator, path = model.partition("=")
        if not (name and separator and path):
            raise click.UsageError(
                f"a model is given as NAME=PATH, got {model!r}: write for example base=./models/base"
            )
        if name in named:
            raise click.UsageError(f"a name stands for one model, got {name!r} twice: rename one of them")
        named[name] = Path(path)
    try:
        rows: list[Row] = compare(named, folder)
    except (StudyError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(table(rows))


@main.command("run")
@click.argument("config", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for models, merges and results.  [default: runs/<name of CONFIG>]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Models to train, merge or measure at the same time, each in a process of its own.",
)
def run_command(config: Path, out: Path | None, jobs: int) -> None:
    """Run the whole study that the YAML file CONFIG describes: train, merge, measure, report.

    What exists already is reused, so a run that was interrupted goes on when it is started again.
    """
    # Here, for what it needs beyond the other commands: matplotlib is an extra.
    from order_study.run import run_study

    try:
        # tqdm's, so that a line and a progress bar do not end up in each other.
        run_study(load_study(config), out or Path("runs") / config.stem, tqdm.write, jobs)
    except KeyboardInterrupt as error:
        raise _Interrupted("interrupted; what is finished is kept, and the same command goes on from here") from error
    except (StudyError, OSError) as error:
        raise click.ClickException(str(error)) from error


class _Interrupted(click.ClickException):
    exit_code = 130  # as a shell reports a program that SIGINT ended
