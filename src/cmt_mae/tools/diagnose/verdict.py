"""Is it working? One honest line, from the numbers that the run has logged and from what ``diagnose`` finds."""

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.text import duration
from cmt_mae.engine.collapse import limit_of, signs
from cmt_mae.tools.diagnose.finding import Finding
from cmt_mae.tools.diagnose.run import diagnose, skipped_steps

Mood = Literal["good", "unclear", "bad"]

CLEAR = 2.0
"""Standard errors that a change of k-NN accuracy needs to count as one."""
SMALLEST_RISE = 1.0
"""Points of k-NN that count as a change where the number of measured images is not known."""
LOSS_FALL = 0.02
"""Share of the loss, of the same stage, that a fall needs to count as one."""
EDGE = 0.1
"""Share of a stage's lines at its beginning and its end whose means are compared."""
NEVER_MIND_KNN = ("signs of collapse", "steps that are not finite")
"""Problems that outweigh a k-NN that rises; it outweighs all others."""


@dataclass
class Verdict:
    """What to think of a run at first sight."""

    mood: Mood
    """good: learns | bad: it does not, or collapses | unclear: not measured, too early, or mixed."""
    word: str
    """One or two words: learning, not learning, not measured, ..."""
    parts: list[str] = field(default_factory=list)
    """What it rests on; each a clause."""
    fix: str = ""
    """What the reader can do about it; empty where there is nothing to do."""
    findings: list[Finding] = field(default_factory=list)
    """Everything that ``diagnose`` names, likeliest cause first."""

    @property
    def line(self) -> str:
        """``learning: k-NN 61.2, up 9.8 since the switch; no collapse``."""
        return f"{self.word}: {'; '.join(self.parts)}" if self.parts else self.word


@dataclass
class Learning:
    """Whether one kind of number rises."""

    mood: Mood
    word: str
    text: str
    fix: str = ""


def judge(run: RunRecord) -> Verdict:
    """The verdict of a run. Signs of collapse and lost steps outweigh k-NN, k-NN outweighs the rest."""
    if not run.log_rows() and not run.knn():
        word = "just started" if run.going_on else "nothing logged"
        return Verdict("unclear", word, [] if run.going_on else ["no line of metrics.jsonl"])
    findings, learning = diagnose(run), learns(run)
    problems = [f for f in findings if f.level == "problem"]
    worst = next((f for f in problems if f.what in NEVER_MIND_KNN), None)
    if worst is None and learning.mood != "good":
        worst = next(iter(problems), None)
    skipped = skipped_steps(run)
    lost = f"{skipped} step(s) of {run.last_step} skipped, not finite" if skipped else ""
    now = any(f.what == "signs of collapse" for f in findings)
    mood, collapse = learning.mood, "" if now else collapse_so_far(run)
    if worst is not None:
        mood = "bad"
    elif mood == "good" and (skipped or collapse.startswith("signs")):
        mood = "unclear"
    cause = worst.why if worst is not None else ""
    if worst is not None and worst.what == "steps that are not finite":
        cause = ""  # said below
    parts = [part for part in (cause, learning.text, collapse, lost, state(run)) if part]
    fix = worst.fix if worst is not None else learning.fix
    return Verdict(mood, worst.what if worst is not None else learning.word, parts, fix, findings)


def learns(run: RunRecord) -> Learning:
    """By k-NN where it was measured twice, else by the loss, which says less."""
    knn = run.knn()
    if len(knn) >= 2:
        return by_knn(run, knn)
    by = by_loss(run)
    if knn:
        by.text = f"k-NN {knn[0][1]:.1f}, measured once (step {knn[0][0]}); {by.text}"
        return by
    if by.word == "loss falls":
        by.word = "not measured"
    by.text = f"no k-NN; {by.text}"
    if not by.fix and "runtime.probe_data" in run.settings:
        by.fix = "give --runtime.probe_data a labelled folder: the loss says little of the features"
    return by


