"""The campaign of hostile files: quick trials hold, and it notices when the guards are taken away."""

from pathlib import Path

import pytest
import torch
from benchmarks.faults import hostile, hostile_names
from benchmarks.faults.calling import CONTROL, Outcome, fault_in
from benchmarks.faults.campaign import Options
from hypothesis import given
from hypothesis import strategies as st

from cmt_mae.core.text import one_line, printable


def test_quick_campaign_finds_nothing(tmp_path: Path) -> None:
    verdict = hostile.campaign(Options(tmp_path, quick=True))
    assert verdict.failures == []
    assert verdict.trials == sum(verdict.figures.values()) > 50
    assert {"controls", "pickles", "checkpoints", "arrays", "yaml", "TorchScript", "tar names", "links",
            "names in lists", "result names", "pages", "file names"} <= verdict.figures.keys()  # fmt: skip


@pytest.fixture
def stage(tmp_path: Path) -> hostile.Stage:
    tiny = hostile.Tiny(tmp_path)  # what these trials do not reach: no images are read
    return hostile.Stage(tmp_path, tiny, quick=True)


def test_code_that_runs_is_noticed(stage: hostile.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.load as it was before weights_only."""
    load = torch.load
    file = stage.fresh() / "w.pth"
    torch.save(hostile.weights(hostile.payloads(stage.marker)["os.system"]), file)
    words = ["export", f"--backbone={file}", f"--out={stage.cell / 'x.safetensors'}"]
    stage.refuses("pickles", "guarded", words)
    assert stage.failures == []

    def unguarded(*args: object, weights_only: bool = True, **more: object) -> object:  # noqa: ARG001
        return load(*args, weights_only=False, **more)

    monkeypatch.setattr(torch, "load", unguarded)
    stage.refuses("pickles", "unguarded", words)
    assert any("the payload ran" in failure for failure in stage.failures)


def test_markup_that_comes_through_is_noticed(
    stage: hostile.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmt_mae.tools.report import comparison_text

    monkeypatch.setattr(hostile_names, "NASTY", ("<script>alert(1)</script>",))
    hostile_names.pages(stage)
    assert stage.failures == []
    monkeypatch.setattr(comparison_text, "escaped", str)
    hostile_names.pages(stage)
    assert any("tags ['script']" in failure for failure in stage.failures)


def test_a_name_that_climbs_is_noticed(
    stage: hostile.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cmt_mae.evaluate.result import Result

    def save(self: Result, out: Path) -> Path:
        path = Path(out) / "results" / f"{self.task.replace(chr(0), '')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path = path.resolve() if path.resolve().is_relative_to(stage.folder) else Path(out) / "x"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json())
        return path

    monkeypatch.setattr(hostile_names, "NASTY", ())
    monkeypatch.setattr(Result, "save", save)
    hostile_names.results(stage)
    assert any("written to" in failure for failure in stage.failures)


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome(0, "", ""), None),
        (Outcome(2, "", "progress\ncmt-mae: no\n"), None),
        (Outcome(2, "", "cmt-mae: no\ncmt-mae: no\n"), "2 lines"),
        (Outcome(2, "", "cmt-mae: no\nmore\n"), "1 lines of error of 2"),
        (Outcome(2, "", ""), "0 lines"),
        (Outcome(1, "", "cmt-mae: a fault\n"), "status 1"),
        (Outcome(-11, "", ""), "status -11"),
        (Outcome(2, "", "Traceback (most recent\ncmt-mae: no\n"), "traceback"),
        (Outcome(2, "", "cmt-mae: \x1b[2J\n"), "control"),
        (Outcome(0, "", "cmt-mae: no\n"), "status 0"),
    ],
)
def test_an_ending_is_judged(outcome: Outcome, fault: str | None) -> None:
    found = fault_in(outcome)
    assert (found is None) == (fault is None)
    assert fault is None or fault in str(found)


@given(st.text(), st.integers(1, 50))
def test_text_is_fit_to_be_shown(text: str, limit: int) -> None:
    shown = printable(text)
    assert not CONTROL.search(shown)
    assert "\n" not in shown
    assert all(c.isprintable() for c in shown)
    assert printable(shown) == shown
    assert len(one_line(text, limit)) <= limit + 3
