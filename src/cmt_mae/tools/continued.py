"""``pretrain`` in a folder that holds a run: it goes on, or a finished one is extended."""

from pathlib import Path

from cmt_mae.core.checkpoint import list_checkpoints, step_of
from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import read_config, read_run
from cmt_mae.core.runs import RunDir
from cmt_mae.data.source import Source
from cmt_mae.pretraining.settings import PretrainConfig


def extend(config: PretrainConfig) -> bool:
    """Put into ``config.extended`` how the run in ``config.out`` was extended; whether it is extended now.

    Raises InputError where a finished run is given more epochs without --extend, or cannot be extended.
    """
    out = Path(config.out)
    before = read_config(out)
    epochs = float(before.get("epochs", config.epochs))
    steps = list_checkpoints(out / "checkpoints")
    known = list(before.get("extended") or [])
    if config.epochs <= epochs or not steps:
        config.extended = known if config.epochs == epochs else config.extended
        return False
    total = read_run(str(out)).facts.get("plan", {}).get("total_steps")
    finished = step_of(steps[-1]) == total
    if not config.runtime.extend:
        if finished:
            raise InputError(
                f"{out} has finished its {epochs:g} epochs: --extend trains it on to {config.epochs:g}, with a "
                f"warm-up and a cosine of its own; --init_from {out} and another --out start a new run from it"
            )
        return False
    if not finished:
        raise InputError(
            f"{out} is at step {step_of(steps[-1])} of {total}: let its {epochs:g} epochs end, then extend it"
        )
    config.extended = [*known, epochs]
    return True


def keep_range(source: Source, run: RunDir) -> None:
    """A run that is continued reads images of more than 8 bits as it did; older ones by all of 16 bits."""
    if list_checkpoints(run.checkpoints) and (known := run.known_facts().get("data")):
        before = known.get("range")
        source.limits = (float(before[0]), float(before[1])) if before else None
