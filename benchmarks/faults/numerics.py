"""Numbers that are not finite or say nothing: named, skipped on every process alike, and the run survives.

The faults are placed in forks of this process, which then runs the command (see tiny.py). What is computed
here itself (attention at extreme activations) is in attention_extremes.py, a process of its own.
"""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.faults import tiny
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.poisons import COLLAPSES, METHODS, PLACES, Now
from benchmarks.faults.sameness import differences
from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint
from cmt_mae.engine.collapse import limit_of, signs
from cmt_mae.engine.trainer import Trainer
from cmt_mae.pretraining.task import Pretraining

PLAIN = ["--student.drop_path=0", "--runtime.log_every=1"]
AT = 13
"""Step (from 1) at which a fault is put: in stage two, where every part there is takes part."""
STEPS = 20
VALUES = (math.nan, math.inf, -math.inf)
HEALTHY = Path(__file__).with_name("healthy_runs.json")
"""Metrics of the demo's two runs (2000 scenes, 310 steps), recorded."""


def campaign(options: Options) -> Verdict:
    """All of it."""
    verdict = Verdict(
        "A number that is not finite costs the steps that saw it and no more, on every process alike, and its "
        "first part is named; collapse is told; the same seed gives the same bits"
    )
    work = tiny.prepare(options.folder / "data_")
    spoilt_once(options, work, verdict)
    if not options.quick:
        spoilt_for_good(options, work, verdict)
    spoilt_weights(options, work, verdict)
    dull_data(options, work, verdict)
    collapses(options, work, verdict)
    same_bits(options, work, verdict)
    extremes(options, verdict)
    return verdict


def moment(first: int, last: int, rank: int, hurt: int | None) -> Now:
    """True in steps first..last (from 1) on process ``hurt`` (None: on all)."""
    step = [0]
    real = Trainer.step

    def counting(self: Trainer, batches: Any, number: int) -> Any:
        step[0] = number + 1
        return real(self, batches, number)

    Trainer.step = counting  # type: ignore[method-assign]
    return lambda: first <= step[0] <= last and hurt in (None, rank)


def learner_hash(out: Path, rank: int) -> None:
    """Every process leaves the sum of its weights behind, exactly, for comparison."""
    from cmt_mae.engine.fit import _Fit

    real = _Fit.run_to_the_end

    def run(self: _Fit) -> Any:
        last = real(self)
        numbers = [
            p.detach().double().sum().item().hex() for p in self.task.model.parameters()
        ]
        (out.parent / f"{out.name}.weights{rank}").write_text(" ".join(numbers))
        return last

    _Fit.run_to_the_end = run  # type: ignore[method-assign]


