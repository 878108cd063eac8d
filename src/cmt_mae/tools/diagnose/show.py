"""The doctor's report for people: a few lines for each part, then what is wrong and how to fix it."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cmt_mae.core.text import duration, printable

Line = tuple[str, str]


def show(report: dict[str, Any], console: Console) -> None:
    """Facts, then findings, then one line that counts them. Nothing in a name is read as markup."""
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    parts = {
        "machine": machine_lines, "data": data_lines, "teacher": teacher_lines, "aim": aim_lines,
        "settings": plan_lines, "estimate": estimate_lines, "run": run_lines,
    }  # fmt: skip
    for part, lines in parts.items():
        if part not in report:
            continue
        table.add_row(Text(part, style="bold"), "")
        facts = report[part]
        found = [("error", facts["error"])] if "error" in facts else lines(facts)
        for name, value in found:
            table.add_row(Text(f"  {name}"), Text(printable(value)))
    console.print(table)
    for one in report["findings"]:
        style = "bold red" if one["level"] == "problem" else "bold yellow"
        console.print(Text(f"{one['level']}: {one['what']} ({one['part']})", style=style))
        console.print(Text(printable(f"  {one['why']}")))
        console.print(Text(printable(f"  how to fix it: {one['fix']}")))
    console.print(Text(report["summary"], style="bold"))


def machine_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """The machine."""
    hardware, disk, memory = facts["hardware"], facts["disk"], facts["memory"]
    gpu = f", {hardware['gpu']} of {facts['gpu_memory_gb']} GB" if "gpu_memory_gb" in facts else ""
    yield "device", f"{facts['device']}{gpu}, {facts['precision']}"
    yield "cores", (
        f"{facts['cores']:g} usable of {hardware['cores']} ({hardware['processor']}), {hardware['threads']} "
        "thread(s) for torch"
    )  # fmt: skip
    shared = facts["shared_memory_gb"]
    beside = "" if shared is None else f"; /dev/shm {shared} GB"
    yield "memory", f"{memory['free_gb']} of {memory['total_gb']} GB free{beside}"
    yield "disk", f"{disk['folder']}: {disk['error'] or str(disk['free_gb']) + ' GB free'}"


def data_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Images."""
    yield "path", facts["path"]
    if facts["classes"]:
        one = facts["classes"]
        few, many = one["least"][1], one["most"][1]
        yield "classes", f"{one['count']}, of {few} ({one['least'][0]}) to {many} images"
    for name, split in facts["splits"].items():
        whole = split["looked_at"] == split["images"]
        looked = "all looked at" if whole else f"a sample of {split['looked_at']} looked at"
        yield name, (
            f"{split['images']} images ({looked}): {split['broken']} broken, {split['copies']} copies, "
            f"{split['one_colour']} of one colour"
        )  # fmt: skip
        if split["height"]:
            (h0, h1, h2), (w0, w1, w2) = split["height"], split["width"]
            yield "", (
                f"height {h0} / {h1} / {h2}, width {w0} / {w1} / {w2} (least / median / most), "
                f"{split['kilobytes'][1]:g} kB"
            )  # fmt: skip
    if "in_both_splits" in facts:
        yield "in both splits", str(len(facts["in_both_splits"]))


def teacher_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Teacher."""
    yield "name", facts["name"]
    licence = facts["licence"] or "not stated"
    yield (
        "weights",
        f"{facts['source']}; licence {licence}; {facts['million_parameters']} M parameters",
    )
    height, width = facts["input_size"]
    yield "input", (
        f"{height} x {width} px, grid {facts['grid']}, student's grid {facts['student_grid']}"
    )  # fmt: skip
    known = facts["known_features"]
    yield "known features", (
        f"agree ({known['numbers']} numbers, largest difference {known['largest_difference']:.1g} of "
        f"{known['allowed']:g} allowed)"
        if known["recorded"] else "none recorded in these weights"
    )  # fmt: skip
    yield "activation", ", ".join(facts["activation"]) or "not named"
    low, high = facts["attention_entropy_range"]
    yield "attention", (
        f"entropy {facts['attention_entropy']:.3f} of uniform (images {low:.3f} to {high:.3f}), class token keeps "
        f"{facts['attention_class_mass']:.1%}, {facts['attention_image_share']:.0%} of its variance from images"
    )  # fmt: skip
    yield "features", (
        f"{facts['feature_width']} channels that fill {facts['feature_rank']:.3g} directions, "
        f"{facts['feature_image_share']:.0%} of their variance from images"
    )  # fmt: skip
    yield "seen on", facts["shown"]


def aim_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Whether the guiding map lies on objects."""
    yield "guided mask", facts["verdict"]
    for name, one in facts.get("maps", {}).items():
        more = one["hidden_more"]
        drawn = "" if more is None else f"; hidden on objects {more:+.3f} more than on background"
        yield name, f"AUC {one['auc']:.3f} ± {one['error']:.3f}{drawn}"


def plan_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Plan of the run-to-be."""
    images = "unknown number of images" if facts["images"] is None else f"{facts['images']} images"
    yield "plan", (
        f"{images}, {facts['epochs']:.4g} epochs of {facts['steps_per_epoch']} steps; {facts['n_mask']} of "
        f"{facts['n_patches']} patches hidden; lr {facts['lr']:.4g}"
    )  # fmt: skip


def estimate_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """What the run takes."""
    for name, one in facts["stages"].items():
        how = (
            f"from steps of {one['measured_images']} images" if one["extrapolated"] else "measured"
        )
        yield f"stage {name}", (
            f"{one['steps']} steps of {one['step_seconds']:.3g} s ({how}), "
            f"{one['images_per_second']:.4g} images/s, waiting for data {one['data_wait_share']:.0%}"
        )  # fmt: skip
    if "out_of_memory" in facts:
        return
    if facts["seconds"] is not None:
        low, high = facts["seconds_range"]
        span = f"{duration(low)} to {duration(high)}"
        yield "time", f"{duration(facts['seconds'])} ({span}), one process"
    else:
        yield "time", "unknown, as the number of images is: give --data or --images"
    yield "memory", f"{facts['memory_gb']:.2f} GB at the peak"
    one = facts["checkpoint"]
    yield "disk", (
        f"{one['disk_gb']:.2f} GB: checkpoints of {one['gb']:.3f} GB, {one['seconds']:.2g} s each, "
        f"{one['written']} written"
    )  # fmt: skip
    if facts["probe"]["measured"]:
        yield "k-NN", f"{facts['probe']['measured']} times {duration(facts['probe']['seconds'])}"


def run_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """A run."""
    total = "" if facts["total_steps"] is None else f" of {facts['total_steps']}"
    yield "path", facts["path"]
    yield "verdict", facts["verdict"]
    yield "state", (
        f"{facts['state']}, step {facts['step']}{total}, {facts['skipped_steps']} skipped"
    )  # fmt: skip
    if facts["losses"]:
        yield "losses", ", ".join(f"{name} {value:.4g}" for name, value in facts["losses"].items())
    if facts["knn_top1"]:
        newest = facts["knn_top1"][-4:]
        yield "k-NN top-1", " -> ".join(f"{value:.1f} (step {step})" for step, value in newest)
    if facts["images_per_second"]:
        wait = facts["data_wait_share"] or 0.0
        yield "speed", f"{facts['images_per_second']:.4g} images/s, waiting for data {wait:.0%}"
    if facts["bad_images"]:
        yield "broken images", str(facts["bad_images"])
