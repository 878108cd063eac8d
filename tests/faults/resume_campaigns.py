"""Quick campaigns in a process of their own, as it forks and must not have trained: resume_campaigns.py FOLDER.

Prints, as one line of JSON, the failures with the software as it is and with a promise broken on purpose.
"""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults import checkpoints, kills, signals  # noqa: E402
from benchmarks.faults.campaign import Options, Verdict  # noqa: E402
from benchmarks.faults.tiny import prepare  # noqa: E402

from cmt_mae.engine import checkpoint  # noqa: E402
from cmt_mae.engine.signals import StopRequest  # noqa: E402


def broken_kills(folder: Path) -> Verdict:
    """The optimizer's state is not taken up again."""
    torch.optim.Optimizer.load_state_dict = lambda *_: None  # type: ignore[assignment, method-assign]
    first = kills.SCENARIOS[0]
    kills.SCENARIOS = (kills.Scenario(first.name, first.words, ("step",), 1),)
    kills.QUICK = (0,)
    return kills.campaign(Options(folder, quick=True, seed=1))


def broken_signals(folder: Path) -> Verdict:
    """The status is right, the checkpoint is not written."""
    StopRequest._receive = lambda *_: os._exit(signals.STOPPED)  # type: ignore[method-assign]
    signals.CASES, signals.QUICK, signals.IMPATIENT = signals.CASES[:1], (0,), ()
    return signals.campaign(Options(folder, quick=True))


def broken_checkpoints(folder: Path) -> Verdict:
    """The checksum is believed."""
    checkpoint.sha256 = lambda path: checkpoint._known(path)[0]
    verdict = Verdict("none")
    checkpoints.torn_small(folder / "torn", 97, random.Random(0), verdict, Counter())
    return verdict


PARTS = {
    "kills": (kills.campaign, broken_kills),
    "signals": (signals.campaign, broken_signals),
    "checkpoints": (checkpoints.campaign, broken_checkpoints),
}

if __name__ == "__main__":
    tiny = prepare(Path(sys.argv[1], "data"))
    for module in (kills, signals, checkpoints):
        module.prepare = lambda _: tiny  # type: ignore[assignment]
    signals.IMPATIENT = signals.IMPATIENT[:1]
    said = {}
    for part, (whole, broken) in PARTS.items():
        folders = [Path(sys.argv[1], f"{part}_{name}") for name in ("whole", "broken")]
        for folder in folders:
            folder.mkdir()
        verdict = whole(Options(folders[0], quick=True))
        said[part] = {"failures": verdict.failures, "figures": verdict.figures}
        # in a fork: what is broken on purpose must not stay so
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, json.dumps(broken(folders[1]).failures[:3]).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            said[part]["broken"] = json.loads(answer.read())
        os.wait()
    print("\n" + json.dumps(said))
