"""What the documentation says is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mergekit_select.selection import draws
from tests import reference

DOCS = Path(__file__).parents[2] / "docs"


def test_known_answers_in_the_specification_of_the_draws() -> None:
    rows = re.findall(
        r"^\| (\d+) \| (\S+|\(empty\)) \| (\d) \| (\S*) *\| elements (\d+) to (\d+): ([\d ]+) \|$",
        (DOCS / "draws.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 6
    for seed, name, draw_round, key, start, last, values in rows:
        name = "" if name == "(empty)" else name.strip("`")
        found = draws.draw(int(start), int(last) + 1, seed=int(seed), name=name, draw_round=int(draw_round))
        assert found.tolist() == [int(value) for value in values.split()]
        if key:
            assert int(key.strip("`"), 16) == draws.stream_key(int(seed), name, int(draw_round))


def test_the_worked_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines() if line.startswith("| ")}
    numbers = {key: [int(cell) for cell in rows[key]] for key in rows if re.match(r"base|sub-model \d|draw u", key)}
    base, models = numbers["base"], [numbers[f"sub-model {k}, weight {w}"] for k, w in ((1, 1), (2, 2), (3, 1))]
    for draw_round in (0, 1):
        drawn = [reference.draw(0, "w", draw_round, d) for d in range(4)]
        assert numbers[f"draw u of round {draw_round}"] == drawn
    results = [[int(x) for x in row] for row in re.findall(r"\*\*result\*\*" + r" \| \*\*(\d+)\*\*" * 4, text)]
    options: dict[str, Any] = dict(weights=[1, 2, 1], name="w")
    assert results == [
        reference.merge(models, **options)[0],
        reference.merge(models, base, **options)[0],
        reference.merge(models, base, rounds=1, **options)[0],
    ]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert printed == re.findall(r"# (tensor\(.*\))$", code, re.MULTILINE)


@pytest.mark.parametrize(
    "file",
    sorted([DOCS.parent / "README.md", *DOCS.rglob("*.md")]),
    ids=lambda file: str(file.relative_to(DOCS.parent)),
)
def test_links_between_files_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), f"{file.name} links to {target}"
