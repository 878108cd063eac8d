"""DAVIS: label propagation against the published loop, its speed and its results.

    python -m benchmarks.davis --data DAVIS/ --backbone deit_tiny.safetensors [--backbone ...]

extracts the features of one sequence once, then carries its first mask through it in both ways, in turns, in one
process, with 1 and 2 threads: medians and ratios of at least 7 repetitions, into docs/results/davis_speed.json.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmt_mae.backbones import load_backbone
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment
from cmt_mae.data.davis import VideoSequence, open_davis, read_mask
from cmt_mae.evaluate.pyramid import patch_of
from cmt_mae.evaluate.result import hardware
from cmt_mae.evaluate.video.features import make_extractor
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", action="append", required=True)
    parser.add_argument("--sequence", default=None)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    names = None if options.sequence is None else [options.sequence]
    sequence = open_davis(options.data, names)[0]
    numbers = (options.frames, options.repetitions, options.threads)
    content = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": [compare(name, sequence, *numbers) for name in options.backbone],
        "versions": environment()["versions"],
        "hardware": {k: v for k, v in hardware(torch.device("cpu")).items() if k != "threads"},
    }
    write_json(TARGET, {"speed": content})


if __name__ == "__main__":
    main()
