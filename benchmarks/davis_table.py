"""docs/results/davis.json and davis.md, from result files and from what benchmarks.davis measured."""

import json
from pathlib import Path
from typing import Any

from benchmarks.davis import RESULTS, TARGET
from cmt_mae.core.files import write_json
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.video.protocol import PRESETS

PUBLISHED = {
    "blackswan": (0.8730, 0.9005),
    "dog": (0.8640, 0.7898),
    "scooter-black": (0.7308, 0.5847),
}
"""J and F of DINO's script on these sequences with DeiT-Tiny, on CPU, by the official metrics (the issue)."""


def table(folder: Path) -> None:
    """docs/results/davis.json and davis.md from the result files of a folder."""
    found = [Result.load(file) for file in sorted(folder.glob("davis-*.json"))]
    found.sort(
        key=lambda r: (r.backbone["digest"], r.protocol["name"] != "dino", r.protocol["name"])
    )
    rows = []
    for result in found:
        preset = PRESETS[result.protocol["name"].split("+")[0]]
        plain = {"name", "size"}
        changes = {
            k: result.protocol[k]
            for k, v in ({"layer": None} | preset).items()
            if k not in plain and result.protocol[k] != v
        }
        sequences = result.details["sequences"]
        kept = ("name", "input", "grid", "J_mean", "F_mean", "J&F")
        rows.append(
            {
                "backbone": Path(result.backbone["name"]).name,
                "digest": result.backbone["digest"],
                "protocol": result.protocol["name"],
                "changes": changes,
                "metrics": result.metrics,
                "sequences": [{k: s[k] for k in kept} for s in sequences],
                "date": result.date,
            }
        )
    content = {
        "what": "J and F in percent on three DAVIS-2017 sequences of one object each (not the whole val set)",
        "published_script_deit_tiny": {k: {"J": j, "F": f} for k, (j, f) in PUBLISHED.items()},
        "rows": rows,
        "data": {k: v for k, v in found[0].data.items() if k != "path"},
        "versions": found[0].versions,
        "hardware": found[0].hardware,
    }
    write_json(RESULTS / "davis.json", content)
    (RESULTS / "davis.md").write_text(page(content), encoding="utf-8")


def page(content: dict[str, Any]) -> str:
    """The tables of davis.md."""
    names = list(PUBLISHED)
    lines = [
        "# DAVIS-2017: label propagation with frozen features",
        "",
        "J / F in percent, first and last frame dropped, on the three sequences in shared/data/davis (one object "
        "each). These are not numbers of the whole validation set (30 sequences, 61 objects), so they do not "
        "compare with the paper's Table 3.",
        "",
        "| backbone | protocol | J&F | J | F | " + " | ".join(names) + " |",
        "|---|---|---|---|---|" + "---|" * len(names),
    ]
    script = " | ".join(f"{100 * j:.2f} / {100 * f:.2f}" for j, f in PUBLISHED.values())
    means = [100 * sum(v) / len(PUBLISHED) for v in zip(*PUBLISHED.values(), strict=True)]
    lines.append(
        f"| DeiT-Tiny | the published script (given with the issue) | {sum(means) / 2:.2f} | {means[0]:.2f} | "
        f"{means[1]:.2f} | {script} |"
    )
    for row in content["rows"]:
        by_name = {s["name"]: s for s in row["sequences"]}
        cells = " | ".join(
            f"{by_name[n]['J_mean']:.2f} / {by_name[n]['F_mean']:.2f}" for n in names
        )
        changed = ", ".join(f"{k} = {v}" for k, v in row["changes"].items())
        protocol = f"{row['protocol'].split('+')[0]}{', ' + changed if changed else ''}"
        m = row["metrics"]
        lines.append(
            f"| {row['backbone'].removesuffix('.safetensors')} | {protocol} | {m['J&F']:.2f} | "
            f"{m['J_mean']:.2f} | {m['F_mean']:.2f} | {cells} |"
        )
    lines += [
        "",
        "With `positions = scale_factor`, DINO's own way of resizing positions, the published script's "
        "numbers come out to the last digit given. The default resizes them to the grid's size (spec 9.1); "
        "that is the whole difference.",
        "",
        f"Command: `cmt-mae evaluate davis --backbone B --data shared/data/davis --protocol P --out OUT`. "
        f"{content['hardware']['name']}, torch {content['versions']['torch']}, "
        f"timm {content['versions']['timm']}, {content['rows'][0]['date'][:10]}.",
    ]
    if TARGET.is_file():
        lines += ["", *speed_lines(json.loads(TARGET.read_text()))]
    return "\n".join(lines) + "\n"


def speed_lines(content: dict[str, Any]) -> list[str]:
    """The tables of davis_speed.json."""
    lines = ["## Speed of the propagation", ""]
    if "speed" in content:
        lines += [
            "The published loop (all pairs of patches, exp, mask, top-k over the whole context) against ours, "
            "features given, in turns in one process; medians.",
            "",
            "| features of | grid x width | threads | published, ms a frame | ours | ratio (range) "
            "| labels differ by |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in content["speed"]["rows"]:
            for key in [k for k in row if k.startswith("threads_")]:
                v = row[key]
                lines.append(
                    f"| {row['backbone'].removesuffix('.safetensors')}, {row['sequence']}, {row['frames']} frames "
                    f"| {row['grid'][0]} x {row['grid'][1]} x {row['width']} | {key[8:]} | "
                    f"{v['published_ms_a_frame']:.0f} | {v['ours_ms_a_frame']:.0f} | {v['ratio_median']:.1f} "
                    f"({v['ratio_range'][0]:.1f} to {v['ratio_range'][1]:.1f}) | "
                    f"{v['largest_difference_of_soft_labels']:.1e} |"
                )
        load = [row.get("load_average") for row in content["speed"]["rows"]]
        lines += [
            "",
            f"{content['speed']['hardware']['cores']} cores; load of the machine before each row: {load}.",
            "",
            "The aim of 5 times is met at DeiT-Tiny's width and missed at ViT-B's 768: there the products of "
            "features weigh most, and the strips that hold the neighbourhoods still make 52 % of all pairs "
            "(28 % lie within radius 12; smaller tiles made fewer but slower products). Random ViT-B "
            "features are almost alike, so rounding changes which neighbours are kept; no pixel is decided "
            "otherwise.",
        ]
    for row in content.get("memory", {}).get("rows", []):
        lines += [
            "",
            f"Memory: {row['frames']} frames of {row['size'][1]} x {row['size'][0]} with {row['architecture']} "
            f"({row['weights']} weights), grid {row['grid'][0]} x {row['grid'][1]}: "
            f"{row['peak_GiB']} GiB at the peak of the whole process.",
        ]
    return lines
