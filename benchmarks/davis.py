"""DAVIS: label propagation against the published loop (speed, equal results), and the memory of a long video.

    python -m benchmarks.davis speed --data DAVIS/ --backbone deit_tiny.safetensors [--backbone ...]
    python -m benchmarks.davis memory --data DAVIS/ [--architecture vit_base_patch16_224]
    python -m benchmarks.davis table --results OUT/results

``speed`` extracts the features of one sequence once, then carries its first mask through it in both ways, in
turns, in one process, with 1 and 2 threads: medians and ratios of at least 7 repetitions. ``memory`` evaluates a
video of 90 frames with a ViT of random weights in a process of its own and reads that process's peak. Both
write into docs/results/davis_speed.json.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_mae.backbones import load_backbone, save_backbone
from cmt_mae.core.files import write_json
from cmt_mae.data.davis import VideoSequence, open_davis, read_mask
from cmt_mae.evaluate.result import hardware, versions
from cmt_mae.evaluate.video.evaluate import DavisConfig, evaluate_davis
from cmt_mae.evaluate.video.features import make_extractor, patch_of
from cmt_mae.evaluate.video.propagate import Propagation, decide, first_labels
from cmt_mae.evaluate.video.protocol import PRESETS, VideoProtocol, input_size
from cmt_mae.evaluate.video.sequence import read_batches

DINO = VideoProtocol(**PRESETS["dino"])

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TARGET = RESULTS / "davis_speed.json"


class PublishedLoop:
    """Spec 9.1 as the script does it: all patches against all patches of every context frame."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        """features (rows, columns, D); labels (K, rows, columns)."""
        self.first = (features.flatten(0, 1), labels)
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.near = neighbourhood(features.shape[0], features.shape[1], DINO.radius)

    def step(self, features: Tensor) -> Tensor:
        """Soft labels (K, rows, columns) of the next frame."""
        rows, columns = features.shape[:2]
        target = features.flatten(0, 1)
        context = [self.first, *self.queue]
        sources = F.normalize(torch.stack([frame.T for frame, _ in context]), dim=1)
        query = F.normalize(target, dim=1).expand(len(context), -1, -1)
        affinity = torch.exp(torch.bmm(query, sources) / DINO.temperature)
        affinity *= self.near
        affinity = affinity.transpose(2, 1).reshape(-1, rows * columns)  # sources x targets
        kept, _ = torch.topk(affinity, DINO.topk, dim=0)
        affinity[affinity < kept.min(0).values] = 0
        affinity /= affinity.sum(0, keepdim=True)
        labels = torch.stack([soft.flatten(1) for _, soft in context])  # frames, K, N
        soft = labels.transpose(1, 2).reshape(-1, labels.shape[1]).T @ affinity
        soft = soft.reshape(-1, rows, columns)
        if len(self.queue) == DINO.context:
            self.queue.pop(0)
        self.queue.append((target, soft.clone()))
        return soft


def neighbourhood(rows: int, columns: int, radius: int) -> Tensor:
    """(N, N) of 0 and 1: patches at most ``radius`` rows and columns apart."""
    place = torch.arange(rows * columns)
    row, column = place // columns, place % columns
    close = (row[:, None] - row).abs() <= radius
    return (close & ((column[:, None] - column).abs() <= radius)).float()


def features_of(name: str, sequence: VideoSequence) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Features (T, rows, columns, D), first labels (K, rows, columns) and the input size."""
    native = load_backbone(name)
    size = input_size(sequence.size, DINO, patch_of(native))
    extractor = make_extractor(native, size, DINO, torch.device("cpu"))
    with ThreadPoolExecutor(1) as pool:
        features = torch.cat([extractor(b) for b in read_batches(sequence, extractor, pool, 4)])
    mask = read_mask(sequence.masks[0])
    return features, first_labels(mask, [0, *sequence.objects], extractor.grid, "nearest"), size


