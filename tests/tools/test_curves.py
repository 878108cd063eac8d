"""Charts: which lines, thinned without losing a peak, alpha as the steps use it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.core.run_reader import RunRecord, read_run
from cmt_mae.pretraining.plan import alphas_at
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.report.charts import alphas, charts, thinned
from written_run import Write


def test_every_chart_of_the_issue_is_there(write: Write) -> None:
    gates = {"explained_teacher": 0.1, "other_image_loss": 1.1, "image_gain": 0.02, "half_lives": 1.0}
    run = write(knn={0: 20.0, 100: 30.0}, settings={"alpha_mask": 0.5}, lines=lambda _: gates)
    found = {chart["key"]: chart for chart in charts([read_run(str(run))])}
    wanted = {"loss", "knn", "lr", "alpha", "overlap", "entropy", "spread", "rank", "speed", "wait"}
    wanted |= {"explained", "other_image", "half_lives"}
    assert wanted <= set(found)
    assert "skipped" not in found  # every value is 0
    loss = found["loss"]["tables"][0]
    # the whole loss is that of the teacher here, and is left out
    assert [line["label"] for line in loss["lines"]] == ["teacher loss", "momentum student loss"]
    assert loss["x"][0] == 1
    assert loss["steps"][0] == 10
    assert found["knn"]["tables"][0]["steps"] == [0, 100]
    assert [line["label"] for line in found["alpha"]["tables"][0]["lines"]] == [
        "mask (Eq. 3)",
        "loss (Eq. 4)",
    ]
    json.dumps(list(found.values()), allow_nan=False)


@given(
    switch=st.integers(1, 99), ramp=st.sampled_from([0.0, 0.5, 3.0]), mask=st.sampled_from([None, 0.7]),
    step=st.integers(1, 100),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_alpha_is_that_of_the_step(switch: int, ramp: float, mask: float | None, step: int) -> None:
    """Against the training's own function: the line of step n tells of the step that began at n - 1."""
    plan = {"total_steps": 100, "switch_step": switch, "steps_per_epoch": 10}
    shared = {"alpha": 0.3, "alpha_mask": mask, "alpha_loss": None, "alpha_ramp_epochs": ramp}
    at = alphas(RunRecord(Path("x"), "x", config=shared, facts={"plan": plan}))
    assert at is not None
    weights = alphas_at(PretrainConfig(**shared), SimpleNamespace(**plan), step - 1)  # type: ignore[arg-type]
    both = {"alpha_mask": weights.mask, "alpha_loss": weights.loss}
    assert at(step) == ({"alpha": weights.loss} if mask is None else both)


VALUES = st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(math.nan)), min_size=1, max_size=300)


@given(values=VALUES, points=st.integers(4, 40))
@settings(max_examples=60, deadline=None)
def test_thinning_keeps_ends_and_extremes(values: list[float], points: int) -> None:
    rows = [{"a": value, "b": -value} for value in values]
    kept = thinned(rows, ["a", "b"], points)
    assert kept == sorted(set(kept))
    assert {0, len(rows) - 1} <= set(kept)
    assert len(kept) <= max(points + 2, 6)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        left = [values[place] for place in kept if math.isfinite(values[place])]
        assert (min(left), max(left)) == (min(finite), max(finite))


@pytest.mark.parametrize(("every", "total", "switch"), [(10, 100, 53), (20, 60_000, 30_007)])
def test_alpha_rises_at_the_recorded_switch_however_sparse_the_metrics(
    write: Write, every: int, total: int, switch: int
) -> None:
    run = write(done=total, total=total, switch=switch, every=every)
    found = {chart["key"]: chart for chart in charts([read_run(str(run))])}
    (table,) = found["alpha"]["tables"]
    values = dict(zip(table["steps"], table["lines"][0]["values"], strict=True))
    assert {step: value for step, value in values.items() if switch <= step <= switch + 1} == {
        switch: 0,
        switch + 1: 0.3,
    }
    assert {value for step, value in values.items() if step < switch} == {0}
    assert {value for step, value in values.items() if step > switch} == {0.3}


def test_one_long_run_stays_small(write: Write) -> None:
    run = write(done=60_000, total=60_000, switch=30_000, every=20)
    text = json.dumps(charts([read_run(str(run))]))
    assert len(text) < 400_000
