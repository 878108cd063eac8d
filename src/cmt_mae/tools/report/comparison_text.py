"""A comparison as people read it: a table on the terminal, Markdown, or JSON."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cmt_mae.core.files import write_text
from cmt_mae.core.text import printable
from cmt_mae.evaluate.tasks import TASKS
from cmt_mae.tools.report.markdown import escaped, markdown_table
from cmt_mae.tools.report.paper import SOURCE

if TYPE_CHECKING:
    from cmt_mae.tools.report.compare import Column, Comparison, Number, Row

TITLES = {name: task.title for name, task in TASKS.items()} | {
    "top1": "top-1",
    "box/AP": "AP box",
    "mask/AP": "AP mask",
    "J_mean": "J",
    "F_mean": "F",
}
NARROWEST = 12  # characters of a name; longer ones are folded where room is short


def write(
    comparison: Comparison, format: str | None, out: str | None, protocols: bool = False
) -> None:
    """Print to stdout, or write ``out`` atomically; notes go to stderr. protocols: every setting of each.

    format: table, markdown or json; None: by the ending of ``out``. Raises InputError where it cannot be written.
    """
    if format is None:
        endings = {".md": "markdown", ".markdown": "markdown", ".json": "json"}
        format = endings.get(Path(out).suffix.lower(), "table") if out is not None else "table"
    if format == "json":
        text = as_json(comparison)
    elif format == "markdown":
        text = as_markdown(comparison, protocols)
    else:
        text = as_plain_table(comparison, protocols) if out is not None else ""
    if not text:
        print_table(comparison, Console(), protocols)
    elif out is None:
        sys.stdout.write(text)
    else:
        write_text(Path(out).expanduser(), text)
        print(f"written to {printable(out)}", file=sys.stderr)
    for note in comparison.notes:
        print(f"note: {printable(note)}", file=sys.stderr)


def as_json(comparison: Comparison) -> str:
    """Strict JSON: columns, rows with their numbers, footnotes with whole protocols, notes."""
    return json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n"


def as_plain_table(comparison: Comparison, protocols: bool = False) -> str:
    """The terminal's table as text, as wide as it needs to be."""
    text = io.StringIO()
    print_table(comparison, Console(file=text, force_terminal=False), protocols)
    return text.getvalue()


def print_table(comparison: Comparison, console: Console, protocols: bool = False) -> None:
    """The table, and its footnotes. A file or a pipe has no width: nothing is folded there."""
    terminal = console.is_terminal
    if not terminal:
        console = Console(file=console.file, width=10_000, color_system=None)
    table = make_table(comparison)
    # rich would cut the numbers; a terminal that is narrower still folds the lines itself
    unbounded = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).minimum)
    console.print(table)
    for line in gain_lines(comparison):
        console.print(Text(line), soft_wrap=not terminal)
    for mark, text in footnote_lines(comparison, protocols):
        console.print(Text(f"[{mark}] {text}"), soft_wrap=not terminal)


def _heading(column: Column) -> str:
    return f"{_title(column[0])}\n{_title(column[1])}"


def _cell(row: Row, column: Column) -> str:
    """One line per mark, so that each number stands beside its own."""
    return "\n".join(f"{shown(n)} [{n.mark}]" for n in row.cells.get(column, [])) or "–"


def make_table(comparison: Comparison) -> Table:
    """A rich table. Text objects: nothing in a name is read as markup."""
    table = Table()
    for name in ("backbone", "network"):
        table.add_column(name, overflow="fold", min_width=NARROWEST)
    for column in comparison.columns:
        cells = [_heading(column), *(_cell(row, column) for row in comparison.rows)]
        width = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        table.add_column(Text(cells[0]), justify="right", no_wrap=True, min_width=width)
    group = ""
    for row in comparison.rows:
        if group and row.group != group:
            table.add_section()
            table.add_row(Text(row.group, style="italic"))
        group = row.group
        network = Text(printable(row.network))
        if row.weights:
            network.append(f"\n{printable(row.weights[:8])}", style="dim")
        numbers = (Text(_cell(row, column)) for column in comparison.columns)
        table.add_row(Text(printable(row.name)), network, *numbers)
    return table


def as_markdown(comparison: Comparison, protocols: bool = False) -> str:
    """A GitHub table with raised marks, and the footnotes as a list under it."""
    columns = [escaped(f"{_title(task)} {_title(metric)}") for task, metric in comparison.columns]
    rows = []
    for row in comparison.rows:
        cells = [
            "<br>".join(f"{shown(n)} <sup>{n.mark}</sup>" for n in row.cells.get(column, [])) or "–"
            for column in comparison.columns
        ]
        weights = row.weights[:8] if row.weights else row.group
        if row.group == "measured" and not row.weights:
            weights = "unknown"
        rows.append([*map(escaped, (row.name, row.network, weights)), *cells])
    lines = [f"- {escaped(line)}" for line in gain_lines(comparison)]
    notes = footnote_lines(comparison, protocols)
    lines += [f"- <sup>{mark}</sup> {escaped(text)}" for mark, text in notes]
    table = markdown_table(["backbone", "network", "weights", *columns], rows, words=3)
    return "\n".join([table, "", *lines]) + "\n"


def shown(number: Number) -> str:
    """``71.25 (68.9–73.4)``, ``71.25 ± 0.31 (3 seeds)``, ``35.20 (2000 images)``, ``n/a``; the paper's as printed.

    In brackets: the 95 % interval over images or videos, or where none is known their number. ±: over seeds.
    """
    if math.isnan(number.value):
        return "n/a"
    if not number.seeds:
        return f"{number.value:.1f}"
    if number.spread is not None:
        return f"{number.value:.2f} ± {number.spread:.2f} ({number.n} seeds)"
    if number.interval is not None:
        low, high = number.interval
        return f"{number.value:.2f} ({low:.1f}–{high:.1f})"
    return f"{number.value:.2f}" + (f" ({number.counted})" if number.counted else "")


