"""DAVIS-2017 with frozen features: settings, sequences shared over processes, one Result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count, CountOrNone, Device, Positive, check_fields
from cmt_mae.data.davis import VideoSequence, open_davis
from cmt_mae.engine.progress import evaluation_progress
from cmt_mae.evaluate.features import Where, start_processes
from cmt_mae.evaluate.result import Result, make_result, results_folder, save_where
from cmt_mae.evaluate.video.features import Extractor, make_extractor, patch_of
from cmt_mae.evaluate.video.metrics import statistics
from cmt_mae.evaluate.video.pictures import draw_strips
from cmt_mae.evaluate.video.protocol import (
    FirstMask,
    Objects,
    Positions,
    SideRule,
    SoftmaxOver,
    Upsample,
    VideoProtocol,
    Window,
    choose,
    input_size,
)
from cmt_mae.evaluate.video.sequence import Followed, Shelf, follow

if TYPE_CHECKING:
    from rich.progress import Progress

VERSION = (
    1  # raise it when the same protocol would give other numbers: kept sequences are then redone
)
MEASURES = ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")


@dataclass
class DavisConfig:
    """Settings of the DAVIS-2017 evaluation: semi-supervised, frozen features, nothing is trained.

    A setting left out is the protocol's; any other value gives the protocol the name NAME+changed.
    """

    backbone: str
    """Run directory, checkpoint file, timm name or `embedded`."""
    data: str
    """Folder with JPEGImages/480p, Annotations/480p and ImageSets/2017/val.txt."""
    out: str | None = None
    """Folder for results/*.json and davis/ (masks, scores, strips); sequences found there are not
    repeated. Default: the run directory, if the backbone is one."""
    protocol: Literal["dino", "videowalk", "cropmae"] = "dino"
    """dino (DINO's script), videowalk (Jabri et al.) or cropmae (CropMAE's and SiamMAE's settings)."""
    sequences: tuple[str, ...] | None = None
    """Only these sequences of val.txt."""
    key: str | None = None
    """`momentum` evaluates the momentum student of a run."""
    size: Count | tuple[Count, Count] | None = None
    """Shorter side of the frames that the network sees, or height and width (dino: 480)."""
    side_rule: SideRule | None = None
    """Longer side: floor64 (dino) cuts it to a multiple of 64, patch to one of the patch."""
    std_typo: bool | None = None
    """Divide by .228 in place of .229 where the backbone has ImageNet's statistics (dino: true)."""
    layer: Count | None = None
    """Block whose output is the feature, from 1. Default: the last."""
    final_norm: bool | None = None
    """Features after the final norm (default: true)."""
    positions: Positions | None = None
    """Table of positions resized to a `size`, or by DINO's `scale_factor` of (grid + .1) / old grid."""
    first_mask: FirstMask | None = None
    """First mask to the grid: nearest (dino) or linear (videowalk)."""
    objects: Objects | None = None
    """all objects of the first mask (default), or seen: up to the highest id left at grid size (DINO's script)."""
    context: CountOrNone | None = None
    """Preceding frames looked at besides the first (dino: 7)."""
    padded: bool | None = None
    """Fill places of frames before the first with the first (videowalk: true)."""
    soft_queue: bool | None = None
    """Preceding frames lend soft labels (default: true); false: one-hot ones."""
    radius: CountOrNone | None = None
    """Neighbourhood in patches (dino: 12); 0 is the whole frame."""
    window: Window | None = None
    """square (dino) or disc (videowalk)."""
    limit_first: bool | None = None
    """The neighbourhood holds in the first frame too (dino: true, videowalk: false)."""
    topk: Count | None = None
    """Neighbours kept over all context frames together (dino: 5)."""
    keep_ties: bool | None = None
    """Neighbours as near as the last kept one are kept too (dino: true)."""
    temperature: Positive | None = None
    """A neighbour's weight is exp(cosine similarity / temperature) (dino: 0.1)."""
    softmax_over: SoftmaxOver | None = None
    """Weights sum to 1 over the `kept` neighbours (default) or over the `neighbourhood`."""
    upsample: Upsample | None = None
    """Decide at the input size (patch; dino) or at the frame's own size (frame; videowalk)."""
    min_max: bool | None = None
    """Stretch each class map to 0..1 before the decision (dino: true)."""
    save_masks: bool = True
    """Keep the predicted masks as indexed PNGs in davis/*/masks, as the official evaluation reads them."""
    pictures: CountOrNone = 3
    """Sequences to draw as strips of frames, truth and prediction; needs the saved masks."""
    columns: Count = 6
    """Frames in a strip."""
    compare: str | None = None
    """A second backbone for one more row in each strip; the drawn sequences are evaluated for it."""
    compare_key: str | None = None
    """`momentum` takes the momentum student of the second backbone."""
    device: Device = "auto"
    """auto, cpu or cuda."""
    batch_size: Count = 4
    """Frames in a forward pass. Does not change the result."""
    threads: Count = 2
    """Threads that read frames and score masks. Does not change the result."""
    progress: bool = True
    """Say on stderr how far it is."""
    seed: CountOrNone = 0
    """Recorded with the result; nothing here is random."""


def evaluate_davis(config: DavisConfig) -> Result:
    """J and F of label propagation. Every process may call it, each takes a share; the first saves.

    ``details`` holds the table of sequences, that of objects, and objects that vanish at grid size.

    Raises:
        InputError: unusable backbone, data or setting, in one line.
    """
    check_fields(config)
    started = time.perf_counter()
    protocol = choose_protocol(config)
    where = start_processes(config.device)
    sequences = open_davis(config.data, config.sequences)
    keep = results_folder(config.out, config.backbone)
    drawn = sequences[: config.pictures] if keep is not None and config.save_masks else []
    backbone = load_backbone(config.backbone, key=config.key)
    check_sizes(sequences, protocol, backbone)
    rivals = [(config.backbone, config.key, backbone, sequences)]
    if config.compare is not None:
        if not drawn:
            raise InputError(
                "--compare draws pictures; it needs --out, --save_masks and --pictures 1"
            )
        other = load_backbone(config.compare, key=config.compare_key)
        check_sizes(drawn, protocol, other)
        rivals.append((config.compare, config.compare_key, other, drawn))
    outcomes = []
    with evaluation_progress(config.progress and where.rank == 0) as bar:
        for name, key, native, todo in rivals:
            shelf = make_shelf(keep, native, protocol, config.save_masks)
            runner = Runner(name, key, native, protocol, where, config, shelf)
            outcomes.append(runner.run(todo, bar))
    result = make_result(
        "davis",
        config,
        backbone,
        metrics=summarise(outcomes[0]),
        protocol=describe_protocol(protocol),
        data=describe_sequences(config.data, sequences),
        device=where.device,
        processes=where.world,
        started=started,
        details=tables(outcomes[0]),
    )
    if config.compare is not None:
        result.details["compare"] = {
            "name": label(config.compare, config.compare_key),
            "digest": rivals[1][2].digest,
            "sequences": [sequence.name for sequence in drawn],
            "metrics": summarise(outcomes[1]),
        }
    if where.rank == 0:
        save_where(result, config.out, config.backbone)
        if drawn:
            shelves = [make_shelf(keep, rival[2], protocol, True) for rival in rivals]
            titles = [label(rival[0], rival[1]) for rival in rivals]
            rows = [(t, s) for t, s in zip(titles, shelves, strict=True) if s is not None]
            draw_strips(drawn, rows, outcomes, config.columns)
    return result


def choose_protocol(config: DavisConfig) -> VideoProtocol:
    """The preset with the changes that the settings ask for, all of them checked.

    Raises:
        InputError: a setting without meaning.
    """
    least = [("batch_size", config.batch_size, 1), ("threads", config.threads, 1)]
    least += [("pictures", config.pictures, 0), ("columns", config.columns, 1)]
    for name, value, low in least:
        if value < low:
            raise InputError(f"DAVIS: {name} is {value}; it must be {low} or more")
    names = [field.name for field in fields(VideoProtocol) if field.name != "name"]
    return choose(config.protocol, **{name: getattr(config, name) for name in names})


def label(name: str, key: str | None) -> str:
    """What to call a backbone in results."""
    return f"{name} ({key})" if key else name


def check_sizes(
    sequences: list[VideoSequence], protocol: VideoProtocol, backbone: Backbone
) -> None:
    """Refuse before any work what some sequence's size or some setting makes impossible."""
    for sequence in sequences:
        input_size(sequence.size, protocol, patch_of(backbone))
    depth = len(backbone.model.blocks)  # type: ignore[arg-type]
    if protocol.layer is not None and protocol.layer > depth:
        raise InputError(
            f"DAVIS: layer is {protocol.layer}; {backbone.architecture} has {depth} blocks"
        )


