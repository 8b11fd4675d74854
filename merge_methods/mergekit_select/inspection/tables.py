"""An inspection as tables of at most 100 columns, and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from mergekit_select.errors import escaped
from mergekit_select.inspection.inspect import Inspection
from mergekit_select.inspection.tally import Tally

_WIDTH = 100  # columns of a table
_COLUMNS = 4  # up to as many sub-models get a column each
_LINES = 8  # up to as many sub-models get a line each


def as_data(answer: Inspection) -> dict[str, Any]:
    """Return the answer as plain data; counts as they are, shares between 0 and 1."""
    return {
        "method": answer.method,
        "models": answer.models,
        "bases": answer.bases,
        "draws": answer.draws,
        "resamples": answer.resamples,
        "seed": answer.seed,
        "rounds": answer.rounds,
        "pairs": [*combinations(range(len(answer.models)), 2)],
        "total": _group(answer.total),
        "layers": [{"layer": layer, **_group(tally)} for layer, tally in answer.layers.items()],
        "modules": [{"module": module, **_group(tally)} for module, tally in answer.modules.items()],
        "tensors": [
            {"name": tensor.name, "layer": tensor.layer, "module": tensor.module, **_group(tensor.tally)}
            for tensor in answer.tensors
        ],
    }


def _group(tally: Tally) -> dict[str, Any]:
    shares = {
        "unchanged": tally.unchanged_shares,
        "unchanged_all": tally.unchanged_all_share,
        "agreement": tally.agreement,
        "expected": [tally.drawn_share(value) for value in tally.expected],
        "first": [tally.drawn_share(value) for value in tally.first],
        "redrawn": [tally.drawn_share(value) for value in tally.redrawn],
        "chosen": [tally.drawn_share(value) for value in tally.chosen],
        "left": tally.drawn_share(tally.left),
    }
    norms = {"task_vector": tally.norms, "relative": tally.relative_norms}
    return {"counts": tally, "shares": shares, "norms": norms, "deviations": tally.deviations}


def render(answer: Inspection) -> list[str]:
    """Return the answer as lines of tables of at most 100 columns."""
    total = answer.total
    blocks = [_heading(answer, total), _models(answer, total)]
    if len(answer.models) > 1 and total.agreement:
        blocks.append("\n".join([_agreement(answer, total), *_identical(total, len(answer.models))]))
    layers = {_short(layer, answer): tally for layer, tally in answer.layers.items()}
    blocks.append(_groups("layer", layers, answer))
    blocks.append(_groups("module", answer.modules, answer))
    blocks.append(_legend(answer))
    return "\n\n".join(blocks).split("\n")


def _heading(answer: Inspection, total: Tally) -> str:
    how = ""
    if answer.draws:
        how = f", seed {answer.seed}"
    if answer.resamples:
        how += ", redrawn until it differs" if answer.rounds is None else f", rounds {answer.rounds}"
    size = f"{total.tensors:,} tensors, {total.parameters:,} parameters, "
    size += f"{len(answer.models)} sub-model{'s' * (len(answer.models) != 1)}, base "
    bases = ", ".join(answer.bases) or "none"
    lines = [f"{answer.method}{how}", size + _fit(bases, _WIDTH - len(size))]
    if total.unchanged_all_share is not None and len(answer.models) > 1:
        independent = 1.0
        for part in total.unchanged_shares:
            independent *= part or 0.0
        lines.append(
            f"unchanged in every sub-model: {_percent(total.unchanged_all_share)} "
            f"(independent changes would leave {_percent(independent)})"
        )
    copied = total.parameters - total.drawn
    if answer.draws and copied:
        lines.append(f"copied without a draw: {copied:,} parameters that only one model has")
    return "\n".join(lines)


def _models(answer: Inspection, total: Tally) -> str:
    columns: dict[str, list[str]] = {}
    if answer.bases:
        columns["unchanged"] = [*map(_percent, total.unchanged_shares)]
        columns["|task v.|"] = [*map(_number, total.norms)]
        columns["/ |base|"] = [*map(_number, total.relative_norms)]
    if answer.draws:
        columns["expected"] = [_percent(total.drawn_share(value)) for value in total.expected]
        columns["first"] = [_percent(total.drawn_share(value)) for value in total.first]
        if answer.resamples:
            columns["redrawn"] = [_percent(total.drawn_share(value)) for value in total.redrawn]
        columns["chosen"] = [_percent(total.drawn_share(value)) for value in total.chosen]
    names = [f"{number} {name}" for number, name in enumerate(answer.models, 1)]
    if answer.resamples:
        names.append("left at the base")
        for title, column in columns.items():
            column.append(_percent(total.drawn_share(total.left)) if title == "chosen" else "")
    table = _table("sub-model", names, columns)
    deviations = [abs(value) for value in total.deviations if value is not None]
    if deviations:
        table += f"\nfirst draws differ from the expected ones by at most {max(deviations):.1f} standard deviations"
    return table


def _agreement(answer: Inspection, total: Tally) -> str:
    count = len(answer.models)
    shares = dict(zip(combinations(range(count), 2), total.agreement, strict=True))
    if count > _LINES:
        known = [value for value in shares.values() if value is not None]
        return (
            f"equal between two sub-models: {_percent(min(known, default=None))} to "
            f"{_percent(max(known, default=None))} of the parameters, --json has each pair"
        )
    columns = {str(j + 1): [_percent(shares.get((j, i))) if j < i else "" for i in range(count)] for j in range(count)}
    columns.popitem()
    names = [f"{number} {name}" for number, name in enumerate(answer.models, 1)]
    return _table("equal between sub-models", names, columns)


def _identical(total: Tally, sub_models: int) -> list[str]:
    """Return a line for each sub-model that has all bits of an earlier one."""
    earlier: dict[int, int] = {}
    for (i, j), share in zip(combinations(range(sub_models), 2), total.agreement, strict=True):
        if share == 1:
            earlier.setdefault(j, i)
    return [
        f"sub-models {i + 1} and {j + 1} are identical: the runs did not differ; see docs/training.md"
        for j, i in earlier.items()
    ]


def _groups(title: str, groups: Mapping[str, Tally], answer: Inspection) -> str:
    tallies = [*groups.values()]
    columns = {"parameters": [f"{tally.parameters:,}" for tally in tallies]}
    if answer.bases:
        columns["unchanged"] = [_percent(tally.unchanged_share) for tally in tallies]
        columns["in all"] = [_percent(tally.unchanged_all_share) for tally in tallies]
        columns["/ |base|"] = [_number(_mean(tally.relative_norms)) for tally in tallies]
    if len(answer.models) > 1:
        columns["equal"] = [_percent(_mean(tally.agreement)) for tally in tallies]
    if answer.resamples:
        columns["redrawn"] = [_percent(tally.drawn_share(sum(tally.redrawn))) for tally in tallies]
        columns["left"] = [_percent(tally.drawn_share(tally.left)) for tally in tallies]
    elif answer.draws and len(answer.models) <= _COLUMNS:
        for k in range(len(answer.models)):
            columns[f"chosen {k + 1}"] = [_percent(tally.drawn_share(tally.chosen[k])) for tally in tallies]
    return _table(title, [*groups], columns)


def _short(layer: str | None, answer: Inspection) -> str:
    """Return a layer's number alone where all layers are of one stack."""
    if layer is None:
        return "outside the layers"
    stacks = {name.rpartition(".")[0] for name in answer.layers if name is not None}
    return layer.rpartition(".")[2] if len(stacks) == 1 else layer


