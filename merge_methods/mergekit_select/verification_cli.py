"""The command ``verify``: arguments in, the answer of ``verification`` out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mergekit_select.replay_cli import (
    NO,
    UNREADABLE,
    YES,
    apply_threads,
    one_line_errors,
    print_json,
    print_text,
    progress_bar,
    replay_options,
)

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_select.verification import Difference, Verification

_SHOWN = 20


def _parse_maps(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    result: dict[str, str] = {}
    for value in values:
        old, separator, new = value.partition("=")
        if not (old and separator and new):
            raise click.BadParameter(f"must be OLD=NEW, got {value!r}")
        if result.setdefault(old, new) != new:
            raise click.BadParameter(f"maps {old!r} twice, to {result[old]!r} and {new!r}")
    return result


_EXAMPLES = """\b
Examples:
  mergekit-select verify out/
  mergekit-select verify out/ --map ./runs=/data/runs
"""


# Not readable=True, click's default: its message takes four lines.
@click.command("verify", epilog=_EXAMPLES)
@click.argument("out", type=click.Path(readable=False))
@click.option("--recipe", type=click.Path(readable=False), help="Recipe, instead of OUT/mergekit_config.yml")
@click.option(
    "--map",
    "locations",
    multiple=True,
    metavar="OLD=NEW",
    callback=_parse_maps,
    help="A model, or a folder of models, that the recipe calls OLD lies at NEW; repeatable",
)
@click.option("--strict", is_flag=True, help="Exit with 1 on notes too, such as on a method that is random")
@replay_options
def verify_command(
    merge_options: MergeOptions,
    out: str,
    recipe: str | None,
    locations: dict[str, str],
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Is the output in the folder OUT, bit for bit, what its recipe says?

    Derives every tensor again, one at a time, and compares bits, names, shapes and dtypes. Relative paths in
    the recipe begin at the current folder, as for mergekit-yaml.

    Exit codes: 0 the same, 1 not the same or unfinished, 2 usage, or something cannot be read.
    """
    with one_line_errors(refused=UNREADABLE):
        from mergekit_select.verification import verify

        apply_threads(merge_options)
        answer = verify(
            out,
            recipe,
            locations=locations,
            options=merge_options,
            progress=progress_bar("Verifying", quiet),
        )
    if as_json:
        print_json("verify", {"ok": answer.same, **vars(answer)})
    else:
        print_text(render(answer))
    raise click.exceptions.Exit(YES if answer.same and not (strict and answer.notes) else NO)


def render(answer: Verification) -> str:
    """Return the answer as text."""
    lines = [f"{problem.kind}: {problem.place}: {problem.text}" for problem in answer.problems]
    lines += [_line(difference) for difference in answer.differences[:_SHOWN]]
    if len(answer.differences) > _SHOWN:
        lines.append(f"and {len(answer.differences) - _SHOWN} more; --json lists all")
    lines += [f"note: {note}" for note in answer.notes]
    lines.append(_verdict(answer))
    return "\n".join(lines)


def _line(difference: Difference) -> str:
    kind, name = difference.kind, difference.tensor
    if kind == "missing":
        return f"missing: {name}: the recipe gives {difference.expected}"
    if kind == "extra":
        return f"extra: {name}: {difference.found}, the recipe gives none"
    if kind == "renamed":
        return f"renamed: {name}: the output calls it {difference.found}"
    if kind != "bits":
        return f"{kind}: {name}: expected {difference.expected}, found {difference.found}"
    return (
        f"bits: {name}: {difference.count:,} of {difference.elements:,} elements, first at "
        f"{list(difference.index or ())}: expected {difference.expected}, found {difference.found}"
    )


def _verdict(answer: Verification) -> str:
    if answer.recipe is None:
        return f"NOT VERIFIED: {answer.output} is unfinished, nothing was compared"
    recipe = "its recipe" if answer.recipe.parent == answer.output else str(answer.recipe)
    compared = f"{answer.tensors:,} tensors with {answer.parameters:,} parameters compared ({answer.method})"
    if answer.same:
        return f"SAME: every bit of {answer.output} is what {recipe} gives; {compared}"
    parts = []
    if any(problem.kind == "unfinished" for problem in answer.problems):
        parts.append("unfinished")
    if answer.differences:
        count = len(answer.differences)
        parts.append(f"{count:,} tensor{' is' if count == 1 else 's are'} not what {recipe} gives")
    elif not parts:
        parts.append("every tensor is what the recipe gives, but the files do not agree")
    if answer.undecided:
        random = answer.determinism is not None and answer.determinism.value == "random"
        why = "the method is random" if random else "the order of a union of vocabularies is random"
        return f"UNDECIDED: {answer.output}: {'; '.join(parts)}, and {why}; {compared}"
    return f"NOT THE SAME: {answer.output}: {'; '.join(parts)}; {compared}"
