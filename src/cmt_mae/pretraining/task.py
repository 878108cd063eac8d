"""Pre-training as the loop takes it (engine/fit.py): the paper's step is ``Pretraining.loss``."""

from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cmt_mae.backbones import Backbone
from cmt_mae.core.runs import RunDir
from cmt_mae.data.loader import Batch, CropSettings, pretrain_batches
from cmt_mae.data.source import Source
from cmt_mae.engine.optim import adamw, learning_rate
from cmt_mae.engine.processes import say
from cmt_mae.engine.task import Evaluation, Task, falls_due
from cmt_mae.method.cmtmae import Alphas, StudentWithDecoder
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import noise_length
from cmt_mae.method.teacher import TeacherOutput
from cmt_mae.pretraining.assembly import trainable, worker_count
from cmt_mae.pretraining.plan import Plan, alphas_at
from cmt_mae.pretraining.settings import IMAGENET, PretrainConfig, Statistics

if TYPE_CHECKING:
    from cmt_mae.pretraining.teacher_store import TeacherStore

EXTENSION_WARMUP = 0.1
"""Largest share of an extension that its warm-up takes."""


@dataclass
class Images:
    """The images of a run."""

    source: Source
    crops: CropSettings


@dataclass
class Hooks:
    """What other rooms do while a run goes on."""

    draw: "Callable[[Pretraining, VisionTransformer, int, RunDir], None] | None" = None
    """(task, student in one piece, step, run): draws what guides the mask."""
    probe: Callable[[Backbone], float] | None = None
    """Accuracy of the student so far, in percent."""


