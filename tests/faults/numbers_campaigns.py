"""Quick campaigns in a process of their own, as it forks and must not have trained: this file, PART, FOLDER.

Prints, as one line of JSON, the failures with the software as it is and with a promise broken on purpose.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.faults import numerics, processes, soak, tiny  # noqa: E402
from benchmarks.faults.campaign import Options, Verdict  # noqa: E402

from cmt_mae import stepping  # noqa: E402
from cmt_mae.pretraining import Training  # noqa: E402


def broken_numerics(folder: Path) -> Verdict:
    """A step that is not finite is taken all the same."""
    stepping.skip_unless = lambda _, finite, __: 0.0 * finite.float()
    verdict = Verdict("none")
    numerics.spoilt_once(Options(folder, quick=True), tiny.prepare(folder / "data_"), verdict)
    return verdict


def broken_processes(folder: Path) -> Verdict:
    """Random numbers that come from the process and not from the image (drop path)."""
    processes.PLAIN = ["--student.drop_path=0.5", "--runtime.log_every=1"]
    verdict = Verdict("none")
    processes.curves(Options(folder, quick=True), tiny.prepare(folder / "data_"), verdict)
    return verdict


def broken_soak(folder: Path) -> Verdict:
    """Every checkpoint leaves a file open."""
    kept: list[Any] = []
    real = Training.checkpoint

    def leaking(self: Training) -> None:
        real(self)
        kept.append(open(self.run.path / "config.yaml"))  # noqa: SIM115

    def plant(_: int) -> None:
        Training.checkpoint = leaking  # type: ignore[method-assign]

    soak.WORDS[soak.WORDS.index("--runtime.checkpoint_every=10.0")] = "--runtime.checkpoint_every=1"
    verdict = Verdict("none")
    soak.judge(Options(folder, quick=True), tiny.prepare(folder / "data_"), verdict, 400, 0, plant)
    return verdict


PARTS = {
    "numerics": (numerics.campaign, broken_numerics),
    "processes": (processes.campaign, broken_processes),
    "soak": (soak.campaign, broken_soak),
}

if __name__ == "__main__":
    whole, broken = PARTS[sys.argv[1]]
    for name in ("whole", "broken"):
        Path(sys.argv[2], name).mkdir()
    verdict = whole(Options(Path(sys.argv[2], "whole"), quick=True))
    hurt = broken(Path(sys.argv[2], "broken"))
    said = {"failures": verdict.failures, "trials": verdict.trials, "broken": hurt.failures}
    print("\n" + json.dumps(said))