def _legend(answer: Inspection) -> str:
    lines = []
    if answer.bases:
        lines.append("unchanged: bits equal to the base's; in all: in every sub-model")
        lines.append("|task v.|: norm of sub-model minus base; / |base|: divided by the base's norm")
    if len(answer.models) > 1:
        lines.append("equal: bits equal between two sub-models; by layer and module the mean over pairs")
    if answer.draws:
        line = "expected: by the weights; first: drawn first; "
        line += "redrawn: of these, base-equal; " if answer.resamples else ""
        lines.append(f"{line}chosen: in the end")
    return "\n".join(lines)


def _table(title: str, names: list[str], columns: Mapping[str, list[str]]) -> str:
    widths = [max(map(len, [head, *column])) + 2 for head, column in columns.items()]
    room = _WIDTH - sum(widths)
    width = min(room, max(map(len, [title, *names])))
    fitted = [_fit(name, width) for name in names]
    lines = [title.ljust(width) + "".join(head.rjust(w) for head, w in zip(columns, widths, strict=True))]
    for number, name in enumerate(fitted):
        cells = (column[number].rjust(w) for column, w in zip(columns.values(), widths, strict=True))
        lines.append((name.ljust(width) + "".join(cells)).rstrip())
    return "\n".join(lines)


def _fit(name: str, width: int) -> str:
    """Shorten a name where a number in front may be followed by a path, whose end tells more than its beginning."""
    name = escaped(name)
    if len(name) <= width:
        return name
    number, separator, path = name.partition(" ")
    head = f"{number} " if separator and number.isdigit() else ""
    path = path if head else name
    return f"{head}…{path[len(path) - width + len(head) + 1 :]}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _mean(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
