"""A quick campaign in a process of its own, as it forks and must not have trained: this file, PART, FOLDER.

Prints, as one line of JSON, the failures with the software as it is and with a promise broken on purpose.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults import (  # noqa: E402
    images,
    measured,
    numerics,
    pictures,
    processes,
    shards,
    soak,
    tiny,
    workers,
)
from benchmarks.faults.campaign import SHARED, Options, Verdict  # noqa: E402

from cmt_mae.data import decode, tar  # noqa: E402
from cmt_mae.data.steps import Steps  # noqa: E402
from cmt_mae.engine import trainer  # noqa: E402
from cmt_mae.engine.fit import _Fit  # noqa: E402


def broken_images(_: Path) -> Verdict:
    """What is no image is an error of Pillow's again."""
    verdict, rng = Verdict("none"), np.random.default_rng(0)
    files = pictures.originals(SHARED, rng)
    decode.BadImage.__init__ = lambda *_: int("no number")  # type: ignore[assignment, method-assign]
    images.decode_all(list(pictures.mutated(files, 60, rng)), files, verdict)
    return verdict


def broken_shards(place: Path) -> Verdict:
    """The end of a shard is not looked at."""
    tar._check_end = lambda *_: None
    trials = shards.tar_trials(place / "tar", np.random.default_rng(0), 0)
    return Verdict("none", failures=measured.judge(trials, 60, 600).failures)


def broken_workers(place: Path) -> Verdict:
    """Workers that are started again begin anew."""
    after = Steps.after
    Steps.after = lambda self, _: after(self, 0)  # type: ignore[method-assign]
    trial = partial(workers.disturbed, place, "pretrain_batches", "SIGKILL", 12, 0)
    ended = measured.measure(trial, 60)
    wrong = ended.fault() or ended.value[0]
    return Verdict("none", failures=[wrong] if wrong else [])


def broken_numerics(place: Path) -> Verdict:
    """A step that is not finite is taken all the same."""
    trainer.skip_unless = lambda _, finite, __: 0.0 * finite.float()
    verdict = Verdict("none")
    numerics.spoilt_once(Options(place, quick=True), tiny.prepare(place / "data_"), verdict)
    return verdict


def broken_processes(place: Path) -> Verdict:
    """Random numbers that come from the process and not from the image (drop path)."""
    processes.PLAIN = ["--student.drop_path=0.5", "--runtime.log_every=1"]
    verdict = Verdict("none")
    processes.curves(Options(place, quick=True), tiny.prepare(place / "data_"), verdict)
    return verdict


def broken_soak(place: Path) -> Verdict:
    """Every checkpoint leaves a file open."""
    kept: list[Any] = []
    real = _Fit.checkpoint

    def leaking(self: _Fit) -> None:
        real(self)
        kept.append(open(self.run.path / "config.yaml"))  # noqa: SIM115

    def plant(_: int) -> None:
        _Fit.checkpoint = leaking  # type: ignore[method-assign]

    soak.WORDS[soak.WORDS.index("--runtime.checkpoint_every=10.0")] = "--runtime.checkpoint_every=1"
    verdict = Verdict("none")
    soak.judge(Options(place, quick=True), tiny.prepare(place / "data_"), verdict, 400, 0, plant)
    return verdict


PARTS = {
    "images": (images, broken_images),
    "shards": (shards, broken_shards),
    "workers": (workers, broken_workers),
    "numerics": (numerics, broken_numerics),
    "processes": (processes, broken_processes),
    "soak": (soak, broken_soak),
}


def main(part: str, place: Path) -> None:
    """Both verdicts of a part."""
    campaign, broken = PARTS[part]
    for name in ("whole", "broken"):
        (place / name).mkdir()
    verdict = campaign.campaign(Options(place / "whole", quick=True))
    said = {"failures": verdict.failures, "trials": verdict.trials}
    print("\n" + json.dumps({**said, "broken": broken(place / "broken").failures}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
