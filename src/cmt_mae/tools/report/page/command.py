"""``cmt-mae report``: one self-contained HTML page from run directories."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import sweep, write_text
from cmt_mae.core.run_reader import RunRecord, labels_of, read_run
from cmt_mae.core.text import printable
from cmt_mae.tools.diagnose.verdict import judge
from cmt_mae.tools.report.page.render import page

MARK = b'<meta name="generator" content="cmt-mae'
MOST_RUNS = 40


@dataclass
class ReportConfig:
    """One page (HTML, no network needed, under 5 MB) of a run, or of several side by side."""

    runs: list[str]
    """Run directories of `pretrain`."""
    out: str | None = None
    """File to write. Default: report.html in the run; for several runs, in the current folder."""


def make_report(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns its path, its size in bytes, and each run's verdict.

    Raises InputError for a folder that is no run, and where the file cannot be written or is not ours.
    """
    records = read_records(config.runs)
    out = Path(config.out).expanduser() if config.out else default_out(records)
    if not is_ours(out):
        raise InputError(
            f"{out} is there and is no report of cmt-mae: delete it or give another --out"
        )
    text = page(records)
    if out.parent.is_dir():
        sweep(out.parent)  # temporary files of a killed report
    write_text(out, text)
    verdicts = {record.label: judge(record).line for record in records}
    for label, line in verdicts.items():
        print(printable(f"{label}: {line}"), file=sys.stderr)
    print(printable(f"report: {out} ({len(text.encode()) / 1e6:.2f} MB)"), file=sys.stderr)
    return {"path": str(out), "bytes": len(text.encode()), "verdicts": verdicts}


def read_records(runs: list[str]) -> list[RunRecord]:
    """The runs in the order given, with a short name each. Raises InputError for none, and for too many."""
    if not runs:
        raise InputError("no run given: cmt-mae report RUN [RUN ...]")
    if len(runs) > MOST_RUNS:
        raise InputError(f"{len(runs)} runs are too many for one page: give {MOST_RUNS} or fewer")
    return [read_run(run, label) for run, label in zip(runs, labels_of(runs), strict=True)]


def default_out(records: list[RunRecord]) -> Path:
    """Beside the run's other files; for several runs in the current folder."""
    return records[0].path / "report.html" if len(records) == 1 else Path("report.html")


def is_ours(out: Path) -> bool:
    """Whether nothing would be lost by writing there: no file, or an older page."""
    if not out.exists():
        return True
    if not out.is_file():
        return False
    with open(out, "rb") as file:
        return MARK in file.read(4096)
