"""Steps, switch of stages and alphas that follow from the settings of a run and the number of its images."""

from dataclasses import dataclass, field

from cmt_mae.core.errors import InputError
from cmt_mae.engine.optim import half_lives, momentum
from cmt_mae.engine.task import micro_batches
from cmt_mae.method.cmtmae import Alphas
from cmt_mae.method.masking import count_masked
from cmt_mae.pretraining.settings import MomentumConfig, PretrainConfig


@dataclass
class Plan:
    """The steps of a run; in its run.json."""

    steps_per_epoch: int
    total_steps: int
    switch_step: int
    """The first step of stage two; total_steps where there is none."""
    n_patches: int
    n_mask: int
    lr: float
    """Peak learning rate."""
    micro_batch: int
    """Images a process takes at a time."""
    accumulation: int
    """Micro-batches of an optimizer step."""
    extensions: list[int] = field(default_factory=list)
    """Steps at which a finished run was trained on."""

    def first_end(self) -> int:
        """Steps of the run before any extension."""
        return self.extensions[0] if self.extensions else self.total_steps

    def momentum_at(self, settings: MomentumConfig, step: int) -> float:
        """m of the moving average at this step of stage two; an extension begins with ``start`` again."""
        borders = [self.switch_step, *self.extensions, self.total_steps]
        number = sum(border <= step for border in self.extensions)
        begin, end = borders[number : number + 2]
        steps = max(1, end - begin)
        if settings.half_lives:
            return float(0.5 ** (settings.half_lives / steps))
        share = (step - begin) / steps
        return momentum(share, settings.start, settings.end, settings.schedule)

    def half_lives(self, settings: MomentumConfig, step: int) -> float:
        """Of the moving average, in the steps of stage two before ``step``: of 1000 of them if more."""
        done = max(0, step - self.switch_step)
        count = min(done, 1000)
        steps = [self.switch_step + int((i + 0.5) * done / count) for i in range(count)]
        ms = [self.momentum_at(settings, one) for one in steps]
        return half_lives(ms) * done / max(1, count)


def make_plan(config: PretrainConfig, n_images: int, processes: int) -> Plan:
    """Steps, switch of stages, hidden count, learning rate. Raises InputError where they do not work out."""
    if n_images < config.batch_size:
        raise InputError(
            f"{config.data.path} has {n_images} images, fewer than --batch-size {config.batch_size}: "
            f"lower it to {n_images} or less, or take a recipe of a smaller scale, such as --recipe "
            "cmt_all,micro64"
        )
    micro, accumulation = micro_batches(config.batch_size, config.runtime.micro_batch, processes)
    if config.mask.other_image and micro % 2:
        raise InputError(
            f"mask.other_image exchanges the maps of neighbours, and a process takes {micro} images at a time: "
            "give an even --batch-size and --runtime.micro_batch"
        )
    rows, columns = config.student.grid()
    steps_per_epoch = n_images // config.batch_size
    total = max(1, round(config.epochs * steps_per_epoch))
    switch = (
        min(total, round(config.stage_one() * steps_per_epoch))
        if config.needs_momentum()
        else total
    )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        switch_step=switch,
        n_patches=rows * columns,
        n_mask=count_masked(rows * columns, config.mask.ratio),
        lr=config.optim.blr * config.batch_size / 256,
        micro_batch=micro,
        accumulation=accumulation,
        extensions=[round(epochs * steps_per_epoch) for epochs in config.extended],
    )


def alphas_at(config: PretrainConfig, plan: Plan, step: int) -> Alphas:
    """alpha of Eqs. 3 and 4: 0 in stage one, then constant or (by choice) growing."""
    done = step - plan.switch_step
    if done < 0:
        return Alphas(0.0, 0.0)
    ramp = config.alpha_ramp_epochs * plan.steps_per_epoch
    share = min(1.0, (done + 1) / ramp) if ramp else 1.0
    return Alphas(share * config.alpha_of("mask"), share * config.alpha_of("loss"))
