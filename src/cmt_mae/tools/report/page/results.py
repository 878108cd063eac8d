"""The results of the runs as `cmt-mae compare` puts them: a mark stands for one protocol on one data set."""

from typing import Any

from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.text import one_line
from cmt_mae.tools.report.compare import Comparison, collect, tabulate
from cmt_mae.tools.report.comparison_text import TITLES, footnote_lines, gain_lines, shown


def results_table(records: list[RunRecord]) -> dict[str, Any]:
    """Columns, rows and footnotes of everything that was evaluated; ``notes`` says what was left out."""
    found, notes = collect([str(record.path) for record in records])
    table = tabulate(found, []) if found else Comparison([], [], {}, [])
    rows = [
        {
            "name": one_line(row.name, 120),
            "network": one_line(row.network, 80),
            "weights": row.weights[:8],
            "cells": [
                [
                    {"text": shown(number), "mark": number.mark}
                    for number in row.cells.get(column, [])
                ]
                for column in table.columns
            ],
        }
        for row in table.rows
    ]
    return {
        "columns": [f"{title(task)} {title(metric)}" for task, metric in table.columns],
        "rows": rows,
        "footnotes": footnotes(table),
        "gains": gain_lines(table),
        "notes": [one_line(note) for note in [*notes, *table.notes]],
    }


def title(word: str) -> str:
    """The usual name of a task or a metric."""
    return TITLES.get(word, one_line(word, 60))


def footnotes(table: Comparison) -> list[dict[str, str]]:
    """Each mark with its short line, and the line with every setting where that says more."""
    whole = dict(footnote_lines(table, whole=True))
    return [
        {"mark": mark, "text": text, "whole": whole[mark] if whole[mark] != text else ""}
        for mark, text in footnote_lines(table, whole=False)
    ]
