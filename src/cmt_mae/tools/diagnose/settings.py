"""Settings that cannot do well, whatever the images: told before a run starts, and first of all when one fails."""

from typing import Any

from cmt_mae.method.masking import count_masked
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.stepping import Plan
from cmt_mae.tools.diagnose.finding import Finding, problem, warning

# A setting is named where it is far outside what published recipes use; each limit's reason stands beside it.
FEW_STEPS = (
    100  # healthy small runs spend about so many on predicting the mean (benchmarks/sick_runs.py)
)
FEW_IMAGES = 1000  # below, a run learns them by heart: its loss falls and its k-NN does not rise
HIGH_LR, LOW_LR = 1e-2, 1e-6  # of AdamW after scaling with the batch; published: 1e-4 to 6e-3
HIGH_DECAY = 0.01  # lr x weight decay: weights halve in 70 steps; published: 2e-4 at most
HIGH_RATIO, LOW_RATIO = (
    0.95,
    0.15,
)  # hidden share; published: 0.4 to 0.9, AttMask's 0.1 to 0.5 for iBOT
FAR = 2.0  # mean of normalised pixels, in standard deviations; a right one is 0 +- 0.5
WIDE, NARROW = 5.0, 0.2  # standard deviation of normalised pixels; a right one is 0.8 to 1.2


def check_settings(config: PretrainConfig, plan: Plan) -> list[Finding]:
    """What is wrong with the settings of a run with this plan."""
    found = [*check_schedule(config, plan), *check_mask(config), *check_scale(config)]
    if plan.total_steps < FEW_STEPS:
        found.append(problem(
            "settings", "too few steps",
            f"{plan.total_steps} in all; small healthy runs need about {FEW_STEPS} before they predict more "
            f"than the mean",
            f"more --epochs ({config.epochs:g} now), or a smaller --batch-size ({config.batch_size} now)",
        ))  # fmt: skip
    return found


def check_schedule(config: PretrainConfig, plan: Plan) -> list[Finding]:
    """Learning rate, warm-up and weight decay."""
    found: list[Finding] = []
    optim = config.optim
    if plan.lr > HIGH_LR:
        found.append(problem(
            "settings", "learning rate too high",
            f"{optim.blr:g} x {config.batch_size}/256 = {plan.lr:g} at its peak; AdamW takes 1e-4 to 6e-3 here",
            f"--optim.blr {suggested_blr(config):.2g}",
        ))  # fmt: skip
    elif plan.lr < LOW_LR:
        found.append(problem(
            "settings", "learning rate too low",
            f"{optim.blr:g} x {config.batch_size}/256 = {plan.lr:g} at its peak; AdamW takes 1e-4 to 6e-3 here",
            f"--optim.blr {suggested_blr(config):.2g}",
        ))  # fmt: skip
    if optim.warmup_epochs > 0.5 * config.epochs:
        never = optim.warmup_epochs >= config.epochs
        reached = config.epochs / optim.warmup_epochs
        left = f"gets to {reached:.0%} of its peak" if never else "is low for over half of them"
        made = problem if never else warning
        found.append(made(
            "settings", "warm-up too long",
            f"{optim.warmup_epochs:g} of {config.epochs:g} epochs: the learning rate {left}",
            f"--optim.warmup_epochs {max(0.05 * config.epochs, 0.01):.2g}",
        ))  # fmt: skip
    if plan.lr * optim.weight_decay > HIGH_DECAY and plan.lr <= HIGH_LR:
        found.append(problem(
            "settings", "weight decay too high",
            f"{optim.weight_decay:g} x {plan.lr:g}: what was learnt "
            f"{0.7 / (plan.lr * optim.weight_decay):.0f} steps ago "
            "has lost half its weight", "--optim.weight_decay 0.05",
        ))  # fmt: skip
    return found


def suggested_blr(config: PretrainConfig) -> float:
    """A base learning rate that gives 1.5e-3 at the peak with this batch."""
    return 1.5e-3 * 256 / config.batch_size


def check_mask(config: PretrainConfig) -> list[Finding]:
    """How much is hidden."""
    rows, columns = config.student.grid()
    patches = rows * columns
    hidden = count_masked(patches, config.mask.ratio)
    share = f"{hidden} of {patches} patches are hidden"
    if hidden > HIGH_RATIO * patches:
        return [
            problem(
                "settings",
                "mask ratio too high",
                f"{share}: too little to predict them from",
                "--mask.ratio 0.75",
            )
        ]
    if hidden < LOW_RATIO * patches:
        return [
            warning(
                "settings",
                "mask ratio too low",
                f"{share}: neighbours give them away",
                "--mask.ratio 0.75",
            )
        ]
    return []


def check_scale(config: PretrainConfig) -> list[Finding]:
    """Mean and std of pixels in 0..255 where 0..1 is meant."""
    if any(abs(v) > 1.5 for v in config.data.mean) or any(v > 1.5 for v in config.data.std):
        return [problem(
            "settings", "normalisation wrong",
            f"data.mean {config.data.mean}, data.std {config.data.std} are of pixels in 0..255",
            "divide them by 255, or leave both out",
        )]  # fmt: skip
    return []


def check_pixels(config: PretrainConfig, split: dict[str, Any]) -> list[Finding]:
    """Normalisation and crop size against the images themselves (``summary`` of their train split)."""
    found: list[Finding] = []
    mean, std = config.data.mean, config.data.std
    if split["height"] and len(mean) == len(split["mean"]) == len(std) and not check_scale(config):
        shifted = [(m - n) / s for m, n, s in zip(split["mean"], mean, std, strict=True)]
        widths = [t / s for t, s in zip(split["std"], std, strict=True)]
        if max(map(abs, shifted)) > FAR or max(widths) > WIDE or max(widths) < NARROW:
            found.append(problem(
                "settings", "normalisation wrong",
                f"the images have mean {split['mean']} and std {split['std']}; data.mean {mean} and data.std "
                f"{std} leave "
                f"them at {[round(v, 2) for v in shifted]} with std {[round(v, 2) for v in widths]}",
                "leave data.mean and data.std out",
            ))  # fmt: skip
    found += few_images(split["images"])
    size = min(config.student.size())
    if split["shorter_side"] and split["shorter_side"][1] < size:
        found.append(warning(
            "data", "images smaller than the crop",
            f"half of them have a shorter side under {split['shorter_side'][1] + 1} pixels, crops of {size} "
            f"are asked for",
            f"--student.img_size [{split['shorter_side'][1]}] or less, in multiples of the patch",
        ))  # fmt: skip
    return found


def few_images(images: int) -> list[Finding]:
    """So few images (0: not known) that a run learns them by heart."""
    if not 0 < images < FEW_IMAGES:
        return []
    return [
        warning(
            "data",
            "too few images",
            f"{images} in all: a run learns them by heart, and its k-NN does not rise with it",
            "more images, a pre-trained start (--init_from), or a published backbone as it is",
        )
    ]