def make_shelf(
    keep: Path | None, backbone: Backbone, protocol: VideoProtocol, masks: bool
) -> Shelf | None:
    """Folder of what belongs to these weights under this protocol: KEEP/davis/PROTOCOL-HASH."""
    if keep is None:
        return None
    normalisation = [backbone.mean, backbone.std]
    what = [VERSION, backbone.digest, normalisation, describe_protocol(protocol)]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
    return Shelf(keep / "davis" / f"{protocol.name.replace('+', '-')}-{digest}", masks)


def describe_protocol(protocol: VideoProtocol) -> dict[str, Any]:
    """``Result.protocol``: every quirk by name, and how the numbers are averaged."""
    return {
        **asdict(protocol),
        "headline": "J&F",
        "features": "patch tokens, l2-normalised, float32",
        "scored": "semi-supervised; first and last frame dropped; mean over objects",
    }


def describe_sequences(path: str, sequences: list[VideoSequence]) -> dict[str, Any]:
    """``Result.data``."""
    digest = hashlib.sha256("\n".join(s.fingerprint for s in sequences).encode())
    return {
        "path": path,
        "fingerprint": digest.hexdigest(),
        "sequences": len(sequences),
        "objects": sum(len(s.objects) for s in sequences),
        "frames": sum(len(s) for s in sequences),
    }


