"""docs/results/speed.md from docs/results/speed.json (python -m benchmarks.side_by_side --page)."""

from typing import Any

TITLES = {
    "mae": "MAE's step",
    "cmt": "CMT-MAE's step",
    "profile": "Where a step's time goes, and the limit",
    "cost": "Cost against multiplications",
    "memory": "Memory",
    "loader": "Loading images",
}


def page(content: dict[str, Any]) -> str:
    """The whole page."""
    entries = list(content["comparisons"].values())
    versions, hardware = content["versions"], content["hardware"]
    lines = ["# Speed, side by side", ""]
    if any(entry["quick"] for entry in entries):
        lines += [
            "**A quick run: it shows that the comparisons work. The numbers are no measurement.**",
            "",
        ]
    lines += [
        "Contestants take turns, in one process or (where that is said) each in its own, each round beginning "
        "with another one, with the same shapes, threads and data type. Given are the median of the rounds, the "
        "lowest and the highest, and the median (lowest to highest) of the ratios within a round: how many times "
        "our time the other one takes. Above 1: ours is faster.",
        "",
        f"Command: `{content['command']}`. {hardware['processor']}, {hardware['cores']} cores; Python "
        f"{versions['python']}, torch {versions['torch']}, timm {versions['timm']}, torchvision "
        f"{versions['torchvision']}, Pillow {versions['pillow']}.",
        "",
        *summary(entries),
    ]
    for part, title in TITLES.items():
        chosen = [entry for entry in entries if entry["part"] == part]
        if chosen:
            lines += [f"## {title}", ""]
        for entry in chosen:
            lines += section(entry)
    lines += [
        "The propagation of masks through videos is measured apart: docs/results/davis_speed.json, from "
        "`python -m benchmarks.davis`.",
        "",
    ]
    return "\n".join(lines).rstrip() + "\n"


def summary(entries: list[dict[str, Any]]) -> list[str]:
    """What was wanted, and what was found."""
    rows = [row for entry in entries for row in verdicts(entry)]
    if not rows:
        return []
    table = ["| what | wanted | found | |", "|---|---|---|---|"]
    table += [
        f"| {what} | {wanted} | {found} | {'met' if met else 'missed'} |"
        for what, wanted, found, met in rows
    ]
    return ["## Wanted and found", "", *table, ""]


def verdicts(entry: dict[str, Any]) -> list[tuple[str, str, str, bool]]:
    """(what, wanted, found, met) for every target of a comparison."""
    rows = []
    for name, least in entry.get("target", {}).items():
        ratio = entry["contestants"][name]["times_ours"]
        found = f"{ratio['median']:.2f} x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        rows.append(
            (f"{entry['name']} against {name}", f"{least:g} x", found, ratio["median"] >= least)
        )
    facts = entry.get("facts", {})
    if "stage_two_over_mae" in facts:
        cost = facts["stage_two_over_mae"]
        wanted = f"at most {cost['wanted_excess_at_most']:g} x the FLOP ratio of {cost['flop']:.2f}"
        found = f"{cost['time']:.2f} x the time, {cost['excess']:.2f} x the FLOP ratio"
        met = cost["excess"] <= cost["wanted_excess_at_most"]
        rows.append((f"{entry['name']}: stage two over our mae", wanted, found, met))
    if "packed_over_torchvision" in facts:
        found, least = facts["packed_over_torchvision"], facts["packed_over_torchvision_wanted"]
        what = f"{entry['name']}: packed against torchvision"
        rows.append((what, f"{least:g} x", f"{found:.1f} x", found >= least))
    if "allowed_gb" in facts:
        allowed, found = facts["allowed_gb"], facts["stage_two_gb"]
        wanted = f"at most {allowed:.2f} GB ({facts['rule']})"
        rows.append((f"{entry['name']}: stage two", wanted, f"{found:.2f} GB", found <= allowed))
    return rows


def section(entry: dict[str, Any]) -> list[str]:
    """One comparison."""
    lines = [f"### {entry['name']}", "", entry["what"], ""]
    if "peaks" in entry:
        lines += ["| contestant | peak above start, GB | frozen weights, GB |", "|---|---|---|"]
        lines += [
            f"| {name} | {row['above_start_gb']:.2f} | {row['frozen_gb']:.2f} |"
            for name, row in entry["peaks"].items()
        ]
    elif "milliseconds" in entry:
        lines += profile_table(entry)
    else:
        lines += table(entry)
    lines += ["", f"{entry['date']}, {entry['threads']} thread(s){rounds(entry)}{known(entry)}."]
    lines += [f"Not compared: {name} ({why})." for name, why in entry.get("absent", {}).items()]
    return [*lines, ""]


def table(entry: dict[str, Any]) -> list[str]:
    """Contestants in rows."""
    gflop = entry["facts"].get("gflop_per_image")
    last = "GFLOP an image | GFLOP/s" if gflop else "times ours"
    lines = [
        f"| contestant | seconds | {entry['unit']}/s | {last} |",
        "|---|---|---|---|" + ("---|" if gflop else ""),
    ]
    for name, row in entry["contestants"].items():
        if gflop:
            end = f"{gflop[name]:.4g} | {row['gflop_per_second']:.4g}"
        else:
            ratio = row.get("times_ours")
            end = (
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
                if ratio
                else "1"
            )
        seconds = f"{row['median']:.4g} ({row['low']:.4g} to {row['high']:.4g})"
        lines.append(f"| {name} | {seconds} | {row['rate']:.4g} | {end} |")
    return lines


def profile_table(entry: dict[str, Any]) -> list[str]:
    """Kinds of operations in rows."""
    columns, facts = entry["milliseconds"], entry["facts"]
    totals = {name: sum(kinds.values()) for name, kinds in columns.items()}
    lines = ["| ms a step | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for kind in next(iter(columns.values())):
        cells = [
            f"{kinds[kind]:.1f} ({kinds[kind] / totals[name]:.0%})"
            for name, kinds in columns.items()
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines.append("| together | " + " | ".join(f"{total:.1f}" for total in totals.values()) + " |")
    reach = "can" if facts["limit"] >= facts["wanted_ratio"] else "cannot"
    return [
        *lines,
        "",
        f"Wanted: {facts['wanted_ratio']:g} x {facts['rival']}. With nothing but the matrix products left, our "
        f"step would be {facts['limit']:.2f} x as fast: the wanted ratio {reach} be reached with these products "
        "in fp32.",
    ]


def rounds(entry: dict[str, Any]) -> str:
    """How often, if it was timed."""
    return f", {entry['rounds']} rounds" if "rounds" in entry else ""


def known(entry: dict[str, Any]) -> str:
    """Checks and settings that are single numbers or words."""
    facts = {
        k: v
        for k, v in entry.get("facts", {}).items()
        if isinstance(v, int | float | str) and not k.endswith(("wanted", "_gb", "rule"))
    }
    texts = [
        f"{k.replace('_', ' ')}: {v:.4g}" if isinstance(v, float) else f"{k.replace('_', ' ')}: {v}"
        for k, v in facts.items()
    ]
    return "; " + ", ".join(texts) if texts else ""
