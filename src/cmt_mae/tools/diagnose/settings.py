"""Settings that cannot do well, whatever the images: told before a run starts, and first of all when one fails."""

from typing import Any

from cmt_mae.core.run_reader import RunRecord, section
from cmt_mae.tools.diagnose.finding import Finding, problem, warning
from cmt_mae.tools.diagnose.limits import FAR, FEW_IMAGES, FEW_STEPS

# A setting is named where it is far outside what published recipes use; each limit's reason stands beside it.
HIGH_LR, LOW_LR = 1e-2, 1e-6  # of AdamW after scaling with the batch; published: 1e-4 to 6e-3
HIGH_DECAY = 0.01  # lr x weight decay: weights halve in 70 steps; published: 2e-4 at most
HIGH_RATIO, LOW_RATIO = 0.95, 0.15
"""Hidden share; published: 0.4 to 0.9, AttMask's 0.1 to 0.5 for iBOT."""
WIDE, NARROW = 5.0, 0.2  # standard deviation of normalised pixels; a right one is 0.8 to 1.2


def check_settings(run: RunRecord) -> list[Finding]:
    """What is wrong with the settings and the plan of a run or a run-to-be; unknown ones are passed over."""
    found = [*check_schedule(run), *check_mask(run), *check_scale(run)]
    steps = run.total_steps
    if 0 < steps < FEW_STEPS:
        found.append(problem(
            "settings", "too few steps",
            f"{steps} in all; small healthy runs need about {FEW_STEPS} before they predict more than the mean",
            f"more --epochs ({run.number('epochs'):g} now), or a smaller --batch-size "
            f"({run.number('batch_size'):g} now)",
        ))  # fmt: skip
    return found


def check_schedule(run: RunRecord) -> list[Finding]:
    """Learning rate, warm-up and weight decay."""
    found: list[Finding] = []
    blr, batch, epochs = run.number("optim.blr"), run.number("batch_size"), run.number("epochs")
    warmup, decay = run.number("optim.warmup_epochs"), run.number("optim.weight_decay")
    peak = section(run.facts, "plan").get("lr")
    peak = float(peak) if isinstance(peak, int | float) else float("nan")
    if peak > HIGH_LR or peak < LOW_LR:
        word = "high" if peak > HIGH_LR else "low"
        found.append(problem(
            "settings", f"learning rate too {word}",
            f"{blr:g} x {batch:g}/256 = {peak:g} at its peak; AdamW takes 1e-4 to 6e-3 here",
            f"--optim.blr {1.5e-3 * 256 / batch:.2g}",  # 1.5e-3 at the peak
        ))  # fmt: skip
    if warmup > 0.5 * epochs:
        never = warmup >= epochs
        left = (
            f"gets to {epochs / warmup:.0%} of its peak"
            if never
            else "is low for over half of them"
        )
        found.append((problem if never else warning)(
            "settings", "warm-up too long", f"{warmup:g} of {epochs:g} epochs: the learning rate {left}",
            f"--optim.warmup_epochs {max(0.05 * epochs, 0.01):.2g}",
        ))  # fmt: skip
    if peak * decay > HIGH_DECAY and peak <= HIGH_LR:
        found.append(problem(
            "settings", "weight decay too high",
            f"{decay:g} x {peak:g}: what was learnt {0.7 / (peak * decay):.0f} steps ago has lost half its weight",
            "--optim.weight_decay 0.05",
        ))  # fmt: skip
    return found


def check_mask(run: RunRecord) -> list[Finding]:
    """How much is hidden."""
    hidden, patches = run.plan("n_mask"), run.plan("n_patches")
    share = f"{hidden} of {patches} patches are hidden"
    fix = "--mask.ratio 0.75"
    if hidden > HIGH_RATIO * patches:
        why = f"{share}: too little to predict them from"
        return [problem("settings", "mask ratio too high", why, fix)]
    if hidden < LOW_RATIO * patches:
        why = f"{share}: neighbours give them away"
        return [warning("settings", "mask ratio too low", why, fix)]
    return []


def normalisation(run: RunRecord) -> tuple[list[float], list[float]]:
    """data.mean and data.std; empty where they are left to the library."""
    mean, std = run.setting("data.mean", []), run.setting("data.std", [])
    both = [
        v for v in (mean, std) if isinstance(v, list) and all(isinstance(x, float | int) for x in v)
    ]
    return (both[0], both[1]) if len(both) == 2 else ([], [])


def check_scale(run: RunRecord) -> list[Finding]:
    """Mean and std of pixels in 0..255 where 0..1 is meant."""
    mean, std = normalisation(run)
    if any(abs(v) > 1.5 for v in mean) or any(v > 1.5 for v in std):
        return [problem(
            "settings", "normalisation wrong", f"data.mean {mean}, data.std {std} are of pixels in 0..255",
            "divide them by 255, or leave both out",
        )]  # fmt: skip
    return []


def check_pixels(run: RunRecord, size: int, split: dict[str, Any]) -> list[Finding]:
    """Normalisation and crop size against the images themselves.

    size: shorter side of the student's input in pixels. split: ``images.summary`` of the train split.
    """
    found: list[Finding] = []
    mean, std = normalisation(run)
    if split["height"] and len(mean) == len(split["mean"]) == len(std) and not check_scale(run):
        shifted = [(m - n) / s for m, n, s in zip(split["mean"], mean, std, strict=True)]
        widths = [t / s for t, s in zip(split["std"], std, strict=True)]
        if max(map(abs, shifted)) > FAR or max(widths) > WIDE or max(widths) < NARROW:
            found.append(problem(
                "settings", "normalisation wrong",
                f"the images have mean {split['mean']} and std {split['std']}; data.mean {mean} and "
                f"data.std {std} leave them at {[round(v, 2) for v in shifted]} with std "
                f"{[round(v, 2) for v in widths]}",
                "leave data.mean and data.std out",
            ))  # fmt: skip
    found += few_images(split["images"])
    if split["shorter_side"] and split["shorter_side"][1] < size:
        half = split["shorter_side"][1]
        found.append(warning(
            "data", "images smaller than the crop",
            f"half of them have a shorter side under {half + 1} pixels, crops of {size} are asked for",
            f"--student.img_size [{half}] or less, in multiples of the patch",
        ))  # fmt: skip
    return found


def few_images(images: int) -> list[Finding]:
    """So few images (0: not known) that a run learns them by heart."""
    if not 0 < images < FEW_IMAGES:
        return []
    return [warning(
        "data", "too few images",
        f"{images} in all: a run learns them by heart, and its k-NN does not rise with it",
        "more images, a pre-trained start (--init_from), or a published backbone as it is",
    )]  # fmt: skip
