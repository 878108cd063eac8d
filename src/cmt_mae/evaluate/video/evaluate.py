"""DAVIS-2017 with frozen features: settings, sequences shared over processes, one Result."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.backbone_facts import BackboneFacts, NoFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count, CountOrNone, Device, check_fields
from cmt_mae.data.davis import VideoSequence, open_davis
from cmt_mae.engine.progress import evaluation_progress
from cmt_mae.evaluate.features import Where, start_processes
from cmt_mae.evaluate.pyramid import depth_of, patch_of
from cmt_mae.evaluate.result import Result, backbone_name, make_result, results_folder, save_where
from cmt_mae.evaluate.video.features import Extractor, make_extractor
from cmt_mae.evaluate.video.metrics import statistics
from cmt_mae.evaluate.video.pictures import draw_strips
from cmt_mae.evaluate.video.protocol import (
    PresetName,
    VideoProtocol,
    input_size,
    resolve,
)
from cmt_mae.evaluate.video.sequence import Followed, SequenceStore, follow

if TYPE_CHECKING:
    from rich.progress import Progress

VERSION = (
    1  # raise it when the same protocol would give other numbers: kept sequences are then redone
)
MEASURES = ("J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay")


@dataclass
class DavisConfig(VideoProtocol, BackboneFacts):
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
    protocol: PresetName = "dino"
    """dino (DINO's script), videowalk (Jabri et al.) or cropmae (CropMAE's and SiamMAE's settings)."""
    sequences: tuple[str, ...] | None = None
    """Only these sequences of val.txt."""
    key: str | None = None
    """`momentum` evaluates the momentum student of a run."""
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
    name, protocol = resolve(config.protocol, config)
    stated = result_protocol(name, protocol)
    where = start_processes(config.device)
    sequences = open_davis(config.data, config.sequences)
    keep = results_folder(config.out, config.backbone)
    drawn = sequences[: config.pictures] if keep is not None and config.save_masks else []
    backbone = load_backbone(config.backbone, key=config.key, facts=config)
    check_sizes(sequences, protocol, backbone)
    rivals = [(config.backbone, config.key, backbone, sequences)]
    if config.compare is not None:
        if not drawn:
            raise InputError(
                "--compare draws pictures; it needs --out, --save_masks and --pictures 1"
            )
        other = load_backbone(config.compare, key=config.compare_key, facts=NoFacts())
        check_sizes(drawn, protocol, other)
        rivals.append((config.compare, config.compare_key, other, drawn))
    outcomes = []
    with evaluation_progress(config.progress and where.rank == 0) as bar:
        for rival, key, native, todo in rivals:
            store = make_store(keep, native, stated, config.save_masks)
            runner = Runner(rival, key, native, protocol, where, config, store)
            outcomes.append(runner.run(todo, bar))
    result = make_result(
        "davis",
        config,
        backbone,
        metrics=summarise(outcomes[0]),
        protocol=stated,
        data=sequence_facts(config.data, sequences),
        device=where.device,
        processes=where.world,
        started=started,
        details=tables(outcomes[0]),
    )
    if config.compare is not None:
        result.details["compare"] = {
            "name": backbone_name(config.compare, config.compare_key),
            "digest": rivals[1][2].digest,
            "sequences": [sequence.name for sequence in drawn],
            "metrics": summarise(outcomes[1]),
        }
    if where.rank == 0:
        save_where(result, config.out, config.backbone)
        if drawn:
            stores = [make_store(keep, rival[2], stated, True) for rival in rivals]
            titles = [backbone_name(rival[0], rival[1]) for rival in rivals]
            rows = [(t, s) for t, s in zip(titles, stores, strict=True) if s is not None]
            draw_strips(drawn, rows, outcomes, config.columns)
    return result


def check_sizes(
    sequences: list[VideoSequence], protocol: VideoProtocol, backbone: Backbone
) -> None:
    """Refuse before any work what some sequence's size or some setting makes impossible."""
    for sequence in sequences:
        input_size(sequence.size, protocol, patch_of(backbone))
    depth = depth_of(backbone)
    if protocol.layer is not None and protocol.layer > depth:
        raise InputError(
            f"DAVIS: layer is {protocol.layer}; {backbone.architecture} has {depth} blocks"
        )


def make_store(
    keep: Path | None, backbone: Backbone, stated: dict[str, Any], masks: bool
) -> SequenceStore | None:
    """Folder of what belongs to these weights under this protocol: KEEP/davis/PROTOCOL-HASH."""
    if keep is None:
        return None
    normalisation = [backbone.mean, backbone.std]
    what = [VERSION, backbone.digest, normalisation, stated]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]
    return SequenceStore(keep / "davis" / f"{stated['name'].replace('+', '-')}-{digest}", masks)


def result_protocol(name: str, protocol: VideoProtocol) -> dict[str, Any]:
    """``Result.protocol``: every quirk by name, and how the numbers are averaged."""
    return {
        "name": name,
        **asdict(protocol),
        "headline": "J&F",
        "features": "patch tokens, l2-normalised, float32",
        "scored": "semi-supervised; first and last frame dropped; mean over objects",
    }


def sequence_facts(path: str, sequences: list[VideoSequence]) -> dict[str, Any]:
    """``Result.data``."""
    names = hashlib.sha256("\n".join(s.names_fingerprint for s in sequences).encode())
    content = hashlib.sha256("\n".join(s.fingerprint for s in sequences).encode())
    return {
        "path": path,
        "fingerprint": f"{names.hexdigest()[:32]}-{content.hexdigest()[:31]}",
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
    store: SequenceStore | None

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
        task = bar.add_task(self.config.protocol, total=total)
        with ThreadPoolExecutor(self.config.threads) as pool:
            for sequence in share:
                bar.update(task, description=f"{self.config.protocol} {sequence.name}")
                kept = self.store.load(sequence) if self.store is not None else None
                if kept is not None:
                    done.append(kept)
                    bar.advance(task, len(sequence))
                    continue
                size = input_size(sequence.size, self.protocol, patch)
                if extractor is None or extractor.size != size:
                    extractor = make_extractor(self.native, size, self.protocol, self.where.device)
                steps = follow(
                    sequence,
                    extractor,
                    pool=pool,
                    batch_size=self.config.batch_size,
                    store=self.store,
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
