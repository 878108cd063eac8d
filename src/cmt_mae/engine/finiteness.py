"""Which part of a step was the first that was not finite, in words."""

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from cmt_mae.engine.meters import Bad
from cmt_mae.engine.sharding import local
from cmt_mae.engine.trainer import Trainer


def of_target(name: str) -> tuple[str, ...]:
    """Numbers that are read from a target."""
    return (f"spread_target_{name}", f"rank_target_{name}", f"image_share_{name}")


PREDICTED = ("teacher", "momentum", "pixel", "hog")
# Numbers of a step by the part they are read from, in the order in which a step computes the parts.
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("image", ("image_mean", "teacher_image_mean")),
    ("teacher", ("class_mass_teacher", "entropy_teacher", *of_target("teacher"))),
    ("momentum student", ("class_mass_momentum", "entropy_momentum", *of_target("momentum"))),
    ("target", (*of_target("pixel"), *of_target("hog"))),
    ("student", ("spread_student",)),
    ("decoder", ("spread_decoder",)),
    ("head", tuple(f"spread_prediction_{name}" for name in PREDICTED)),
    ("loss", (*(f"loss_{name}" for name in PREDICTED), "loss")),  # of other tasks too: "loss"
    ("gradient", ("gradient_norm",)),
)


def first_part(bad: dict[str, Bad]) -> tuple[int, str, str]:
    """(step, part, its number) of the earliest number that was not finite.

    A part spoils every later part of the same step, so the first one is the culprit.
    """
    step = min(entry.first for entry in bad.values())
    there = [name for name, entry in bad.items() if entry.first == step]
    for part, names in PARTS:
        for name in names:
            if name in there:
                return step, part, name
    return step, "step", there[0]


def name_culprit(trainer: Trainer, bad: dict[str, Bad]) -> str:
    """The first part of the first such step that was not finite, with the parameter where there is one.

    Called by all processes.
    """
    step, part, number = first_part(bad)
    gradient = trainer.bad_gradient_name()
    networks = trainer.task.networks() | trainer.task.frozen()
    weights = bad_weights_of_all(networks, trainer.accelerator)
    of = f" of {gradient}" if part == "gradient" and gradient else ""
    held = f", weight {weights[0]} ({len(weights)} in all)" if weights else ""
    return f"{part}{of} at step {step} ({number}{held})"


def bad_weights_of_all(
    networks: Mapping[str, nn.Module | None], accelerator: Accelerator
) -> list[str]:
    """``bad_weights`` of any process, each name once. Called by all processes."""
    names = bad_weights(networks)
    if accelerator.num_processes > 1:
        names = gather_object(names)
    return list(dict.fromkeys(names))


def bad_weights(networks: Mapping[str, nn.Module | None]) -> list[str]:
    """Names of parameters and buffers that hold nan or inf, in order; waits for the device once."""
    names: list[str] = []
    flags: list[Tensor] = []
    for prefix, network in networks.items():
        for name, tensor in [] if network is None else network.state_dict().items():
            if tensor.is_floating_point():
                names.append(f"{prefix}.{name}")
                flags.append(torch.isfinite(local(tensor)).all())
    if not flags:
        return []
    whole = torch.stack(flags).tolist()
    return [name for name, fine in zip(names, whole, strict=True) if not fine]