def by_knn(run: RunRecord, knn: list[tuple[int, float]]) -> Learning:
    """The newest measurement against the one at the switch of stages, and against the first one."""
    (first_step, first), (last_step, last) = knn[0], knn[-1]
    before = [pair for pair in knn if run.switch_step and 0 < pair[0] <= run.switch_step]
    since_switch = bool(before) and last_step > (run.switch_step or 0)
    start = before[-1][1] if since_switch else first
    whole = "from the untrained student" if first_step == 0 else f"since step {first_step}"
    since = "since the switch" if since_switch else whole
    text = f"k-NN {last:.1f}, {change(last - start)} {since}"
    if since_switch:
        text += f" ({change(last - first)} {whole})"
    best_step, best = max(knn, key=lambda pair: pair[1])
    rise, rise_needed = last - first, needed(run, first, last)
    if best - last >= needed(run, last, best):
        below = f"{text}; {best - last:.1f} below its best, at step {best_step}"
        fix = "checkpoints/best.pt is the best checkpoint" if best_step else ""
        return Learning("bad" if rise <= 0 else "unclear", "getting worse", below, fix)
    if last - start >= needed(run, start, last):
        return Learning("good", "learning", text)
    if since_switch and rise >= rise_needed:
        return Learning("good", "learning, but level since the switch", text)
    chance = f"{text}; chance alone moves it by up to {rise_needed:.1f}"
    if not run.finished:
        return Learning("unclear", "no clear rise yet", chance)
    fix = "train longer, or try another --optim.blr, --mask.ratio, or --target.tokens all+cls"
    if rise <= 0:
        return Learning("bad", "not learning", chance, fix)
    return Learning("unclear", "no clear rise", chance, fix)


def needed(run: RunRecord, one: float, other: float) -> float:
    """Points of k-NN between two measurements that chance alone rarely makes.

    Both are taken on the same images, which makes differences smaller than between two sets: careful.
    """
    images = run.facts.get("probe", {})
    count = images.get("val") if isinstance(images, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return SMALLEST_RISE
    shares = [min(1.0, max(0.0, value / 100)) for value in (one, other)]
    return 100 * CLEAR * math.sqrt(sum(p * (1 - p) for p in shares) / count)


def by_loss(run: RunRecord) -> Learning:
    """The loss at the beginning and the end of the run's present stage: between stages it does not compare."""
    rows = [row for row in run.log_rows() if "loss" in row]
    stage = rows[-1].get("stage") if rows else None
    losses = [row["loss"] for row in rows if row.get("stage") == stage]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if rows and not math.isfinite(losses[-1]):
        return Learning("bad", "not learning", "the loss is not finite")
    if len(finite) < 4:
        few = f"{len(finite)} value(s) of the loss in this stage"
        return Learning("unclear", "too early to say", few)
    edge = max(1, round(EDGE * len(finite)))
    begin, end = fmean(finite[:edge]), fmean(finite[-edge:])
    where = f" in stage {stage:.0f}" if run.switch_step and stage else ""
    text = f"loss {begin:.3g} → {end:.3g}{where}"
    if begin - end >= LOSS_FALL * abs(begin):
        return Learning("unclear", "loss falls", text)
    fix = "try a higher --optim.blr, or look at the images and the teacher's maps"
    return Learning("bad" if run.finished else "unclear", "loss does not fall", text, fix)


def collapse_so_far(run: RunRecord) -> str:
    """That there was none, or when, now that it is over; "" where nothing was watched."""
    rows = [row for row in run.log_rows() if any(limit_of(name) is not None for name in row)]
    steps = [int(row["step"]) for row in rows if signs(row)]
    if not steps:
        return "no collapse" if rows else ""
    where = f"at step {steps[0]}"
    if len(steps) > 1:
        where = f"in {len(steps)} lines, steps {steps[0]} to {steps[-1]}"
    over = "" if signs(rows[-1]) else ", over since"
    return f"signs of collapse {where}{over}"


def state(run: RunRecord) -> str:
    """Where the run stands, where it is not simply done."""
    step, total = run.last_step, run.total_steps
    of = f"step {step} of {total}" if total else f"step {step}"
    if run.finished:
        return ""
    if run.going_on:
        silent = run.silent_seconds
        quiet = f", no news for {duration(silent)}" if silent > 600 else ""
        return f"running, {of}{quiet}"
    return f"stopped early at {of}" if total else f"at {of}, of how many is not known"


def change(points: float) -> str:
    """``up 9.8``, ``down 0.3`` or ``unchanged``."""
    if abs(points) < 0.05:
        return "unchanged"
    return f"{'up' if points > 0 else 'down'} {abs(points):.1f}"
