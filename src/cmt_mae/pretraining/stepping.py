"""One optimizer step of CMT-MAE and everything that changes with it; the loop around it is in pretraining.py."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from cmt_mae.core.errors import InputError
from cmt_mae.data.loader import Batch
from cmt_mae.engine import compiling, sharding
from cmt_mae.engine.meters import Meters
from cmt_mae.engine.optim import adamw, skip_unless
from cmt_mae.engine.schedules import learning_rate, momentum
from cmt_mae.engine.sharding import whole_tensor
from cmt_mae.method.cmtmae import Alphas, FrozenNetworks, StudentWithDecoder
from cmt_mae.method.masking import count_masked
from cmt_mae.method.photo_view import at_crops
from cmt_mae.method.teacher import TeacherOutput
from cmt_mae.method.vit import build_student
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.teacher_store import TeacherStore


@dataclass
class Plan:
    """What the settings and the number of images make of each other."""

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


def make_plan(config: PretrainConfig, n_images: int, processes: int) -> Plan:
    """Steps, switch of stages, hidden count, learning rate. Raises InputError where they do not work out."""
    if n_images < config.batch_size:
        raise InputError(
            f"{config.data.path} has {n_images} images, fewer than --batch-size {config.batch_size}: "
            f"lower it to {n_images} or less, or take a recipe of a smaller scale, such as --recipe "
            "cmt_all,micro64"
        )
    per_process, rest = divmod(config.batch_size, processes)
    micro = config.runtime.micro_batch or per_process
    if rest or per_process % micro:
        raise InputError(
            f"--batch-size {config.batch_size} cannot be split into {processes} process(es) with micro-batches "
            f"of {micro}: make it a multiple of {processes * micro}"
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
        accumulation=per_process // micro,
    )


def weights_at(config: PretrainConfig, plan: Plan, step: int) -> Alphas:
    """alpha of Eqs. 3 and 4: 0 in stage one, then constant or (by choice) growing."""
    done = step - plan.switch_step
    if done < 0:
        return Alphas(0.0, 0.0)
    ramp = config.alpha_ramp_epochs * plan.steps_per_epoch
    share = min(1.0, (done + 1) / ramp) if ramp else 1.0
    return Alphas(share * config.alpha_of("mask"), share * config.alpha_of("loss"))


class Stepper:
    """StudentWithDecoder, guides, optimizer and meters of one process."""

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        plan: Plan,
        learner: StudentWithDecoder,
        guides: FrozenNetworks,
    ) -> None:
        self.config, self.accelerator, self.plan = config, accelerator, plan
        self.device = accelerator.device
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        self.learner, self.guides = learner.to(self.device), guides.to(self.device)
        self.optimizer = self.make_optimizer()
        self.meters = Meters(self.device, accelerator)
        self.nonfinite_row = torch.zeros((), device=self.device)
        self.bad_gradient = torch.full((), -1, device=self.device)
        """Number, among ``learning``, of the parameter with the first bad gradient; -1: none."""
        self.learning: list[str] = []  # names of the parameters that the last step gave a gradient
        self.sharded = config.runtime.parallel == "fsdp" and accelerator.num_processes > 1
        self.mesh: DeviceMesh | None = (
            None  # made at the first stage; from then on the networks are cut
        )
        self.model: nn.Module = self.learner
        self.store: TeacherStore | None = None
        self.waited = 0.0  # seconds spent waiting for images since somebody set it to 0
        self.no_compiler = compiling.why_not(self.device) if config.runtime.compile else ""
        """Why the blocks are not compiled although they should be."""

    def enter_stage(self, step: int) -> None:
        """At the start, on resume and at the switch: momentum student, heads that learn, wrapped model."""
        in_two = step >= self.plan.switch_step
        if in_two and self.guides.momentum is None:
            self.guides.start_momentum(self.whole_student())
        active = set(self.learner.heads)
        if self.config.target.source == "collab":
            alpha = self.config.alpha_of("loss") if in_two else 0.0
            active = {name for name, on in (("teacher", alpha < 1), ("momentum", alpha > 0)) if on}
        if not self.sharded:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            # what DDP reduces is fixed when it wraps, so it wraps again
            self.learner.activate(active)
        self.learner.train()
        if self.config.runtime.compile and not self.no_compiler:
            teacher, momentum = self.guides.teacher, self.guides.momentum
            frozen = (teacher and teacher.model, momentum and self.guides.momentum_runs())
            compiling.compile_blocks([self.learner.student, self.learner.decoder, *frozen])
        if self.sharded:  # a head that is not used gets no gradient and needs no wrapping again
            self.shard()
        else:
            self.model = self.accelerator.prepare_model(self.learner)

    def shard(self) -> None:
        """Cut learner, optimizer state and momentum student into one piece a process, what is not cut yet."""
        if self.mesh is None:
            self.mesh = sharding.make_mesh(self.device, self.accelerator.num_processes)
            state = self.optimizer.state_dict()
            # the decoder's last block is run in parts (last_block.py): it is gathered with the rest
            blocks = [*self.learner.student.blocks, *self.learner.decoder.blocks[:-1]]
            sharding.shard(self.learner, blocks, self.mesh)
            self.optimizer = self.make_optimizer()
            sharding.load_optimizer(self.optimizer, state)
        for network in (self.guides.momentum, self.guides.momentum_low):
            if network is not None and not sharding.is_sharded(network):
                sharding.shard(network, (), self.mesh)  # the guides call its blocks' insides

    def make_optimizer(self) -> torch.optim.AdamW:
        """AdamW over the learner's parameters as they are now."""
        optim = self.config.optim
        return adamw(
            self.learner, self.plan.lr, (optim.betas[0], optim.betas[1]), optim.weight_decay
        )

    def step(self, batches: Iterator[Batch], step: int) -> list[tuple[int, str, str]]:
        """One optimizer step over all micro-batches, then the moving average; the broken images met."""
        bad: list[tuple[int, str, str]] = []
        epoch = step / self.plan.steps_per_epoch
        # only drop path draws from torch's generator: tied to the step, it needs no place in checkpoints
        torch.manual_seed(self.config.seed + 1_000_003 * step + self.accelerator.process_index)
        optim = self.config.optim
        lr = learning_rate(
            epoch, self.plan.lr, optim.warmup_epochs, self.config.epochs, optim.min_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number in range(self.plan.accumulation):
            begin = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begin
            bad += batch["bad"]
            last = number == self.plan.accumulation - 1
            with sharding.whole(self.guides.running()), self.synchronised(last):
                loss = self.loss(batch, step)
                self.accelerator.backward(loss / self.plan.accumulation)
            finite = finite & torch.isfinite(loss.detach())
        norm = self.clip_gradients(optim.clip or math.inf)
        self.meters.add({"gradient_norm": norm}, step + 1)
        skipped = self._skip_unless(finite & torch.isfinite(norm), step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.guides.momentum is not None:
            self.guides.update_momentum(self.learner.student, self.momentum_at(step), skipped)
        return bad

    @contextlib.contextmanager
    def synchronised(self, now: bool) -> Iterator[None]:
        """Gradients are averaged over the processes in the last backward pass of a step alone."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(now)
            yield
        else:
            with contextlib.nullcontext() if now else self.accelerator.no_sync(self.model):
                yield

    @torch.no_grad()
    def clip_gradients(self, largest: float) -> Tensor:
        """Clip to the norm over all parameters, which is returned; notes the first bad gradient."""
        named = [(n, p) for n, p in self.learner.named_parameters() if p.grad is not None]
        learning, self.learning = [p for _, p in named], [n for n, _ in named]
        gradients = [p.grad for p in learning if p.grad is not None]
        norms = whole_tensor(torch.stack(torch._foreach_norm(gradients)))
        norm = torch.linalg.vector_norm(norms)
        # gradients are made from the last parameter to the first, and a bad one spoils those after it
        places = torch.arange(len(learning), device=self.device)
        place = torch.where(torch.isfinite(norms), -1, places).amax()
        self.bad_gradient = torch.where(self.bad_gradient < 0, place, self.bad_gradient)
        if math.isfinite(largest):  # else every gradient would be multiplied by one
            nn.utils.clip_grads_with_norm_(learning, largest, norm)
        return norm

    def bad_gradient_name(self) -> str:
        """Parameter of the first bad gradient since the last call, or ""; waits for the device."""
        place = int(self.bad_gradient.item())
        self.bad_gradient.fill_(-1)
        return self.learning[place] if place >= 0 else ""

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Mask and targets from the guides, loss from the learner; numbers into the meters."""
        images, teacher_images = self.to_device(batch)
        shown = {"image_mean": images.mean()}
        if teacher_images is not None:
            shown["teacher_image_mean"] = teacher_images.mean()
        weights, mask_config = self.weights_at(step), self.config.mask
        share = step / self.plan.total_steps
        seen = images if teacher_images is None else teacher_images
        # a crop that replaces a broken image's is not the one that would be kept under its number
        stored = self.store is not None and (
            self.config.teacher.view == "photo" or not batch["bad"]
        )
        with self.accelerator.autocast():
            mask, targets, logs = self.guides(
                images,
                batch["noise"].to(self.device, non_blocking=True),
                self.plan.n_mask,
                weights,
                teacher_images=teacher_images,
                teacher_output=partial(self.stored_outputs, batch, seen) if stored else None,
                random_mask=step < mask_config.random_until_epoch * self.plan.steps_per_epoch,
                guided_share=mask_config.mix_random_start
                + (mask_config.mix_random_end - mask_config.mix_random_start) * share,
            )
            loss, more = self.model(images, mask, targets, weights.loss)
        self.meters.add({**shown, **logs, **more}, step + 1, 1 / self.plan.accumulation)
        return loss

    def stored_outputs(self, batch: Batch, seen: Tensor) -> TeacherOutput:
        """The teacher's outputs for a batch, on the student's grid, out of the store; what is missing there is
        computed from the photos that came along, or from the crops ``seen`` by the teacher."""
        store, teacher = self.store, self.guides.teacher
        assert store is not None
        assert teacher is not None
        if self.config.teacher.view != "photo":
            return store.outputs(batch["index"], seen, torch.arange(len(seen)))
        photos = batch["photos"]
        if photos is not None:
            photos = self.normalise(photos.to(self.device, non_blocking=True))
        found = store.outputs(batch["index"], photos, batch["photo_rows"])
        boxes = batch["box"].to(self.device, non_blocking=True)
        flip = batch["flip"].to(self.device, non_blocking=True) if self.config.data.flip else None
        return at_crops(found, teacher.grid, self.guides.grid, boxes, flip)

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """uint8 to the device; flipped and normalised (for the student) there."""
        flip = batch["flip"].to(self.device, non_blocking=True)[:, None, None, None]

        def prepare(part: Tensor) -> Tensor:
            images = part.to(self.device, non_blocking=True)
            if self.config.data.flip:
                images = torch.where(flip, images.flip(-1), images)
            return self.normalise(images)

        second = batch["second"]
        return prepare(batch["images"]), None if second is None else prepare(second)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> fp32 with the student's mean and std."""
        # The loader's batches are channels last in memory, the networks want planes.
        planes = images.to(torch.float32, memory_format=torch.contiguous_format)
        return (planes / 255 - self.guides.mean) / self.guides.std

    def weights_at(self, step: int) -> Alphas:
        """As the function of this name."""
        return weights_at(self.config, self.plan, step)

    def momentum_at(self, step: int) -> float:
        """m of the moving average at this step of stage two."""
        share = (step - self.plan.switch_step) / max(
            1, self.plan.total_steps - self.plan.switch_step
        )
        settings = self.config.momentum
        return momentum(share, settings.start, settings.end, settings.schedule)

    def whole_student(self) -> VisionTransformer:
        """The student in one piece: itself, or a copy where it is sharded (then called by all processes)."""
        if self.mesh is None:
            return self.learner.student
        return self._whole_copy(self.learner.student)

    def whole_momentum(self) -> VisionTransformer | None:
        """The momentum student in one piece, as ``whole_student``."""
        if self.mesh is None or self.guides.momentum is None:
            return self.guides.momentum
        return self._whole_copy(self.guides.momentum)

    def _whole_copy(self, network: VisionTransformer) -> VisionTransformer:
        copy = build_student(self.config.student).to(self.device)
        copy.load_state_dict(sharding.gathered(network.state_dict()))
        return copy.train(network.training)

    def _skip_unless(self, finite: Tensor, step: int) -> Tensor:
        """Count a step that is not finite; see ``skip_unless``."""
        skipped = skip_unless(self.optimizer, finite, self.accelerator)
        self.nonfinite_row = (self.nonfinite_row + 1) * skipped
        self.meters.add({"skipped_steps": skipped}, step + 1)
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs, as whole tensors and plain values. Called by all processes."""
        momentum_student = self.guides.momentum
        networks = {
            "learner": self.learner.state_dict(),
            "momentum": None if momentum_student is None else momentum_student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        return {
            **(networks if self.mesh is None else sharding.gathered(networks)),
            "meters": self.meters.state_dict(),
            "nonfinite_row": float(self.nonfinite_row),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, before the first ``enter_stage``."""
        self.learner.load_state_dict(state["learner"])
        if state["momentum"] is not None:
            self.guides.start_momentum(self.learner.student)
            assert self.guides.momentum is not None
            self.guides.momentum.load_state_dict(state["momentum"])
            self.guides.round_momentum()
        self.optimizer.load_state_dict(state["optimizer"])
        self.meters.load_state_dict(state["meters"])
        self.nonfinite_row = torch.tensor(state["nonfinite_row"], device=self.device)
