"""Is it working? One honest line, from the numbers that the run has logged."""

import math
from dataclasses import dataclass, field
from typing import Literal

from cmt_mae.engine.collapse import limit_of, signs
from cmt_mae.tools.report.page.record import Record

Mood = Literal["good", "unclear", "bad"]

CLEAR = 2.0
"""Standard errors that a change of k-NN accuracy needs to count as one."""
SMALLEST_RISE = 1.0
"""Points of k-NN that count as a change where the number of measured images is not known."""
LOSS_FALL = 0.02
"""Share of the loss, of the same stage, that a fall needs to count as one."""
FALLS = "loss falls"
EDGE = 0.1
"""Share of a stage's lines at its begin and its end whose means are compared."""


@dataclass
class Verdict:
    """What to think of a run at first sight."""

    mood: Mood
    """good: learns | bad: it does not, or collapses | unclear: not measured, too early, or mixed."""
    word: str
    """One or two words: learning, not learning, not measured, ..."""
    parts: list[str] = field(default_factory=list)
    """What it rests on; each a clause."""
    mend: str = ""
    """What the reader can do about it; empty where there is nothing to mend."""

    @property
    def line(self) -> str:
        """``learning: k-NN 61.2, up 9.8 since the switch; no collapse``."""
        return f"{self.word}: {'; '.join(self.parts)}" if self.parts else self.word


@dataclass
class Finding:
    """What one kind of number says."""

    mood: Mood
    word: str
    text: str
    mend: str = ""


def judge(record: Record) -> Verdict:
    """The verdict of a run. Signs of collapse and lost steps outweigh k-NN, k-NN outweighs the loss."""
    rows = record.log_rows()
    if not rows and not record.knn():
        word = "just started" if record.going_on else "nothing logged"
        return Verdict("unclear", word, [] if record.going_on else ["no line of metrics.jsonl"])
    learning, collapse, skipped = learns(record), collapses(rows), skips(rows)
    moods = [finding.mood for finding in (learning, collapse, skipped) if finding]
    first = next((f for f in (collapse, skipped) if f and f.mood == "bad"), learning)
    mood: Mood = "bad" if "bad" in moods else learning.mood
    if mood == "good" and "unclear" in moods:
        mood = "unclear"
    findings = [f for f in (first, learning, collapse, skipped) if f is not None]
    parts = [finding.text for finding in findings if finding.text]
    ending = state(record)
    mend = next((f.mend for f in findings if f.mend), "")
    return Verdict(mood, first.word, [*dict.fromkeys(parts), *([ending] if ending else [])], mend)


def learns(record: Record) -> Finding:
    """By k-NN where it was measured twice, else by the loss, which says less."""
    knn = record.knn()
    if len(knn) >= 2:
        return by_knn(record, knn)
    by = by_loss(record)
    if not knn:
        by.word = "not measured" if by.word == FALLS else by.word
        by.text = f"no k-NN; {by.text}"
        if not by.mend and "runtime.probe_data" in record.settings:
            by.mend = (
                "give --runtime.probe_data a labelled folder: the loss says little of the features"
            )
    else:
        by.text = f"k-NN {knn[0][1]:.1f}, measured once (step {knn[0][0]}); {by.text}"
    return by


def by_knn(record: Record, knn: list[tuple[int, float]]) -> Finding:
    """The newest measurement against the one at the switch of stages, and against the first one."""
    (first_step, first), (last_step, last) = knn[0], knn[-1]
    before = [pair for pair in knn if record.switch_step and 0 < pair[0] <= record.switch_step]
    since_switch = bool(before) and last_step > (record.switch_step or 0)
    start = before[-1][1] if since_switch else first
    whole = "from the untrained student" if first_step == 0 else f"since step {first_step}"
    text = (
        f"k-NN {last:.1f}, {change(last - start)} {'since the switch' if since_switch else whole}"
    )
    if since_switch:
        text += f" ({change(last - first)} {whole})"
    best_step, best = max(knn, key=lambda pair: pair[1])
    rise, rise_needed = last - first, needed(record, first, last)
    if best - last >= needed(record, last, best):
        below = f"{text}; {best - last:.1f} below its best, at step {best_step}"
        mend = "checkpoints/best.pt is the best checkpoint" if best_step else ""
        mood: Mood = "bad" if rise <= 0 else "unclear"
        return Finding(mood, "getting worse", below, mend)
    if last - start >= needed(record, start, last):
        return Finding("good", "learning", text)
    if since_switch and rise >= rise_needed:
        return Finding("good", "learning, but level since the switch", text)
    chance = f"{text}; chance alone moves it by up to {rise_needed:.1f}"
    mend = (
        "train longer, or try another --optim.blr, --mask.ratio, or --target.tokens all+cls; cmt-mae doctor RUN "
        "names the likely cause"
    )
    if not record.finished:
        return Finding("unclear", "no clear rise yet", chance)
    if rise <= 0:
        return Finding("bad", "not learning", chance, mend)
    return Finding("unclear", "no clear rise", chance, mend)


