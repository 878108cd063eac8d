"""The fuzz campaign: quick trials hold, and it notices tracebacks, statuses and lines of others."""

from pathlib import Path

import pytest
from benchmarks.faults import fuzz
from benchmarks.faults.calling import MEMORY, call, call_forked, fault_in
from benchmarks.faults.campaign import Options

from cmt_mae.core import cli, parsing


def test_quick_campaign_finds_nothing(tmp_path: Path) -> None:
    verdict = fuzz.campaign(Options(tmp_path, quick=True))
    assert verdict.failures == []
    assert verdict.trials == sum(quick for _, quick in fuzz.SIZES.values())
    assert sum(full for full, _ in fuzz.SIZES.values()) >= 3000


def test_an_error_that_nobody_foresaw_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(parsing, "check_values", surprise)
    tally = fuzz.Tally()
    words = fuzz.start_of("export")
    tally.note("settings", words, call(words))
    assert "status 1" in tally.failures[0]
    assert "a fault of cmt-mae, KeyError: 'surprise'" in tally.failures[0]
    monkeypatch.setattr(cli, "dispatch", lambda _: 1 / 0)
    monkeypatch.setenv("CMT_MAE_DEBUG", "1")
    assert fault_in(call(words)) == "a traceback"


def test_a_crash_and_a_hang_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import time

    monkeypatch.setattr(cli, "dispatch", lambda _: os.abort())
    assert call_forked([], tmp_path).status == -6
    monkeypatch.setattr(cli, "dispatch", lambda _: time.sleep(30))
    assert call_forked([], tmp_path, limit_s=0.3).status == 999
    assert call([], limit_s=1).status == 999
    monkeypatch.setattr(cli, "dispatch", lambda _: bytearray(2 * MEMORY))
    outcome = call_forked([], tmp_path)
    assert outcome.status == 2
    assert "out of memory" in outcome.line()
