"""The order study's tables and figures, from made-up measurements of which the findings are known."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from examples.order_study.analysis import figures, report, results, throws
from examples.order_study.analysis.comparisons import SINGLE
from examples.order_study.analysis.results import Results
from examples.order_study.measured import Floats, Measured, Measurements, PartCount, Positions, SampleLosses
from examples.order_study.model import Model, merged
from examples.order_study.settings import ExactMatch, GivenBase, Lora, Measuring, Merging, Study, Training
from examples.order_study.sources import HubDataset, JsonLines

AVERAGE, SELECTION = "average", "selection"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "study"
SAMPLES, HELD_OUT, BATCHES, STEPS = 320, 150, 40, 120
SLOPE = -0.06
STUDY = Study(
    checkpoints=2,
    merging=Merging(seeds=(0, 1), rounds=(1, None)),
    measuring=Measuring(bins=10, bootstrap=400, exact_match=ExactMatch(samples=60)),
)


def measured(study: Study = STUDY, slope: float = SLOPE, merge_gain: float = 0.05) -> Measurements:
    """Sub-models whose loss falls by `slope` over the first epoch, and merges that are better by `merge_gain`."""
    generator = np.random.default_rng(5)
    tokens, held_tokens = generator.integers(5, 60, SAMPLES), generator.integers(5, 60, HELD_OUT)
    difficulty, held_difficulty = generator.normal(2, 0.5, SAMPLES), generator.normal(2, 0.5, HELD_OUT)
    orders = len(study.orders)
    batches = np.stack([generator.permutation(SAMPLES) // (SAMPLES // BATCHES) for _ in range(2 * orders)], axis=1)
    trained = difficulty[:, None] + slope * batches[:, :orders] / (BATCHES - 1)

    def add(model: Model, loss: float, training: Floats | None = None) -> None:
        noise = generator.normal(0, 0.02, HELD_OUT)
        exact = generator.random(60) < 0.4 if study.measuring.exact_match and model.step is None else None
        models.append(
            Measured(
                model=model,
                held_out=SampleLosses((held_difficulty + loss + noise) * held_tokens, held_tokens),
                training=None if training is None else SampleLosses(training * tokens, tokens),
                exact=exact,
                equal_to_base=None if model.kind == "base" else 0.25,
            )
        )

    models: list[Measured] = []
    add(Model("base"), 1.0)
    for k, order in enumerate(study.orders):
        add(Model("sub-model", order), 0.01 * k, trained[:, k] + generator.normal(0, 0.02, SAMPLES))
    for model in merged(study):
        add(model, -merge_gain, trained.mean(axis=1) - merge_gain)
    for step in (40, 80)[: study.checkpoints]:
        later = (STEPS - step) / STEPS
        for order in study.orders:
            add(Model("sub-model", order, step=step), later)
        for model in merged(study, [step]):
            if model.step is not None:
                add(model, later - merge_gain)
    positions = tuple(
        Positions(f"order-{order}", np.stack([batches[:, k], BATCHES + batches[:, orders + k]], axis=1), BATCHES)
        for k, order in enumerate(study.orders)
    )
    counts = {"fine_tuning": PartCount(SAMPLES, 0), "held_out": PartCount(HELD_OUT, 3)}
    return Measurements(
        study=study, models=tuple(models), positions=positions, counts=counts, steps=study.fine_tuning.epochs * BATCHES
    )


def replaced(measurements: Measurements, name: str, /, **changes: object) -> Measurements:
    """The measurements with another final model of that name."""
    models = tuple(
        dataclasses.replace(one, **changes) if one.model.name == name and one.model.step is None else one  # type: ignore[arg-type]
        for one in measurements.models
    )
    return dataclasses.replace(measurements, models=models)


def like_average(measurements: Measurements) -> Measurements:
    """The measurements with all merges as good as the average, to the bit."""
    (average,) = measurements.final("average")
    for kind in ("selection", "resampling"):
        for one in measurements.final(kind):
            measurements = replaced(measurements, one.model.name, held_out=average.held_out, exact=average.exact)
    return measurements


def lines_with(text: str, *parts: str) -> list[str]:
    return [line for line in text.splitlines() if all(part in line for part in parts)]


@pytest.fixture(scope="module")
def measurements() -> Measurements:
    return measured()


@pytest.fixture(scope="module")
def found(measurements: Measurements) -> Results:
    return results.build(measurements)


# Results


def test_the_same_measurements_give_the_same_results(found: Results) -> None:
    assert results.build(measured()).model_dump_json() == found.model_dump_json()


def test_report_and_figures_need_nothing_but_the_file(found: Results, tmp_path: Path) -> None:
    results.save(found, tmp_path / "results.json")
    again = Results.model_validate_json((tmp_path / "results.json").read_bytes())
    assert again == found
    assert json.loads((tmp_path / "results.json").read_text())["schema_version"] == 1
    assert report.render(again) == report.render(found)
    one, other = figures.draw(found, tmp_path / "one"), figures.draw(again, tmp_path / "other")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


THROWN = ["smollm2-clinc150", "smollm2-gsm8k"]
ALONE = [
    "quick",
    "gsm8k-small",
    "smollm2-clinc150-bf16",
    *(f"smollm2-gsm8k-{name}" for name in ("constant", "constant-warmup", "double", "linear")),
    *(f"smollm2-tasks/{name}" for name in ("clinc150", "gsm8k")),
]


@pytest.mark.parametrize("name", [*ALONE, *(f"{name}/throw-{k}" for name in THROWN for k in (1, 2))])
def test_the_committed_results_give_the_committed_report(name: str, tmp_path: Path) -> None:
    content = (DOCS / name / "results.json").read_text()
    found = Results.model_validate_json(content)
    results.save(found, tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == content
    pictures = [f"figures/{path.name}" for path in figures.draw(found, tmp_path)]
    assert report.render(found, pictures) == (DOCS / name / "results.md").read_text()


@pytest.mark.parametrize("name", THROWN)
def test_the_committed_throws_give_the_committed_comparison(name: str) -> None:
    folder = DOCS / name
    found = [Results.model_validate_json((folder / f"throw-{k}" / "results.json").read_text()) for k in (1, 2)]
    compared = throws.compare(found)
    assert compared.model_dump_json(indent=1) + "\n" == (folder / "results.json").read_text()
    assert throws.render(compared) == (folder / "results.md").read_text()


def test_a_row_is_the_mean_over_its_models_weighed_by_tokens(measurements: Measurements, found: Results) -> None:
    table = {row.label: row for row in found.table}
    assert list(table) == [
        "base",
        SINGLE,
        "sub-models, best (order-1)",
        AVERAGE,
        SELECTION,
        "resampling, 1 round",
        "resampling, until it differs",
    ]
    singles = measurements.final("sub-model")
    losses = [sum(model.held_out.total) / sum(model.held_out.tokens) for model in singles]
    row = table[SINGLE]
    assert row.models == ("order-1", "order-2", "order-3")
    assert row.loss == pytest.approx(np.mean(losses))
    assert row.loss_deviation == pytest.approx(np.std(losses, ddof=1))
    assert (row.loss_least, row.loss_greatest) == pytest.approx((min(losses), max(losses)))
    assert row.perplexity == pytest.approx(np.exp(np.mean(losses)))
    assert row.exact_match == pytest.approx(np.mean([model.exact for model in singles]))
    assert row.equal_to_base == 0.25
    best = table["sub-models, best (order-1)"]
    assert best.loss == pytest.approx(min(losses))
    assert best.loss_deviation is None
    assert table["resampling, 1 round"].models == ("resampling-1-seed-0", "resampling-1-seed-1")


def test_each_merge_is_compared_with_what_is_simpler(found: Results) -> None:
    best = "sub-models, best (order-1)"
    expected = [
        (AVERAGE, SINGLE),
        (AVERAGE, best),
        (SELECTION, SINGLE),
        (SELECTION, best),
        (SELECTION, AVERAGE),
        *[(Model("resampling", 0, r).label, other) for r in (1, None) for other in (SINGLE, best, AVERAGE, SELECTION)],
    ]
    for measure in ("loss", "exact_match"):
        assert [(d.row, d.against) for d in found.differences if d.measure == measure] == expected


def test_a_difference_is_that_of_the_rows_and_lies_in_its_interval(found: Results) -> None:
    table = {row.label: row for row in found.table}
    for difference in found.differences:
        one, other = table[difference.row], table[difference.against]
        if difference.measure == "loss":
            assert difference.estimate == pytest.approx(one.loss - other.loss)
        else:
            assert one.exact_match is not None
            assert other.exact_match is not None
            assert difference.estimate == pytest.approx(one.exact_match - other.exact_match)
        assert difference.low <= difference.estimate <= difference.high
        assert difference.told == (difference.low > 0 or difference.high < 0)


def test_planted_differences_and_slopes_are_found(found: Results) -> None:
    for difference in found.differences:
        if difference.measure == "loss":
            gain = -0.06 if difference.against == SINGLE else -0.05 if "best" in difference.against else 0
            assert difference.low - 0.001 <= gain <= difference.high + 0.001
            assert difference.told == bool(gain)
    first, last = found.trends
    assert first.within is not None
    assert last.within is not None
    assert first.within.low <= SLOPE <= first.within.high < 0
    assert last.within.low <= 0 <= last.within.high
    assert first.raw is not None
    assert first.raw.error > 5 * first.within.error
    assert [order.order for order in first.orders] == ["order-1", "order-2", "order-3"]


def test_position_is_told_from_the_learning_rate(measurements: Measurements) -> None:
    rates = np.cos(np.linspace(0, np.pi / 2, STEPS))
    positions = tuple(
        dataclasses.replace(where, learning_rate=rates[where.seen].sum(axis=1)) for where in measurements.positions
    )
    found = results.build(dataclasses.replace(measurements, positions=positions))
    causes = {cause.what: cause for cause in found.causes}
    first, last = causes["position in the first epoch"], causes["position in the last epoch"]
    assert [first.alone, last.alone] == [trend.within for trend in found.trends]  # one slope, one interval
    assert first.together is not None
    assert first.together.low <= SLOPE <= first.together.high < 0
    rate = causes["learning rate when seen"]
    assert rate.together is not None
    assert rate.together.low <= 0 <= rate.together.high
    assert "| learning rate when seen |" in report.render(found)


def test_a_constant_learning_rate_leaves_position_alone(measurements: Measurements) -> None:
    positions = tuple(
        dataclasses.replace(where, learning_rate=np.full(len(where.seen), float(where.seen.shape[1])))
        for where in measurements.positions
    )
    found = results.build(dataclasses.replace(measurements, positions=positions))
    assert [cause.what for cause in found.causes] == ["position in the first epoch", "position in the last epoch"]
    assert found.causes[0].together is not None
    assert found.causes[0].together.low <= SLOPE <= found.causes[0].together.high < 0
    written = report.render(found)
    assert "every sample was seen at the same learning rates" in written
    assert "learning rate when seen" not in written


def test_identical_merges_differ_by_exactly_nothing(measurements: Measurements) -> None:
    null = results.build(like_average(measurements))
    differences = [d for d in null.differences if d.against in (AVERAGE, SELECTION)]
    assert len(differences) == 2 * (1 + 2 + 2)
    for d in differences:
        assert (d.estimate, d.low, d.high, d.p, d.told) == (0, 0, 0, 1, False)
    for line in lines_with(report.render(null), "| selection | average |"):
        assert line.endswith("| no difference can be told |")


def test_the_anchor_is_set_against_the_other_sub_models(measurements: Measurements, found: Results) -> None:
    anchor = found.anchor
    assert anchor is not None
    assert anchor.order == "order-1"
    labels = ["other sub-models, mean", "anchor (order-1)", AVERAGE, SELECTION, "resampling, until it differs"]
    assert [curve.label for curve in anchor.curves] == labels
    others, first, *merges = anchor.curves
    assert others.difference is None
    assert first.slope is not None
    assert first.slope.low <= SLOPE <= first.slope.high
    for curve in merges:
        assert curve.slope is not None
        assert curve.slope.low <= SLOPE / 3 <= curve.slope.high
    one, two, three = (model.training.per_token() for model in measurements.final("sub-model") if model.training)
    inside = measurements.positions[0].first / (BATCHES - 1) < 0.1
    assert first.bins[0].mean == pytest.approx(one[inside].mean())
    assert first.difference is not None
    assert first.difference[0].mean == pytest.approx((one - (two + three) / 2)[inside].mean())


def test_curves_along_the_steps_end_with_the_final_models_of_the_seeds_merged_on_the_way(
    measurements: Measurements, found: Results
) -> None:
    curves = {curve.label: curve for curve in found.along_steps}
    assert list(curves) == ["sub-models", AVERAGE, SELECTION, "resampling, until it differs"]
    for curve in curves.values():
        assert [point.step for point in curve.points] == [40, 80, 120]
    final = {one.model.name: one.held_out.mean() for one in measurements.models if one.model.step is None}
    assert curves[SELECTION].points[-1].loss == final["selection-seed-0"]
    assert curves["resampling, until it differs"].points[-1].loss == final["resampling-seed-0"]
    singles = [final[name] for name in ("order-1", "order-2", "order-3")]
    last = curves["sub-models"].points[-1]
    assert (last.loss, last.least, last.greatest) == pytest.approx((np.mean(singles), min(singles), max(singles)))


@pytest.mark.parametrize(("bins", "orders"), [(1, (1, 2)), (2, (4, 7, 9, 11)), (1000, (1, 2))])
def test_any_number_of_orders_and_bins_will_do(bins: int, orders: tuple[int, ...], tmp_path: Path) -> None:
    study = STUDY.model_copy(update={"orders": orders, "measuring": Measuring(bins=bins, bootstrap=20)})
    small = results.build(measured(study))
    assert len(small.trends[0].within_bins) == min(bins, BATCHES)
    assert "exact match" not in report.render(small)
    assert len(figures.draw(small, tmp_path)) == 4


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    tuning = Training(epochs=1, learning_rate=1e-3)
    study = STUDY.model_copy(update={"fine_tuning": tuning, "checkpoints": 0})
    one_epoch = results.build(measured(study))
    assert [path.name for path in figures.draw(one_epoch, tmp_path)] == ["position-first-epoch.png", "anchor.png"]
    assert "last epoch" not in report.render(one_epoch)
    bare = measured(study)
    bare = dataclasses.replace(
        bare, models=tuple(dataclasses.replace(m, training=None) for m in bare.models if m.model.kind == "sub-model")
    )
    only_singles = results.build(bare)
    assert figures.draw(only_singles, tmp_path) == []
    text = report.render(only_singles)
    assert "## Differences" not in text
    assert "## Position" not in text


# Report


def test_the_report_says_what_was_found(found: Results) -> None:
    text = report.render(found, ["figures/anchor.png"])
    assert "150 samples; 3 left out because longer than the context" in text
    assert "The best sub-model is chosen by its loss on the very samples it is measured on" in text
    assert "26 comparisons are made, and 8 of the intervals exclude 0" in text
    assert "about 1.3 would by chance" in text
    (average,) = lines_with(text, "loss, nats per token", "| average | sub-models, mean |")
    assert average.endswith("| better |")
    (null,) = lines_with(text, "loss, nats per token", "| selection | average |")
    assert null.endswith("| no difference can be told |")
    assert "Position in the first epoch: samples seen early in it end up with the higher loss" in text
    assert "Position in the last epoch: no trend can be told within samples" in text
    assert "![The same samples under the anchor, the other sub-models and the merges](figures/anchor.png)" in text
    assert "helper" not in text


@pytest.mark.parametrize(
    ("slope", "words"), [(0.06, "samples seen late in it end up with the higher loss"), (0.0, "no trend can be told")]
)
def test_the_report_says_which_way_a_trend_goes(slope: float, words: str) -> None:
    assert f"Position in the first epoch: {words}" in report.render(results.build(measured(slope=slope)))


def test_a_merge_that_is_worse_is_called_worse() -> None:
    text = report.render(results.build(measured(merge_gain=-0.05)))
    (line,) = lines_with(text, "loss, nats per token", "| average | sub-models, mean |")
    assert line.endswith("| worse |")


def test_where_no_slope_can_be_told_the_report_says_so(measurements: Measurements) -> None:
    one_batch = tuple(dataclasses.replace(where, seen=0 * where.seen, batches=1) for where in measurements.positions)
    text = report.render(results.build(dataclasses.replace(measurements, positions=one_batch)))
    assert len(lines_with(text, "cannot be told")) == 2 * 5 + 4
    assert len(lines_with(text, "no trend can be told, as there are too few batches")) == 2


def test_tables_are_well_formed(found: Results) -> None:
    width = None
    for line in report.render(found).splitlines():
        cells = line.count("|")
        assert not (cells and width) or cells == width, line
        width = cells or None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": GivenBase(model="owner/model", revision="abc")}, "| base | `owner/model` at abc |"),
        (
            {"data": JsonLines(source="jsonl", train="${X}/a.jsonl", held_out="b", prompt="{q}", response="{a}")},
            "| data | JSON lines, `${X}/a.jsonl` and `b` |",
        ),
        (
            {
                "data": HubDataset(
                    source="datasets", id="o/d", name="n", held_out_share=0.1, prompt="{q}", response="{a}"
                )
            },
            "| data | `o/d`, n at its newest revision |",
        ),
        ({"fine_tuning": Training(epochs=2, learning_rate=1, lora=Lora(rank=4))}, "LoRA of rank 4, merged"),
        ({"composition": "fixed"}, "| batches | of fixed composition |"),
    ],
)
def test_the_report_says_what_was_trained(changes: dict[str, object], words: str, found: Results) -> None:
    text = report.render(found.model_copy(update={"study": found.study.model_copy(update=changes)}))
    assert words in text


# Figures


def test_figures_are_pictures_of_a_size_to_look_at(found: Results, tmp_path: Path) -> None:
    drawn = figures.draw(found, tmp_path / "new" / "folder")
    names = ["position-first-epoch.png", "position-last-epoch.png", "anchor.png", "steps.png"]
    assert [path.name for path in drawn] == names
    for path in drawn:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", content[16:24])
        assert (width, 450 < height < 700) == (1440, True)
        assert len(content) > 15_000  # a blank one has a tenth of that