@dataclass
class Runner:
    """One backbone on its way through sequences, as one of the processes that share them."""

    name: str
    key: str | None
    native: Backbone
    protocol: VideoProtocol
    where: Where
    config: DavisConfig
    shelf: Shelf | None

    def run(self, sequences: list[VideoSequence], bar: Progress) -> list[Followed]:
        """Outcomes of all sequences, in their order, on every process; each is followed once.

        An error stops its own process's share only; all processes then raise the first of them,
        with finished sequences kept.
        """
        share = sorted(sequences, key=len, reverse=True)[self.where.rank :: self.where.world]
        done: list[Followed] = []
        trouble: list[str] = []
        try:
            self._run_share(share, bar, done)
        except InputError as error:
            trouble.append(str(error))
        if self.where.world > 1:
            from accelerate.utils import gather_object

            done, trouble = gather_object(done), gather_object(trouble)
        if trouble:
            raise InputError(trouble[0])
        by_name = {outcome.name: outcome for outcome in done}
        if len(by_name) != len(done) or len(done) != len(sequences):
            raise RuntimeError(f"{len(done)} outcomes for {len(sequences)} sequences")
        return [by_name[sequence.name] for sequence in sequences]

    def _run_share(self, share: list[VideoSequence], bar: Progress, done: list[Followed]) -> None:
        """Append the outcomes of this process's sequences."""
        patch = patch_of(self.native)
        extractor: Extractor | None = None
        total = sum(map(len, share))
        task = bar.add_task(self.protocol.name, total=total)
        with ThreadPoolExecutor(self.config.threads) as pool:
            for sequence in share:
                bar.update(task, description=f"{self.protocol.name} {sequence.name}")
                kept = self.shelf.load(sequence) if self.shelf is not None else None
                if kept is not None:
                    done.append(kept)
                    bar.advance(task, len(sequence))
                    continue
                size = input_size(sequence.size, self.protocol, patch)
                if extractor is None or extractor.size != size:
                    extractor = make_extractor(
                        self.name, self.key, self.native, size, self.protocol, self.where.device
                    )
                steps = follow(
                    sequence,
                    extractor,
                    pool=pool,
                    batch_size=self.config.batch_size,
                    shelf=self.shelf,
                )
                for step in steps:
                    if step is None:
                        bar.advance(task)
                    else:
                        done.append(step)


def measure(outcome: Followed, number: int) -> dict[str, float]:
    """Mean, recall and decay of J and F of one object, and J&F, in percent."""
    values = [*statistics(outcome.j[number]), *statistics(outcome.f[number])]
    found = {name: 100 * value for name, value in zip(MEASURES, values, strict=True)}
    return {"J&F": (found["J_mean"] + found["F_mean"]) / 2, **found}


def summarise(outcomes: Sequence[Followed]) -> dict[str, float]:
    """Means over objects, not over sequences (spec 9.3), in percent."""
    rows = [measure(outcome, n) for outcome in outcomes for n in range(len(outcome.objects))]
    return {name: sum(row[name] for row in rows) / len(rows) for name in ("J&F", *MEASURES)}


def tables(outcomes: Sequence[Followed]) -> dict[str, Any]:
    """A row for each sequence and for each object."""
    sequences, objects = [], []
    for outcome in outcomes:
        facts = {k: v for k, v in asdict(outcome).items() if k not in ("j", "f", "fingerprint")}
        sequences.append({**facts, **summarise([outcome])})
        for number, i in enumerate(outcome.objects):
            objects.append({"sequence": outcome.name, "object": i, **measure(outcome, number)})
    lost = [f"{o.name} {i}" for o in outcomes for i in o.vanished]
    return {"sequences": sequences, "objects": objects, "vanished": lost}
