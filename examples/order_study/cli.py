"""The command line: one study, described by one file; nothing heavy is imported before the file is found sound."""

from pathlib import Path

import click

from examples.order_study.config import load_study
from examples.order_study.errors import StudyError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
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
@click.option(
    "--ray",
    metavar="ADDRESS|auto",
    help="Train and measure on the nodes of the Ray cluster at host:port, which see this folder.",
)
def main(config: Path, out: Path | None, jobs: int, ray: str | None) -> None:
    """Run the whole study that the YAML file CONFIG describes: train, merge, measure, report.

    What exists already is reused, so a run that was interrupted goes on when it is started again.
    """
    try:
        study = load_study(config)
        from examples.order_study.study import run_study  # takes seconds: torch, transformers, peft

        run_study(study, out or Path("runs") / config.stem, click.echo, jobs, ray)
    except KeyboardInterrupt as error:
        raise _Interrupted("interrupted; what is finished is kept, and the same command goes on from here") from error
    except (StudyError, OSError) as error:
        raise click.ClickException(str(error)) from error


class _Interrupted(click.ClickException):
    exit_code = 130  # as a shell reports a program that SIGINT ended