def gain_lines(comparison: Comparison) -> list[str]:
    """``runs/a minus its teacher embedded: k-NN top-1 -7.50 (-12.10 to -2.90)``, one line per student and task."""
    lines = []
    for one in comparison.gains:
        task, metric = one.column
        ends = f"no interval known{f' of {one.over}' if one.over else ''}"
        if one.interval is not None:
            ends = f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}"
        differs = f"; {one.differs}" if one.differs else ""
        lines.append(printable(
            f"{one.student} minus its teacher {one.teacher}: {_title(task)} {_title(metric)} "
            f"{one.difference:+.2f} ({ends}){differs}"
        ))  # fmt: skip
    return lines


def footnote_lines(comparison: Comparison, whole: bool = True) -> list[tuple[str, str]]:
    """(mark, what it stands for) in one line each; a protocol like an earlier one says how it differs.

    whole: every setting of a protocol, not only its name and its data.
    """
    lines: list[tuple[str, str]] = []
    before: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    for mark, note in comparison.footnotes.items():
        if "source" in note:
            continue
        same_name = (note["task"], str(note["protocol"]["name"]))
        first_mark, first = before.setdefault(same_name, (mark, note))
        head = f"{_title(note['task'])}, protocol {note['protocol']['name']}"
        like = _differences(first, note) if first is not note else None
        text = (
            f"{head}: as [{first_mark}], but {like}" if like else f"{head}; {_about(note, whole)}"
        )
        lines.append((mark, f"{text}; seed {_value(note['seeds'])}"))
    numbers = [n for row in comparison.rows for cell in row.cells.values() for n in cell]
    if any(number.interval is not None for number in numbers):
        lines.append(
            (
                "(–)",
                "95 % interval over the images (Wilson; of mIoU the bootstrap) or the videos (Student)",
            )
        )
    if any(number.spread is not None for number in numbers):
        lines.append(("±", "sample standard deviation over seeds"))
    lines += _paper_lines([n for n in comparison.footnotes.items() if "source" in n[1]])
    return [(mark, printable(text)) for mark, text in lines]


def _paper_lines(notes: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """The tables' number, each task's protocol once, each doubt once."""
    if not notes:
        return []
    lines = [("Pn", f"table n of the paper ({SOURCE}) as printed there, not measured here")]
    protocols = {task: words for _, note in notes for task, words in note["protocol"].items()}
    lines += [("Pn", f"{_title(task)}: {words}") for task, words in protocols.items()]
    doubts: dict[str, str] = {}
    for mark, note in notes:
        doubts.update(zip(mark.partition("†")[2].split(","), note["doubts"], strict=False))
    return lines + [
        (f"†{number}", f"doubt: {doubts[number]}") for number in sorted(doubts, key=int)
    ]


def _about(note: dict[str, Any], whole: bool) -> str:
    """Data and, where asked for, every setting of a protocol."""
    if not whole:
        return f"data {_data(note['data'])}"
    settings = {k: v for k, v in note["protocol"].items() if k not in ("name", "headline")}
    return f"data {_data(note['data'])}; {_settings(settings)}; headline {note['protocol']['headline']}"


def _data(data: dict[str, Any]) -> str:
    """Path, start of the fingerprint, and the counts."""
    rest = {k: v for k, v in data.items() if k not in ("path", "fingerprint")}
    fingerprint = str(data.get("fingerprint") or "none")[:12]
    path = data.get("path") or "unnamed"
    return f"{path} (fingerprint {fingerprint}{', ' if rest else ''}{_settings(rest)})"


def _differences(first: dict[str, Any], note: dict[str, Any]) -> str | None:
    """In words, what changed from ``first``; None where little is the same, so that all is said."""
    old, new = first["protocol"], note["protocol"]
    changed = [key for key in {**old, **new} if _unlike(old, new, key)]
    if len(changed) > max(3, len(new) // 2):
        return None
    words = [f"{key} {_of(new, key)} instead of {_of(old, key)}" for key in changed]
    places = [{k: v for k, v in n["data"].items() if k != "path"} for n in (first, note)]
    if json.dumps(places[0], sort_keys=True) != json.dumps(places[1], sort_keys=True):
        words.append(f"data {_data(note['data'])}")
    return ", ".join(words)


def _unlike(old: dict[str, Any], new: dict[str, Any], key: str) -> bool:
    """Whether a setting differs, as the marks see it: 1 and 1.0 are two, absent and null too."""
    if (key in old) != (key in new):
        return True
    return json.dumps(old[key], sort_keys=True) != json.dumps(new[key], sort_keys=True)


def _of(settings: dict[str, Any], key: str) -> str:
    return _value(settings[key], 10) if key in settings else "not said"


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_value(value)}" for key, value in settings.items())


def _value(value: Any, digits: int = 4) -> str:
    """A setting in few characters: lists without brackets, true as yes; text with commas in quotes."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list) and value and not any(isinstance(v, list | dict) for v in value):
        return " / ".join(_value(one, digits) for one in value)
    if isinstance(value, str):
        return f"'{value}'" if set(value) & set(",;") else value
    return json.dumps(value)


def _title(word: str) -> str:
    """The usual name of a task or metric."""
    return printable(TITLES.get(word, word))
