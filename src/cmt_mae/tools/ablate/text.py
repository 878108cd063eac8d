"""The table in Markdown."""

import statistics
from typing import Any

from cmt_mae.tools.ablate.statistics import LEVEL
from cmt_mae.tools.report.markdown import escaped as cell
from cmt_mae.tools.report.markdown import markdown_table


def markdown(content: dict[str, Any]) -> str:
    """The whole page."""
    parts = [
        f"# {cell(content['title'])}", introduction(content), main_table(content), *axis_tables(content),
        notes(content),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def introduction(content: dict[str, Any]) -> str:
    """What ran, in two lines."""
    settings = content["settings"]
    scale = ",".join(last_part(one) for one in str(content["recipe"]).split(","))
    student = f"{settings.get('student.preset')} at {settings.get('student.img_size')} px"
    return (
        f"Experiment {cell(content['experiment'])}, scale {cell(scale)}: student {student}, "
        f"{settings.get('epochs')} epochs of {cell(last_part(settings.get('data.path')))}, batch "
        f"{settings.get('batch_size')}, teacher "
        f"{cell(last_part(settings.get('teacher.name')))}. "
        f"{content['runs_done']} of {content['runs_planned']} runs are done. "
        "Percent: mean ± standard deviation between seeds (number of seeds)."
    )


def last_part(path: Any) -> str:
    """A path without where it lies on this machine; other names stay."""
    return str(path).rstrip("/").rsplit("/", 1)[-1]


def main_table(content: dict[str, Any]) -> str:
    """A row per variant."""
    columns, numbers = content["columns"], content["paper"]["numbers"]
    papers = list(dict.fromkeys(key for row in numbers.values() for key in row))
    head = [
        "variant",
        *(cell(c["title"]) for c in columns),
        *(f"paper: {key}" for key in papers),
        "minutes",
    ]
    lines = []
    for one in content["variants"]:
        name = one["name"]
        if not one["done"]:
            continue
        title = cell(name) + (f": {cell(one['what'])}" if one["what"] else "")
        if name == content["baseline"]:
            title += " (baseline)"
        row = [title, *(number(c, name) for c in columns)]
        row += [str(numbers.get(name, {}).get(key, "")) for key in papers]
        lines.append([*row, "" if one["minutes"] is None else f"{one['minutes']:.1f}"])
    for title, key in (
        ("spread between seeds", "spread"),
        ("difference that would be seen", "detectable"),
    ):
        lines.append([title, *(some(c[key]) for c in columns), *[""] * (len(papers) + 1)])
    return markdown_table(head, lines)


def some(value: float | None) -> str:
    """One decimal place, or nothing."""
    return "" if value is None else f"{value:.1f}"


def number(column: dict[str, Any], variant: str) -> str:
    """Mean, spread, number of seeds, and the mark."""
    values = list(column["values"].get(variant, {}).values())
    if not values:
        return ""
    text = f"{statistics.fmean(values):.1f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.1f}"
    effect = column["effects"].get(variant)
    star = "" if effect is None or effect["p"] is None or effect["p"] >= LEVEL else " *"
    return f"{text} ({len(values)}){star}"


def axis_tables(content: dict[str, Any]) -> list[str]:
    """One small table for each axis: what its values change on average over everything else."""
    tables = []
    for axis in content["columns"][0]["axes"] if content["columns"] else []:
        columns = content["columns"]
        levels = list(dict.fromkeys(level for c in columns for level in c["axes"][axis]))
        if not levels:
            continue
        first = next(one["levels"][axis] for one in content["variants"] if one["levels"])
        head = [f"{cell(axis)}, against {cell(first)}", *(cell(c["title"]) for c in columns)]
        lines = [
            [cell(level), *(difference(c["axes"][axis].get(level)) for c in columns)]
            for level in levels
        ]
        tables.append(markdown_table(head, lines))
    return tables


def difference(effect: dict[str, Any] | None) -> str:
    """Signed difference, pairs, mark."""
    if effect is None:
        return ""
    star = " *" if effect["p"] is not None and effect["p"] < LEVEL else ""
    return f"{effect['difference']:+.1f} ({effect['n']} pairs){star}"


def notes(content: dict[str, Any]) -> str:
    """How to read it, what is missing."""
    lines = [
        f"\\* p < {LEVEL}. Rows: {content['tests']['rows']}."
        + (
            f" Axes: {content['tests']['axes']}."
            if any(c["axes"] for c in content["columns"])
            else ""
        )
        + " No test where the seeds leave fewer than 4 degrees of freedom, or fewer than 3 pairs. An unmarked "
        "difference is not shown to be zero: the last line says what would have been seen (power 80 %)."
    ]
    if content["paper"]["numbers"]:
        lines.append(
            f"The paper's numbers ({content['paper']['source']}) are ViT-B/16 on ImageNet-1K, 800 epochs: compare "
            "the order, not the values."
        )
    for name, reason in content["failed"].items():
        lines.append(f"Failed: {cell(name)}: {cell(reason)}")
    untouched = [one["name"] for one in content["variants"] if not one["done"]]
    if untouched:
        lines.append(f"No run is done yet of: {cell(', '.join(untouched))}.")
    missing = content["runs_planned"] - content["runs_done"] - len(content["failed"])
    if missing:
        lines.append(f"{missing} runs are still to be made: the same command continues.")
    hardware, versions = content["hardware"], content["versions"]
    lines.append(
        f"Minutes: of the training steps, one run, stage one counted even where a sibling's was taken. "
        f"{hardware['processor']}, torch {versions['torch']}, timm {versions['timm']}. {content['date']}."
    )
    return "\n\n".join(lines)