class Pretraining(Task):
    """CMT-MAE in two stages; pixel MAE and the published relatives are settings of it."""

    headline, prefix, long_evaluation = "knn_top1", "", False

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        plan: Plan,
        learner: StudentWithDecoder,
        frozen: FrozenNetworks,
        *,
        images: Images | None = None,
        stats: Statistics = IMAGENET,
        teacher: Backbone | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        """images: None where batches come from elsewhere (bench, doctor). teacher: what the frozen one is."""
        self.config, self.accelerator, self.plan = config, accelerator, plan
        self.device = accelerator.device
        self.learner, self.frozen_networks = learner.to(self.device), frozen.to(self.device)
        optim = config.optim
        betas = (optim.betas[0], optim.betas[1])
        self.model, self.optimizer = (
            self.learner,
            adamw(self.learner, plan.lr, betas, optim.weight_decay),
        )
        self.seed, self.batch_size, self.clip = config.seed, config.batch_size, optim.clip
        self.micro_batch, self.accumulation = plan.micro_batch, plan.accumulation
        self.steps_per_epoch, self.total_steps = plan.steps_per_epoch, plan.total_steps
        self.switch_step = plan.switch_step
        self.images, self.stats, self.teacher = images, stats, teacher
        self.hooks = hooks or Hooks()
        self.sharded = config.runtime.parallel == "fsdp" and accelerator.num_processes > 1
        self.store: TeacherStore | None = None
        self.broken: dict[int, tuple[str, str]] = {}
        """Images of this process that cannot be read: index -> (name, reason)."""
        self.collapse: set[str] = set()
        """Names of the numbers that have shown collapse at the last line of metrics."""

    # --- a step ---

    def loss(self, model: nn.Module, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The frozen networks make mask (Eq. 3) and targets, the student is compared with them (Eqs. 1, 2, 4)."""
        for index, name, reason in batch["bad"]:
            self.broken.setdefault(index, (name, reason))
        images, teacher_images = self.to_device(batch)
        noise = batch["noise"].to(self.device, non_blocking=True)
        alphas, rules = self.alphas_at(step), self.config.mask
        mixed = rules.mix_random_end - rules.mix_random_start
        with self.in_one_piece(self.frozen_networks.running()):
            mask, targets, numbers = self.frozen_networks(
                images,
                noise,
                self.plan.n_mask,
                alphas,
                teacher_images=teacher_images,
                teacher_output=self.stored_output(batch, images, teacher_images),
                random_mask=step < rules.random_until_epoch * self.steps_per_epoch,
                guided_share=rules.mix_random_start
                + mixed * min(1.0, step / self.plan.first_end()),
            )
        loss, more = model(
            images,
            mask,
            targets,
            alphas.loss,
            constants=self.frozen_networks.means.means,
            compare=step % self.config.runtime.log_every == 0,
        )
        seen = {"image_mean": images.mean()}
        if teacher_images is not None:
            seen["teacher_image_mean"] = teacher_images.mean()
        return loss, {**seen, **numbers, **more}

    def after_step(self, step: int, skipped: Tensor) -> None:
        """The momentum student follows the student (stage two); the targets' running means go on."""
        self.frozen_networks.means.step(partial(self.accelerator.reduce, reduction="mean"))
        if self.frozen_networks.momentum is not None:
            self.frozen_networks.update_momentum(
                self.learner.student, self.plan.momentum_at(self.config.momentum, step), skipped
            )

    def enter(self, step: int) -> None:
        """Stage two begins with the momentum student as a copy of the student, and with its head."""
        in_two = step >= self.switch_step
        if in_two and self.frozen_networks.momentum is None:
            self.frozen_networks.start_momentum(self.whole_student())
            if self.config.momentum.zero_head and "momentum" in self.learner.heads:
                for parameter in self.learner.heads["momentum"].parameters():
                    nn.init.zeros_(parameter)
        active = set(self.learner.heads)
        if self.config.target.source == "collab":
            alpha = self.config.alpha_of("loss") if in_two else 0.0
            active = {name for name, on in (("teacher", alpha < 1), ("momentum", alpha > 0)) if on}
        # FSDP leaves a head that is not used without a gradient; DDP has to know it beforehand
        if not self.sharded:
            self.learner.activate(active)

    def lr_at(self, step: int) -> float:
        """Warm-up and cosine; an extension has its own."""
        optim, epoch = self.config.optim, step / self.steps_per_epoch
        start, end = self.config.phase(epoch)
        warmup = (
            min(optim.warmup_epochs, EXTENSION_WARMUP * (end - start))
            if start
            else optim.warmup_epochs
        )
        return learning_rate(epoch - start, self.plan.lr, warmup, end - start, optim.min_lr)

    def alphas_at(self, step: int) -> Alphas:
        """alpha of Eqs. 3 and 4 at this step."""
        return alphas_at(self.config, self.plan, step)

    # --- images ---

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """Crops of the run's images, with the mask's noise."""
        assert self.images is not None
        processes = self.accelerator.num_processes
        yield from pretrain_batches(
            self.images.source,
            self.images.crops,
            noise_length=noise_length(self.config.mask.rule, self.plan.n_patches),
            seed=self.seed,
            batch_size=self.batch_size,
            micro_batch=self.micro_batch,
            rank=self.accelerator.process_index,
            world=processes,
            workers=worker_count(self.config.data.workers, processes),
            start_step=start,
            pin_memory=self.device.type == "cuda",
            timeout_s=self.config.data.timeout_s,
            photo_wanted=None if self.store is None else self.store.wanted(),
        )

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
        return (planes / 255 - self.frozen_networks.mean) / self.frozen_networks.std

    def stored_output(
        self, batch: Batch, images: Tensor, teacher_images: Tensor | None
    ) -> Callable[[], TeacherOutput] | None:
        """A replacement of the teacher's forward pass on these crops where its outputs are kept."""
        photo = self.config.teacher.view == "photo"
        # a crop that replaces a broken image's is not the one that would be kept under its number
        if self.store is None or (batch["bad"] and not photo):
            return None
        if photo:
            return partial(self._at_boxes, batch)
        seen = images if teacher_images is None else teacher_images
        return partial(self.store.outputs, batch["index"], seen, torch.arange(len(seen)))

    def _at_boxes(self, batch: Batch) -> TeacherOutput:
        """Outputs of whole photos at the crops' boxes; missing ones are computed from the batch's photos."""
        assert self.store is not None
        photos = batch["photos"]
        if photos is not None:
            photos = self.normalise(photos.to(self.device, non_blocking=True))
        boxes = batch["box"].to(self.device, non_blocking=True)
        flip = batch["flip"].to(self.device, non_blocking=True) if self.config.data.flip else None
        grid = self.frozen_networks.grid
        return self.store.at_boxes(batch["index"], photos, batch["photo_rows"], boxes, flip, grid)

    # --- networks ---

    def networks(self) -> dict[str, nn.Module | None]:
        """Of a checkpoint."""
        return {"learner": self.learner, "momentum": self.frozen_networks.momentum}

    def load_state(self, state: dict[str, Any]) -> None:
        """Networks, running means of the targets and broken images of a checkpoint."""
        self.learner.load_state_dict(state["learner"])
        frozen = self.frozen_networks
        if state["momentum"] is not None:
            frozen.start_momentum(self.learner.student)
            assert frozen.momentum is not None
            frozen.momentum.load_state_dict(state["momentum"])
            frozen.round_momentum()
        if "target_means" in state:  # not in runs of version 0.1
            frozen.means.load_state_dict(state["target_means"], self.device)
        self.broken = {int(i): (entry[0], entry[1]) for i, entry in state["bad"].items()}

    def extra_state(self) -> dict[str, Any]:
        """The running means of the targets, the broken images met."""
        from cmt_mae.pretraining.between_steps import of_all

        bad = {i: list(entry) for i, entry in of_all(self.broken, self.accelerator).items()}
        return {"target_means": self.frozen_networks.means.state_dict(), "bad": bad}

    def frozen(self) -> dict[str, nn.Module]:
        """The teacher, and the momentum student's copy in low precision."""
        parts = {
            "teacher": self.frozen_networks.teacher,
            "momentum_low": self.frozen_networks.momentum_low,
        }
        return {name: network for name, network in parts.items() if network is not None}

    def blocks(self) -> Iterable[nn.Module]:
        """The decoder's last block is run in parts (last_block.py): it is gathered with the rest."""
        return [*self.learner.student.blocks, *self.learner.decoder.blocks[:-1]]

    def followers(self) -> list[nn.Module]:
        """The momentum student, and its copy in low precision."""
        both = (self.frozen_networks.momentum, self.frozen_networks.momentum_low)
        return [network for network in both if network is not None]

    def in_one_piece(self, network: nn.Module | None) -> AbstractContextManager[None]:
        """Inside, a sharded network's parameters are whole, on every process; others are left alone."""
        if not self.sharded:
            return nullcontext()
        from cmt_mae.engine.sharding import whole

        return whole(network)

    def whole_student(self) -> VisionTransformer:
        """The student in one piece: itself, or a copy where it is sharded (then called by all processes)."""
        return self.whole(self.learner.student, self.learner)

    def whole(self, network: VisionTransformer, root: nn.Module) -> VisionTransformer:
        """root: what FSDP has cut if it has, the network itself or what holds it."""
        if not self.sharded:
            return network
        from cmt_mae.engine.sharding import gathered, is_sharded
        from cmt_mae.method.vit import build_student

        if not is_sharded(root):
            return network
        copy = build_student(self.config.student).to(self.device)
        copy.load_state_dict(gathered(network.state_dict()))
        return copy.train(network.training)

    # --- a run ---

    def begin(self, run: RunDir) -> None:
        """Say what is about to run, once; open the teacher's kept outputs."""
        config, plan = self.config, self.plan
        assert self.images is not None
        say(
            self.accelerator,
            f"{len(self.images.source)} images, {plan.total_steps} steps of {config.batch_size} "
            f"(stage one: {plan.switch_step}), lr {config.optim.blr:g} x {config.batch_size}/256 = {plan.lr:g}, "
            f"{plan.n_mask} of {plan.n_patches} patches hidden, "
            f"{trainable(self.learner) / 1e6:.1f} M trainable parameters, {self.device}, "
            f"{'bf16' if self.accelerator.mixed_precision == 'bf16' else 'fp32'}, "
            f"{self.accelerator.num_processes} process(es), seed {config.seed}",
        )
        if self.teacher is not None:
            licence = self.teacher.licence or "not stated"
            say(
                self.accelerator,
                f"teacher: {self.teacher.source}; licence of its weights: {licence}",
            )
        kept = config.teacher.cache or config.teacher.view == "photo"
        if kept and self.teacher is not None:
            from cmt_mae.pretraining.between_steps import open_store

            self.store = open_store(self, run)

    def evaluates(self, step: int) -> bool:
        """Where the student is measured or pictured."""
        return self._probes(step) or self._draws(step)

    def _probes(self, step: int) -> bool:
        if self.hooks.probe is None:
            return False
        every = self.config.runtime.probe_every
        at_end = every > 0 and step == self.total_steps
        # the untrained student too: what training adds is known against it
        return step == 0 or at_end or falls_due(every, step, self.steps_per_epoch)

    def _draws(self, step: int) -> bool:
        due = falls_due(self.config.runtime.picture_every, step, self.steps_per_epoch)
        return step > 0 and (due or step in (self.switch_step, self.total_steps))

    def evaluate(self, step: int, run: RunDir) -> Evaluation:
        """k-NN accuracy of the student so far, and a picture of what guides the mask."""
        from cmt_mae.pretraining.between_steps import evaluate

        return evaluate(self, step, run, probes=self._probes(step), draws=self._draws(step))

    def entries(self, means: dict[str, float], step: int) -> dict[str, Any]:
        """Stage of the last step, how many signs of collapse there are, half-lives of the average so far."""
        from cmt_mae.engine.collapse import signs

        facts = {"collapse_signs": len(signs(means))}
        if step <= self.switch_step:
            return {"stage": 1, **facts}
        done = self.plan.half_lives(self.config.momentum, step)
        return {"stage": 2, **facts, "half_lives": round(done, 3)}

    def check(self, row: dict[str, Any], run: RunDir) -> None:
        """Warn of collapse; name broken images, and stop where there are too many."""
        from cmt_mae.pretraining.between_steps import check

        check(self, row, run)

    def keeps(self, step: int) -> bool:
        """Every so many epochs, and at the switch of stages, if so set."""
        runtime = self.config.runtime
        at_switch = runtime.keep_switch and step == self.switch_step
        return at_switch or falls_due(runtime.keep_every, step, self.steps_per_epoch)

    def publish(self, step: int, run: RunDir) -> None:
        """backbone.safetensors, and that of the momentum student."""
        from cmt_mae.pretraining.between_steps import publish

        publish(self, step, run)

    def facts(self, step: int) -> dict[str, Any]:
        """What run.json and the header of the backbone say."""
        assert self.images is not None
        source, teacher = self.images.source, self.teacher
        data = {
            "path": self.config.data.path,
            "images": len(source),
            "fingerprint": source.fingerprint(),
            "range": source.limits and list(source.limits),
            "held_out": self.config.data.val_share,
            "left_out": dict(source.left_out),
        }
        about = None
        if teacher is not None:
            about = {
                "name": self.config.teacher.name,
                "source": teacher.source,
                "licence": teacher.licence,
                "digest": teacher.digest,
                "facts": teacher.facts,
                "known_from": teacher.known_from,
            }
        own = {"step": step, "epochs": self.config.epochs, "seed": self.config.seed}
        return {**own, "data": data, "teacher": about}
