"""The doctor's report for people: a few lines for each part, then what is wrong and the mend."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cmt_mae.core.text import printable

Line = tuple[str, str]


def show(report: dict[str, Any], console: Console) -> None:
    """Facts, then findings, then one line that counts them. Nothing in a name is taken for markup."""
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    parts = {
        "machine": machine_lines, "data": data_lines, "teacher": teacher_lines, "settings": plan_lines,
        "estimate": estimate_lines, "run": run_lines,
    }  # fmt: skip
    for part, lines in parts.items():
        if part in report:
            table.add_row(Text(part, style="bold"), "")
            for name, value in lines(report[part]):
                table.add_row(Text(f"  {name}"), Text(printable(value)))
    console.print(table)
    for one in report["findings"]:
        style = "bold red" if one["level"] == "problem" else "bold yellow"
        console.print(Text(f"{one['level']}: {one['what']} ({one['part']})", style=style))
        console.print(Text(printable(f"  {one['why']}")))
        console.print(Text(printable(f"  mend: {one['mend']}")))
    console.print(Text(report["summary"], style="bold"))


def machine_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Environment."""
    versions, hardware, disk = facts["versions"], facts["hardware"], facts["disk"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    gpu = f", {hardware['gpu']} of {facts['gpu_memory_gb']} GB" if "gpu_memory_gb" in facts else ""
    peak = facts["peak"]["flops"] / 1e9
    yield (
        "device",
        f"{facts['device']}{gpu}, {facts['precision']}, {peak:.4g} GFLOP/s in a large matrix product",
    )
    yield (
        "cores",
        (
            f"{facts['cores']:g} usable of {hardware['cores']} ({hardware['processor']}), "
            f"{hardware['threads']} thread(s) "
            f"for torch, load {facts['load']}"
        ),
    )
    shared = (
        "" if facts["shared_memory_gb"] is None else f"; /dev/shm {facts['shared_memory_gb']} GB"
    )
    yield "memory", f"{facts['memory']['free_gb']} of {facts['memory']['total_gb']} GB free{shared}"
    works = {
        None: "torch.compile not tried (runtime.compile is false)",
        True: "torch.compile works",
        False: "torch.compile fails",
    }
    yield "compiler", f"{facts['compiler']['name'] or 'none'}; {works[facts['compiler']['works']]}"
    yield (
        "JPEG decoder",
        f"{facts['jpeg']['decoder']}, {facts['jpeg']['milliseconds']} ms for 500 x 375",
    )
    if disk["error"]:
        yield "disk", f"{disk['folder']}: {disk['error']}"
    else:
        yield (
            "disk",
            (
                f"{disk['folder']}: writes {disk['write_mb_s']} MB/s, reads {disk['read_mb_s']} MB/s, "
                f"{disk['free_gb']} GB free"
            ),
        )


def data_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Images."""
    yield "path", facts["path"]
    if facts["classes"]:
        one = facts["classes"]
        yield (
            "classes",
            f"{one['count']}, of {one['least'][1]} ({one['least'][0]}) to {one['most'][1]} images",
        )
    for name, split in facts["splits"].items():
        whole = split["looked_at"] == split["images"]
        looked = "all looked at" if whole else f"a sample of {split['looked_at']} looked at"
        yield (
            name,
            (
                f"{split['images']} images ({looked}): {split['broken']} broken, {split['copies']} copies, "
                f"{split['one_colour']} of one colour"
            ),
        )
        if split["height"]:
            (h0, h1, h2), (w0, w1, w2) = split["height"], split["width"]
            yield (
                "",
                (
                    f"height {h0} / {h1} / {h2}, width {w0} / {w1} / {w2} (least / median / most), "
                    f"{split['kilobytes'][1]:g} kB, read in {split['read_milliseconds']:.2g} ms, decoded in "
                    f"{split['decode_milliseconds']:.2g} ms"
                ),
            )
    if "in_both_splits" in facts:
        yield "in both splits", str(len(facts["in_both_splits"]))


def teacher_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Teacher."""
    yield "name", facts["name"]
    if "error" in facts:
        yield "error", facts["error"]
        return
    yield (
        "weights",
        f"{facts['source']}; licence {facts['licence'] or 'not stated'}; {facts['million_parameters']} M "
        f"parameters",
    )
    yield (
        "input",
        f"{facts['input_size'][0]} x {facts['input_size'][1]} px, grid {facts['grid']}, student's grid "
        f"{facts['student_grid']}",
    )
    known = facts["known_features"]
    yield "known features", (
        f"agree ({known['numbers']} numbers, largest difference {known['largest_difference']:.1g} of "
        f"{known['allowed']:g} allowed)"
        if known["recorded"] else "none recorded in these weights"
    )  # fmt: skip
    yield "activation", ", ".join(facts["activation"]) or "not named"
    low, high = facts["attention_entropy_range"]
    yield (
        "attention",
        (
            f"entropy {facts['attention_entropy']:.3f} of uniform (images {low:.3f} to {high:.3f}), class "
            "token keeps "
            f"{facts['attention_class_mass']:.1%}, {facts['attention_image_share']:.0%} of its variance from "
            "images"
        ),
    )
    yield (
        "features",
        (
            f"{facts['feature_width']} channels that fill {facts['feature_rank']:.3g} directions, "
            f"{facts['feature_image_share']:.0%} of their variance from images"
        ),
    )
    yield "seen on", facts["shown"]


def plan_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """Plan of the run-to-be."""
    if "error" in facts:
        yield "error", facts["error"]
        return
    images = "unknown number of images" if facts["images"] is None else f"{facts['images']} images"
    yield (
        "plan",
        (
            f"{images}, {facts['epochs']:g} epochs of {facts['steps_per_epoch']} steps; {facts['n_mask']} of "
            f"{facts['n_patches']} patches hidden; lr {facts['lr']:g}"
        ),
    )


def estimate_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """What the run takes."""
    for name, one in facts["stages"].items():
        how = (
            f"from steps of {one['measured_images']} images" if one["extrapolated"] else "measured"
        )
        yield (
            f"stage {name}",
            (
                f"{one['steps']} steps of {one['step_seconds']:.3g} s ({how}), {one['images_per_second']:.4g} "
                "images/s, waiting "
                f"for data {one['data_wait_share']:.0%}"
            ),
        )
    if "out_of_memory" in facts:
        return
    if facts["seconds"] is not None:
        low, high = facts["seconds_range"]
        yield (
            "time",
            f"{duration(facts['seconds'])} ({duration(low)} to {duration(high)}), one process",
        )
    else:
        yield "time", "give --data or --images: nobody has said how many images there are"
    yield "memory", f"{facts['memory_gb']:.2f} GB at the peak"
    one = facts["checkpoint"]
    yield (
        "disk",
        f"{one['disk_gb']:.2f} GB: checkpoints of {one['gb']:.3f} GB, {one['seconds']:.2g} s each, "
        f"{one['written']} written",
    )
    if facts["probe"]["measured"]:
        yield "k-NN", f"{facts['probe']['measured']} times {duration(facts['probe']['seconds'])}"
    if facts.get("kilowatt_hours"):
        yield "energy", f"{facts['kilowatt_hours']:.3g} kWh"
    if facts.get("price"):
        yield "price", f"{facts['price']:.2f}"


def run_lines(facts: dict[str, Any]) -> Iterator[Line]:
    """A run."""
    total = "" if facts["total_steps"] is None else f" of {facts['total_steps']}"
    yield "path", facts["path"]
    yield (
        "state",
        f"{facts['state']}, step {facts['step']}{total}, {facts['skipped_steps']} skipped",
    )
    if facts["losses"]:
        yield "losses", ", ".join(f"{name} {value:.4g}" for name, value in facts["losses"].items())
    if facts["knn_top1"]:
        yield (
            "k-NN top-1",
            " -> ".join(f"{value:.1f} (step {step})" for step, value in facts["knn_top1"][-4:]),
        )
    if facts["images_per_second"]:
        yield (
            "speed",
            f"{facts['images_per_second']:.4g} images/s, waiting for data {facts['data_wait_share']:.0%}",
        )
    if facts["bad_images"]:
        yield "broken images", str(facts["bad_images"])


def duration(seconds: float) -> str:
    """Seconds in the unit that people would choose."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
