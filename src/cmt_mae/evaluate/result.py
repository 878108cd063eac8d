"""What an evaluation hands back: the numbers and everything needed to know what they mean."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_text
from cmt_mae.core.run_reader import is_run
from cmt_mae.core.text import pixels_of

if TYPE_CHECKING:
    import torch

    from cmt_mae.backbones import Backbone


@dataclass
class Result:
    """One evaluation of one backbone on one data set.

    ``protocol`` always holds ``name`` and ``headline``, the key in ``metrics`` of the one number to
    quote. Two results may stand in one column of a table only when their protocols are equal.
    Accuracies are percentages, 0 to 100. A metric that does not exist (the AP of small objects
    when there are none) is NaN, which the JSON text writes as null.
    """

    task: str
    """knn, linear, finetune, coco, ade20k or davis."""
    metrics: dict[str, float]
    """Name of the metric -> value."""
    protocol: dict[str, Any]
    """Every setting that moves the number; ``name`` and ``headline`` are required."""
    backbone: dict[str, Any]
    """name, architecture, digest (sha256 of the weights), facts (mean, std, heads, eps, activation) and where they
    are known from, source, licence, img_size."""
    data: dict[str, Any]
    """path, fingerprint, and the number of images in each split."""
    seed: int
    """Seed of everything random in the evaluation."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and of the libraries the number depends on."""
    hardware: dict[str, Any] = field(default_factory=dict)
    """What it ran on."""
    seconds: float = 0.0
    """Wall time, loading and feature extraction included."""
    date: str = ""
    """When it ended: ISO 8601, UTC."""
    details: dict[str, Any] = field(default_factory=dict)
    """Tables behind the metrics: every head of a sweep, every class, every sequence."""

    def __post_init__(self) -> None:
        """Make every value plain JSON now, so that a stored result equals the one in memory."""
        for item in fields(self):
            setattr(self, item.name, json_values(getattr(self, item.name)))
        self.metrics = {k: math.nan if v is None else float(v) for k, v in self.metrics.items()}
        for key in ("name", "headline"):
            if key not in self.protocol:
                raise ValueError(f"the protocol of a {self.task} result lacks {key!r}")
        if self.protocol["headline"] not in self.metrics:
            raise ValueError(f"the headline {self.protocol['headline']!r} is not among the metrics")

    @property
    def headline(self) -> float:
        """The one number to quote."""
        return self.metrics[self.protocol["headline"]]

    def counted(self) -> tuple[int, str]:
        """How many of what the metrics are over: (400, "images"); (0, "images") where the file does not say."""
        kind = "videos" if self.task == "davis" else "images"
        count = self.data.get("sequences" if self.task == "davis" else "val")
        return (
            (count, kind) if isinstance(count, int) and not isinstance(count, bool) else (0, kind)
        )

    def over(self, metric: str) -> str:
        """What a metric is over: "400 images", "60 images, 431 objects"; empty where the file does not say."""
        count, kind = self.counted()
        words = [f"{count} {kind}"] if count else []
        objects = self.details.get("objects")
        if self.task == "coco" and isinstance(objects, dict):
            size = metric.rpartition("AP")[2]
            number = objects.get(size if size in objects else "")
            words += [f"{number} objects"] if isinstance(number, int) else []
        return ", ".join(words)

    def interval(self, metric: str) -> tuple[float, float] | None:
        """95 % interval of a metric over the images or videos, in percent; None where none is known.

        Of shares of right answers (names that end with top1 or top5): Wilson's. Of mIoU, mAcc and aAcc: by the
        bootstrap over images (miou.py). Of J&F, J and F: Student's of the mean over the videos. AP has none.
        """
        count, value = self.counted()[0], self.metrics[metric]
        if count < 1 or math.isnan(value):
            return None
        if metric.rsplit("/", 1)[-1] in ("top1", "top5", "best_top1"):
            return wilson(value / 100, count)
        known = self.details.get("intervals")
        ends = known.get(metric) if isinstance(known, dict) else None
        if isinstance(ends, list) and [type(end) for end in ends] == [float, float]:
            return ends[0], ends[1]
        videos = list(self.videos(metric).values())
        if len(videos) < 2:
            return None
        error = half_interval(videos)
        if metric.endswith("_decay"):  # all others are shares
            return value - error, value + error
        return max(0.0, value - error), min(100.0, value + error)

    def videos(self, metric: str) -> dict[str, float]:
        """Name of a video -> this metric of it; empty where the evaluation has none."""
        rows = self.details.get("sequences")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return {}
        found = {str(row.get("name")): row.get(metric) for row in rows}
        return {name: value for name, value in found.items() if isinstance(value, float)}

    @property
    def network(self) -> str:
        """``ViT 96 x 4, patch 8, 48 px``; of older results timm's name and the size."""
        known = self.backbone.get("network")
        if isinstance(known, str):
            return known
        size = self.backbone.get("img_size")
        pixels = f", {pixels_of(size)}" if isinstance(size, list) and size else ""
        return f"{self.backbone.get('architecture') or ''}{pixels}"

    def identity(self) -> str:
        """Ten hex digits that name what was measured: task, protocol, weights and facts, data and seed.

        Time, machine, versions and the folder's place are left out, so the same evaluation again
        replaces its file.
        """
        data = {k: v for k, v in self.data.items() if k != "path"}
        network = [self.backbone.get("digest")]
        if "facts" in self.backbone:  # results from before there were facts keep their names
            network.append(self.backbone["facts"])
        what = [self.task, self.protocol, *network, data, self.seed]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]

    def to_json(self) -> str:
        """The whole result as one line of strict JSON."""
        return json.dumps(json_values(asdict(self)), allow_nan=False)

    def save(self, out: Path | str) -> Path:
        """Write ``out/results/TASK-PROTOCOL-HASH.json`` atomically and return its path.

        Raises:
            InputError: the folder cannot be written.
        """
        # plain words only: a task or protocol named ../.. must not lead out of the folder
        words = (str(self.task), str(self.protocol["name"]))
        task, name = (re.sub(r"[^a-z0-9]+", "-", w.lower()).strip("-")[:60] for w in words)
        path = Path(out) / "results" / f"{task}-{name}-{self.identity()}.json"
        write_text(path, json.dumps(json_values(asdict(self)), allow_nan=False, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: Path | str) -> Result:
        """Read a result that ``save`` wrote.

        Raises:
            InputError: the file is missing, is not JSON or is not a result.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is not a result of cmt-mae evaluate: {error}") from None


class Evaluated(Protocol):
    """Settings of an evaluation: how the backbone was named, and the seed."""

    backbone: str
    key: str | None
    seed: int


def backbone_name(name: str, key: str | None) -> str:
    """What the user called the backbone."""
    return f"{name} ({key})" if key else name


def make_result(
    task: str,
    settings: Evaluated,
    backbone: Backbone,
    *,
    metrics: dict[str, float],
    protocol: dict[str, Any],
    data: dict[str, Any],
    device: torch.device,
    processes: int,
    started: float,
    details: dict[str, Any] | None = None,
) -> Result:
    """Fill in what is alike for every task: the backbone, versions, hardware, time and date.

    Args:
        started: ``time.perf_counter()`` at the start of the evaluation.
    """
    from cmt_mae.core.runs import environment  # loads torch, which tables of results need not

    return Result(
        task=task,
        metrics=metrics,
        protocol=protocol,
        backbone={
            "name": backbone_name(settings.backbone, settings.key),
            "architecture": backbone.architecture,
            "network": backbone.network,
            "digest": backbone.digest,
            "facts": backbone.facts,
            "known_from": backbone.known_from,
            "source": backbone.source,
            "licence": backbone.licence,
            "img_size": backbone.img_size,
            "teacher": backbone.teacher,
        },
        data=data,
        seed=settings.seed,
        versions=environment()["versions"],
        hardware=hardware(device, processes),
        seconds=round(time.perf_counter() - started, 2),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        details=details or {},
    )


def results_folder(out: str | None, backbone: str) -> Path | None:
    """Where results go: ``out``; without it the run directory that the backbone is; else nowhere."""
    if out is not None:
        return Path(out).expanduser()
    run = Path(backbone).expanduser()
    return run if is_run(run) else None


def save_where(result: Result, out: str | None, backbone: str) -> Path | None:
    """Save to ``results_folder``; None where there is none."""
    folder = results_folder(out, backbone)
    return None if folder is None else result.save(folder)


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share 0..1 of ``count`` independent answers, in percent."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of two or more independent values, by Student's t."""
    from scipy.stats import t  # not above: most tables need none

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def hardware(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """The device, the processor and how much of it was used."""
    import torch  # not above: tables and reports of results need none

    from cmt_mae.core.runs import processor

    name = processor() if device.type == "cpu" else str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def json_values(value: Any) -> Any:
    """``value`` as JSON knows it: no tuple, path, numpy or torch number; NaN becomes None."""
    if isinstance(value, dict):
        return {str(k): json_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
