"""Quick campaigns of the data faults in a process of their own, as it forks: this file, PART, FOLDER.

Prints, as one line of JSON, the failures with the software as it is and with a promise broken on purpose.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults import images, measured, pictures, shards, workers  # noqa: E402
from benchmarks.faults.campaign import SHARED, Options, Verdict  # noqa: E402

from cmt_mae.data import decode, tar  # noqa: E402
from cmt_mae.data.steps import Steps  # noqa: E402


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
    place.mkdir()
    after = Steps.after
    Steps.after = lambda self, _: after(self, 0)  # type: ignore[method-assign]
    trial = partial(workers.disturbed, place, "pretrain_batches", "SIGKILL", 12, 0)
    ended = measured.measure(trial, 60)
    wrong = ended.fault() or ended.value[0]
    return Verdict("none", failures=[wrong] if wrong else [])


PARTS = {
    "images": (images, broken_images),
    "shards": (shards, broken_shards),
    "workers": (workers, broken_workers),
}


def main(part: str, place: Path) -> None:
    """Both verdicts of a part."""
    campaign, broken = PARTS[part]
    (place / "whole").mkdir()
    verdict = campaign.campaign(Options(place / "whole", quick=True))
    said = {"failures": verdict.failures, "trials": verdict.trials, "figures": verdict.figures}
    print(json.dumps({**said, "broken": broken(place / "broken").failures}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