def carry(way: Any, features: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Seconds a frame and all soft labels of a video, features given."""
    start = time.perf_counter()
    propagation = way(features[0], labels)
    soft = [propagation.step(one) for one in features[1:]]
    return (time.perf_counter() - start) / len(soft), torch.stack(soft)


def compare(
    name: str, sequence: VideoSequence, frames: int, repetitions: int, threads: list[int]
) -> dict[str, Any]:
    """Both ways through the first frames of a sequence, in turns."""
    features, labels, size = features_of(name, sequence)
    features = features[:frames]
    ways = {"published": PublishedLoop, "ours": lambda f, s: Propagation(f, s, DINO)}
    row: dict[str, Any] = {
        "backbone": Path(name).name,
        "sequence": sequence.name,
        "frames": len(features),
        "grid": list(features.shape[1:3]),
        "width": features.shape[3],
        "repetitions": repetitions,
        "load_average": [round(v, 1) for v in os.getloadavg()],
    }
    for count in threads:
        torch.set_num_threads(count)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        soft = {}
        for repetition in range(repetitions + 1):
            for way, make in ways.items():
                spent, soft[way] = carry(make, features, labels)
                if repetition:  # the first one warms up
                    seconds[way].append(spent)
        pairs = zip(seconds["published"], seconds["ours"], strict=True)
        ratios = [a / b for a, b in pairs]
        ids = [0, *sequence.objects]
        masks = {w: [decide(s, ids, size, sequence.size, DINO) for s in soft[w]] for w in soft}
        unlike = [(a != b).mean() for a, b in zip(masks["published"], masks["ours"], strict=True)]
        row[f"threads_{count}"] = {
            **{
                f"{w}_ms_a_frame": round(1000 * statistics.median(s), 2) for w, s in seconds.items()
            },
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
            "largest_difference_of_soft_labels": float(
                (soft["published"] - soft["ours"]).abs().max()
            ),
            "share_of_pixels_decided_otherwise": float(sum(unlike) / len(unlike)),
        }
        print(json.dumps({**row, "threads": count}), flush=True)
    return row


def measure_memory(data: str, architecture: str, frames: int) -> dict[str, Any]:
    """Peak memory and seconds of a whole evaluation, run by a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.manual_seed(0)
        backbone = load_backbone(f"timm:{architecture}", pretrained=False)
        file = root / f"random_{architecture}.safetensors"
        save_backbone(
            file, backbone.model, architecture=backbone.architecture, kwargs=backbone.kwargs,
            mean=backbone.mean, std=backbone.std, img_size=backbone.img_size, licence=None, source="random",
        )  # fmt: skip
        long_video(open_davis(data)[0], root / "data", frames)
        command = [
            sys.executable,
            "-m",
            "benchmarks.davis",
            "child",
            "--data",
            str(root / "data"),
            "--backbone",
            str(file),
        ]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {"architecture": architecture, "weights": "random", **json.loads(out.splitlines()[-1])}


def long_video(sequence: VideoSequence, root: Path, frames: int) -> None:
    """A DAVIS folder with one video of so many frames: the sequence to and fro."""
    there = list(range(len(sequence)))
    order = (there + there[-2:0:-1]) * (frames // len(there) + 1)
    for kind, files in (("JPEGImages", sequence.frames), ("Annotations", sequence.masks)):
        target = root / kind / "480p" / "long"
        target.mkdir(parents=True)
        for number, source in enumerate(order[:frames]):
            shutil.copyfile(files[source], target / f"{number:05d}{files[source].suffix}")
    listing = root / "ImageSets" / "2017" / "val.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("long\n")


def child(data: str, backbone: str) -> None:
    """Evaluate and print this process's peak memory."""
    result = evaluate_davis(DavisConfig(backbone, data, device="cpu", progress=False))
    row = result.details["sequences"][0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    facts = {k: row[k] for k in ("frames", "size", "grid", "seconds")}
    print(json.dumps({**facts, "threads": torch.get_num_threads(), "peak_GiB": round(peak, 2)}))


def record(part: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows into docs/results/davis_speed.json, beside the other part."""
    content = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    content[part] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": rows,
        "versions": versions(),
        "hardware": {k: v for k, v in hardware(torch.device("cpu")).items() if k != "threads"},
    }
    write_json(TARGET, content)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["speed", "memory", "table", "child"])
    parser.add_argument("--data", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--backbone", action="append", default=[])
    parser.add_argument("--sequence", default=None)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--architecture", default="vit_base_patch16_224")
    options = parser.parse_args()
    if options.part == "child":
        child(options.data, options.backbone[0])
    elif options.part == "memory":
        rows = [measure_memory(options.data, options.architecture, 90)]
        print(json.dumps(rows[0]))
        record("memory", rows)
    elif options.part == "table":
        from benchmarks.davis_table import table

        table(options.results)
    else:
        names = None if options.sequence is None else [options.sequence]
        sequence = open_davis(options.data, names)[0]
        numbers = (options.frames, options.repetitions, options.threads)
        record("speed", [compare(name, sequence, *numbers) for name in options.backbone])


if __name__ == "__main__":
    main()