def spoilt_once(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """One step sees the fault; the run goes on without it."""
    values = VALUES[:1] if options.quick else VALUES
    cases = [(p, v, None, 1) for p in PLACES for v in values]
    cases += [(p, v, 1, 2) for p in PLACES for v in values]  # on process 1; process 0 speaks of it
    if options.quick:
        cases = [cases[-1]]
    counts: Counter[str] = Counter()
    for number, (place, value, hurt, processes) in enumerate(cases):
        out = options.folder / f"once{number}"

        def inject(rank: int, place: str = place, value: float = value, hurt: int | None = hurt,
                   out: Path = out) -> None:  # fmt: skip
            PLACES[place][0](moment(AT, AT, rank, hurt), value)
            learner_hash(out, rank)

        launch = tiny.Launch(
            work.pretrain(work.packed, out, *PLAIN), out.with_suffix(".log"), processes, prepare=inject
        ).start()  # fmt: skip
        case = f"{value} in {place}, process {hurt} of {processes}"
        broken = judge_once(launch.finish(), launch.said(), out, PLACES[place][1], processes)
        verdict.failures += [f"{case}: {what}" for what in broken]
        verdict.trials += 1
        counts[f"{place}, {processes} process(es)"] += 1
        tiny.remove(out)
    verdict.figures["one step spoilt: trials by place"] = dict(counts)


def judge_once(statuses: list[int], said: str, out: Path, part: str, processes: int) -> list[str]:
    """What is wrong with a run of which one step was spoilt."""
    if any(statuses):
        return [f"exit {statuses}: {said.splitlines()[-1:]}"]
    broken = []
    if not re.search(
        rf"1 step\(s\) .* skipped, not finite: first {re.escape(part)} at step {AT} ", said
    ):
        named = [line for line in said.splitlines() if "not finite" in line]
        broken.append(f"'{part} at step {AT}' is not named: {named}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    skipped = {row["step"]: row["skipped_steps"] for row in rows if row["skipped_steps"]}
    if skipped != {AT: 1} or len(rows) != STEPS:
        broken.append(f"{len(rows)} rows, skipped {skipped}")
    state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
    taken = {int(entry["step"]) for entry in state["optimizer"]["state"].values()}
    if max(taken) != STEPS - 1:
        broken.append(f"the optimizer counts {max(taken)} steps")
    if not all(
        torch.isfinite(t).all() for part in ("learner", "momentum") for t in state[part].values()
    ):
        broken.append("weights that are not finite")
    hashes = {out.with_name(f"{out.name}.weights{rank}").read_text() for rank in range(processes)}
    if len(hashes) != 1:
        broken.append("the processes' weights differ")
    return broken


def spoilt_for_good(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """Every step from one on: the run stops with a good checkpoint and, mended, ends as if nothing had been."""
    counts = 0
    for place in ("image", "teacher output", "gradient"):
        for processes, hurt in ((1, None), (2, 1)):
            out = options.folder / f"good_{place.replace(' ', '_')}{processes}"
            words = work.pretrain(work.packed, out, *PLAIN, "--runtime.max_nonfinite=4")

            def inject(rank: int, place: str = place, hurt: int | None = hurt) -> None:
                PLACES[place][0](moment(AT, STEPS, rank, hurt), math.nan)

            launch = tiny.Launch(words, out.with_suffix(".log"), processes, prepare=inject).start()
            statuses, said = launch.finish(), launch.said()
            case = f"nan in {place} from step {AT} on, {processes} process(es)"
            line = f"4 steps in a row up to step {AT + 3} .*first: {re.escape(PLACES[place][1])} at step {AT + 3} "
            if set(statuses) != {2} or not re.search(line, said):
                verdict.failures.append(f"{case}: exit {statuses}, {said.splitlines()[-1:]}")
            state = load_checkpoint(list_checkpoints(out / "checkpoints")[-1])
            if not all(torch.isfinite(t).all() for t in state["learner"].values()):
                verdict.failures.append(f"{case}: the last checkpoint is not finite")
            if max(int(e["step"]) for e in state["optimizer"]["state"].values()) > AT - 1:
                verdict.failures.append(f"{case}: a spoilt step was taken")
            counts += 1
            tiny.remove(out)
    verdict.trials += counts
    verdict.figures["steps spoilt until the run stops"] = counts


def spoilt_weights(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """A weight that turns to nan in memory is named, never saved, and the run goes on from before it."""
    whole = options.folder / "whole" / "run"
    if not options.quick:
        words = work.pretrain(work.packed, whole, *PLAIN, "--runtime.max_nonfinite=30")
        tiny.Launch(words, options.folder / "whole.log").start().finish()
    names = ["student.blocks.0.attn.qkv.weight", "decoder.mask_token", "heads.teacher.bias"]
    cases = [(name, 1, None) for name in names] + [(name, 2, 1) for name in names]
    for name, processes, hurt in cases[:1] if options.quick else cases:
        out = options.folder / f"weight{processes}_{name}" / "run"

        def inject(rank: int, name: str = name, hurt: int | None = hurt) -> None:
            now = moment(AT, AT, rank, hurt)
            real = Pretraining.loss

            def loss(self: Pretraining, model: Any, batch: Any, step: int) -> Any:
                if now():
                    with torch.no_grad():
                        self.learner.get_parameter(name).view(-1)[0] = math.nan
                return real(self, model, batch, step)

            Pretraining.loss = loss  # type: ignore[method-assign]

        words = work.pretrain(work.packed, out, *PLAIN, "--runtime.max_nonfinite=30")
        launch = tiny.Launch(words, out.with_suffix(".log"), processes, prepare=inject).start()
        statuses, said = launch.finish(), launch.said()
        case = f"weight {name}, {processes} process(es)"
        if (
            set(statuses) != {2}
            or f"weight learner.{name}" not in said
            or "no checkpoint was" not in said
        ):
            verdict.failures.append(f"{case}: exit {statuses}, {said.splitlines()[-3:]}")
        again = tiny.Launch(words, out.with_suffix(".log"), processes).start()
        if any(again.finish()):
            verdict.failures.append(f"{case}: does not go on: {again.said().splitlines()[-1:]}")
        elif processes == 1 and not options.quick:
            found = [d for d in differences(whole, out) if "config.yaml" not in d]
            verdict.failures += [f"{case}: after it, {what}" for what in found[:3]]
        verdict.trials += 1
        tiny.remove(out)
    verdict.figures["weights spoilt in memory"] = len(cases[:1] if options.quick else cases)


def dull_data(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """Constant images, images of one colour each, batches of one: finite, nothing skipped."""
    black, plain = options.folder / "black", options.folder / "one_colour"
    for folder in (black, plain):
        (folder / "train" / "a").mkdir(parents=True)
    rng = np.random.default_rng(options.seed)
    for number in range(40):
        colours = (np.zeros(3), rng.integers(0, 256, 3))
        for folder, colour in zip((black, plain), colours, strict=True):
            picture = np.broadcast_to(colour.astype(np.uint8), (40, 40, 3))
            Image.fromarray(np.ascontiguousarray(picture)).save(
                folder / "train/a" / f"{number}.png"
            )
    kinds = {
        "black": (black, 8),
        "one colour each": (plain, 8),
        "batches of one": (Path(work.packed), 1),
    }
    counts = 0
    for kind, (data, batch) in kinds.items():
        if options.quick and batch != 1:
            continue
        for method, more in list(METHODS.items())[: 1 if options.quick else None]:
            for precision in ("fp32", "bf16")[: 1 if options.quick else 2]:
                out = options.folder / f"dull{counts}"
                short = [f"--batch_size={batch}", f"--precision={precision}"]
                short += ["--epochs=0.5"] if batch == 1 else []
                words = work.pretrain(str(data), out, *PLAIN, *short, *more)
                launch = tiny.Launch(words, out.with_suffix(".log")).start()
                statuses, case = launch.finish(), f"{kind}, {method}, {precision}"
                if any(statuses):
                    verdict.failures.append(f"{case}: {launch.said().splitlines()[-1:]}")
                    continue
                if "not finite" in launch.said():
                    verdict.failures.append(f"{case}: {launch.said().splitlines()[-1:]}")
                text = (out / "metrics.jsonl").read_text()
                if "NaN" in text or "Infinity" in text:
                    verdict.failures.append(f"{case}: metrics that are not finite")
                counts += 1
                tiny.remove(out)
    verdict.trials += counts
    verdict.figures["runs on constant images, one-colour images, batches of one"] = counts


def collapses(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """Alarms sound where there is collapse, and in no healthy run."""
    for name, (how, more, number) in COLLAPSES.items():
        if options.quick and name != "constant teacher":
            continue
        out = options.folder / f"collapse_{name.replace(' ', '_')}"
        words = work.pretrain(work.packed, out, *PLAIN, *more)
        launch = tiny.Launch(words, out.with_suffix(".log"), prepare=how).start()
        statuses, said = launch.finish(), launch.said()
        told = [
            line for line in said.splitlines() if "signs of collapse" in line and number in line
        ]
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        recorded = sum(row["collapse_signs"] > 0 for row in rows)
        if any(statuses) or not told or not recorded or "not finite" in said:
            verdict.failures.append(f"{name}: exit {statuses}, told {told[:1]}, {recorded} rows")
        verdict.figures[f"alarm of: {name}"] = told[0] if told else "none"
        verdict.trials += 1
        tiny.remove(out)
    least: dict[str, float] = {}
    runs = [(f"recorded {n}", rows) for n, rows in json.loads(HEALTHY.read_text())["runs"].items()]
    for method, more in {} if options.quick else METHODS.items():
        for seed in range(3):
            out = options.folder / f"healthy_{method}{seed}"
            words = work.pretrain(
                work.packed, out, "--epochs=40", "--runtime.log_every=10", f"--seed={seed}", *more
            )
            tiny.Launch(words, out.with_suffix(".log")).start().finish()
            lines = (out / "metrics.jsonl").read_text().splitlines()
            runs.append((f"{method}, seed {seed}", [json.loads(line) for line in lines]))
            tiny.remove(out)
    for name, rows in runs:
        sounding = [(row["step"], signs(row)) for row in rows if signs(row)]
        verdict.failures += [f"alarm in the healthy run {name}: {sounding[:2]}"] if sounding else []
        verdict.trials += 1
        for row in rows:
            for key, value in row.items():
                if limit_of(key) is not None:
                    least[key] = min(least.get(key, math.inf), round(value, 4))
    verdict.figures["healthy runs without an alarm"] = len(runs)
    verdict.figures["lines of metrics of them"] = sum(len(rows) for _, rows in runs)
    verdict.figures["least values in healthy runs"] = dict(sorted(least.items()))


def same_bits(options: Options, work: tiny.Tiny, verdict: Verdict) -> None:
    """The same command twice: the same files; another seed: others; the seed is printed."""
    sure = ["--deterministic"]
    runs = {"a": [], "b": [], "c": sure, "d": sure, "e": sure, "f": sure, "other": ["--seed=1"]}
    if options.quick:
        runs = {"e": sure, "f": sure}
    outs = {name: options.folder / f"bits_{name}" / "run" for name in runs}
    for name, more in runs.items():
        launch = tiny.Launch(
            work.pretrain(work.packed, outs[name], *more), outs[name].with_suffix(".log"),
            real=name in "abcd", prepare=strict,
        ).start()  # fmt: skip
        statuses, said = launch.finish(), launch.said()
        if any(statuses) or f"seed {1 if name == 'other' else 0}" not in said:
            verdict.failures.append(f"{name}: exit {statuses}, {said.splitlines()[-1:]}")
        verdict.trials += 1
    pairs = (("a", "b"), ("a", "c"), ("c", "d"), ("e", "f"))
    for one, two in pairs[3 if options.quick else 0 :]:
        found = [d for d in differences(outs[one], outs[two]) if "config.yaml" not in d]
        verdict.failures += [f"the same seed, {one} and {two}: {what}" for what in found[:3]]
    if not options.quick and not differences(outs["e"], outs["other"]):
        verdict.failures.append("another seed gives the same result")
    verdict.figures["runs compared bit for bit"] = len(runs)


def strict(_: int) -> None:
    """torch refuses what it cannot do alike; checked at the end of the first step."""
    real = Trainer.step

    def step(self: Trainer, batches: Any, number: int) -> Any:
        asked = self.task.config.runtime.deterministic  # type: ignore[attr-defined]
        assert torch.are_deterministic_algorithms_enabled() == asked
        assert torch.backends.cudnn.deterministic == asked
        return real(self, batches, number)

    Trainer.step = step  # type: ignore[method-assign]


def extremes(options: Options, verdict: Verdict) -> None:
    """Attention at extreme activations, in a process of its own."""
    program = [
        sys.executable,
        "-m",
        "benchmarks.faults.attention_extremes",
        str(int(options.quick)),
    ]
    done = subprocess.run(
        program,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        timeout=300,
    )
    if done.returncode:
        verdict.failures.append(
            f"attention at extreme activations: {done.stderr.splitlines()[-1:]}"
        )
        return
    found = json.loads(done.stdout)
    verdict.failures += found["failures"]
    verdict.trials += found["trials"]
    verdict.figures |= found["figures"]