def needed(record: Record, one: float, other: float) -> float:
    """Points of k-NN between two measurements that chance alone seldom makes.

    Both are taken on the same images, which makes differences smaller than between two sets: careful.
    """
    images = record.facts.get("probe", {})
    count = images.get("val") if isinstance(images, dict) else None
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        return SMALLEST_RISE
    shares = [min(1.0, max(0.0, value / 100)) for value in (one, other)]
    return 100 * CLEAR * math.sqrt(sum(p * (1 - p) for p in shares) / count)


def by_loss(record: Record) -> Finding:
    """The loss at the begin and the end of the stage that the run is in: between stages it does not compare."""
    rows = [row for row in record.log_rows() if "loss" in row]
    stage = rows[-1].get("stage") if rows else None
    losses = [row["loss"] for row in rows if row.get("stage") == stage]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if rows and not math.isfinite(losses[-1]):
        return Finding("bad", "not learning", "the loss is not finite")
    if len(finite) < 4:
        return Finding(
            "unclear", "too early to say", f"{len(finite)} value(s) of the loss in this stage"
        )
    edge = max(1, round(EDGE * len(finite)))
    begin, end = _mean(finite[:edge]), _mean(finite[-edge:])
    where = f" in stage {stage:.0f}" if record.switch_step and stage else ""
    text = f"loss {begin:.3g} → {end:.3g}{where}"
    if begin - end >= LOSS_FALL * abs(begin):
        return Finding("unclear", FALLS, text)
    return Finding(
        "bad" if record.finished else "unclear",
        "loss does not fall",
        text,
        "try a higher --optim.blr, or look at the images and the teacher's maps",
    )


def collapses(rows: list[dict[str, float]]) -> Finding | None:
    """Signs of collapse in the newest line, or earlier; None where nothing was watched."""
    watched = [row for row in rows if any(limit_of(name) is not None for name in row)]
    if not watched:
        return None
    found = [(int(row["step"]), signs(row)) for row in watched]
    _, now = found[-1]
    if now:
        healthy = max((place for place, (_, names) in enumerate(found) if not names), default=-1)
        since = found[healthy + 1][0]
        return Finding(
            "bad", "signs of collapse", f"since step {since}, {', '.join(now)}",
            "lower --optim.blr, or look at the images and the teacher; cmt-mae doctor RUN names the likely cause",
        )  # fmt: skip
    earlier = [step for step, names in found if names]
    if earlier:
        where = f"at step {earlier[0]}"
        if len(earlier) > 1:
            where = f"in {len(earlier)} lines, steps {earlier[0]} to {earlier[-1]}"
        return Finding("unclear", "collapse", f"signs of collapse {where}, over since")
    return Finding("good", "", "no collapse")


def skips(rows: list[dict[str, float]]) -> Finding | None:
    """Steps that were left out because a number was not finite."""
    counts = [(row["step"], row.get("skipped_steps", 0.0)) for row in rows]
    total = sum(count for _, count in counts if math.isfinite(count))
    if not total:
        return None
    steps, text = (
        rows[-1]["step"],
        f"{total:.0f} step(s) of {rows[-1]['step']:.0f} skipped, not finite",
    )
    mend = "lower --optim.blr or set --optim.clip; the warnings name the first part that was not finite"
    mood: Mood = "bad" if total > 0.1 * steps else "unclear"
    return Finding(mood, "steps lost", text, mend)


def state(record: Record) -> str:
    """Where the run stands, where it is not simply done."""
    step, total = record.last_step, record.total_steps
    of = f"step {step} of {total}" if total else f"step {step}"
    if record.finished:
        return ""
    if record.going_on:
        silent = record.silent_seconds
        quiet = f", no news for {duration(silent)}" if silent > 600 else ""
        return f"running, {of}{quiet}"
    return f"stopped early at {of}" if total else f"at {of}, of how many is not known"


def change(points: float) -> str:
    """``up 9.8``, ``down 0.3`` or ``unchanged``."""
    if abs(points) < 0.05:
        return "unchanged"
    return f"{'up' if points > 0 else 'down'} {abs(points):.1f}"


def duration(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3.4 h``, ``2.1 days``."""
    for size, unit, digits in ((86400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size or (unit == "h" and seconds >= size):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
