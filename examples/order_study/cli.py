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
    "--set",
    "changes",
    metavar="PLACE=VALUE",
    multiple=True,
    help="A setting in place of that of CONFIG, such as fine_tuning.schedule=linear.",
)
@click.option(
    "--throw",
    "number",
    type=click.IntRange(min=1),
    help="Run this one of the throws of CONFIG alone.",
)
@click.option(
    "--ray",
    metavar="ADDRESS|auto",
    help="Train and measure on the nodes of the Ray cluster at host:port, which see this folder.",
)
def main(
    config: Path, out: Path | None, jobs: int, changes: tuple[str, ...], number: int | None, ray: str | None
) -> None:
    """Run the whole study that the YAML file CONFIG describes: train, merge, measure, report.

    What exists already is reused, so a run that was interrupted goes on when it is started again.
    """
    try:
        study = load_study(config, changes)
        if number is not None and number > len(study.throws):
            raise StudyError(
                f"--throw must be one of the {len(study.throws)} throws of {config}, got {number}: lower it"
            )
        from examples.order_study.throws import run_throws  # takes seconds: torch, transformers, peft

        run_throws(study, out or Path("runs") / config.stem, click.echo, jobs, ray, number)
    except KeyboardInterrupt as error:
        raise _Interrupted("interrupted; what is finished is kept, and the same command goes on from here") from error
    except (StudyError, OSError) as error:
        raise click.ClickException(str(error)) from error


class _Interrupted(click.ClickException):
    exit_code = 130  # as a shell reports a program that SIGINT ended
