"""The command line: `train` makes base and sub-models, `compare` prints their loss on held-out text."""

from collections.abc import Sequence
from pathlib import Path

import click
import transformers

from order_study.compare import Row, compare, table
from order_study.errors import StudyError
from order_study.settings import Study
from order_study.study import TEXT_FOLDER, train_study


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train sub-models of one base in different data orders, and compare them with their merges."""
    # Loading these models takes a blink; transformers would draw a bar for each.
    transformers.utils.logging.disable_progress_bar()


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
