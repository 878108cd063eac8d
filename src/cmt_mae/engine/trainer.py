"""One optimizer step of any task on this process, and what makes it: DDP or FSDP, compiling, accumulation.

The loop around it is fit.py; ``bench`` and ``doctor`` time these steps without one.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmt_mae.engine.meters import Meters
from cmt_mae.engine.optim import skip_unless
from cmt_mae.engine.task import Task


class Trainer:
    """Takes the steps of a task. Nothing in a step waits for the device."""

    def __init__(
        self, task: Task, accelerator: Accelerator, *, parallel: str = "ddp", compiled: bool = False
    ) -> None:
        """parallel: ddp | fsdp. compiled: compile the blocks, where this machine can."""
        self.task, self.accelerator, self.device = task, accelerator, accelerator.device
        self.precision = "bf16" if accelerator.mixed_precision == "bf16" else "fp32"
        self.model: nn.Module = task.model
        self.meters = Meters(self.device, accelerator)
        self.nonfinite_row = torch.zeros((), device=self.device)
        """Steps in a row, up to now, that were not finite."""
        self.waited = 0.0  # seconds spent waiting for images since it was last set to 0
        self.no_compiler = ""
        """Why the blocks are not compiled although they should be."""
        if compiled:
            from cmt_mae.engine.compiling import why_not

            self.no_compiler = why_not(self.device)
        self._compiled = compiled and not self.no_compiler
        self._sharded = parallel == "fsdp" and accelerator.num_processes > 1
        self._mesh: Any = None  # of processes; made at the first ``enter``, then networks are cut
        self._bad_gradient = torch.full((), -1, device=self.device)
        """Number, among ``_learning``, of the parameter with the first bad gradient; -1: none."""
        self._learning: list[str] = []  # names of the parameters that the last step gave a gradient
        norms = (module for module in task.model.modules() if isinstance(module, _BatchNorm))
        pairs = ((norm.running_mean, norm.running_var) for norm in norms)
        self._statistics = [part for pair in pairs for part in pair if part is not None]

    def enter(self, step: int) -> None:
        """At the start, on resume and at a switch of stages: wrap, cut and compile what trains from here on."""
        if not self._sharded:
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.task.enter(step)
        self.task.model.train()
        if self._compiled:
            from cmt_mae.engine.compiling import compile_blocks

            networks = {**self.task.networks(), **self.task.frozen()}
            compile_blocks(networks.values())
        if self._sharded:
            self._shard()
        else:  # what DDP reduces is fixed when it wraps, so it wraps again
            self.model = self.accelerator.prepare_model(self.task.model)

    def _shard(self) -> None:
        """Cut model, optimizer state and followers into one piece a process, what is not cut yet."""
        from cmt_mae.engine import sharding

        task = self.task
        if self._mesh is None:
            self._mesh = sharding.make_mesh(self.device, self.accelerator.num_processes)
            names = {parameter: name for name, parameter in task.model.named_parameters()}
            sharding.shard(task.model, task.blocks(), self._mesh)
            sharding.exchange(task.optimizer, names, dict(task.model.named_parameters()))
        for network in task.followers():
            if not sharding.is_sharded(network):
                sharding.shard(network, (), self._mesh)

    def step(self, batches: Iterator[Any], step: int) -> None:
        """One optimizer step over all its micro-batches, and what the task does after it."""
        task = self.task
        # dropout, drop path and mixing draw from torch's generator: tied to the step, it needs no place in
        # checkpoints
        torch.manual_seed(task.seed + 1_000_003 * step + self.accelerator.process_index)
        rate = task.lr_at(step)
        for group in task.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        # a batch that is not finite spoils batch statistics in the forward pass already
        before = [part.clone() for part in self._statistics]
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for number in range(task.accumulation):
            begin = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - begin
            with self._synchronised(number == task.accumulation - 1):
                with self.accelerator.autocast():
                    loss, numbers = task.loss(self.model, batch, step)
                self.meters.add(numbers, step + 1, 1 / task.accumulation)
                self.accelerator.backward(loss / task.accumulation)
            finite = finite & torch.isfinite(loss.detach())
        norm = self._clip_gradients(task.clip or math.inf)
        skipped = skip_unless(task.optimizer, finite & torch.isfinite(norm), self.accelerator)
        self.nonfinite_row = (self.nonfinite_row + 1) * skipped
        self.meters.add({"gradient_norm": norm, "skipped_steps": skipped}, step + 1)
        task.optimizer.step()
        task.optimizer.zero_grad(set_to_none=True)
        for part, old in zip(self._statistics, before, strict=True):
            part.copy_(torch.where(skipped > 0, old, part))
        task.after_step(step, skipped)

    @contextlib.contextmanager
    def _synchronised(self, now: bool) -> Iterator[None]:
        """Gradients are averaged over the processes in the last backward pass of a step alone."""
        if self._sharded:
            self.model.set_requires_gradient_sync(now)  # type: ignore[operator]
            yield
        else:
            with contextlib.nullcontext() if now else self.accelerator.no_sync(self.model):
                yield

    @torch.no_grad()
    def _clip_gradients(self, largest: float) -> Tensor:
        """Clip to the norm over all parameters, which is returned; notes the first bad gradient."""
        named = [(n, p) for n, p in self.task.model.named_parameters() if p.grad is not None]
        learning, self._learning = [p for _, p in named], [n for n, _ in named]
        gradients = [p.grad for p in learning if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        if self._sharded:
            norms = norms.full_tensor()  # type: ignore[attr-defined]
        norm = torch.linalg.vector_norm(norms)
        # gradients are made from the last parameter to the first, and a bad one spoils those after it
        places = torch.arange(len(learning), device=self.device)
        place = torch.where(torch.isfinite(norms), -1, places).amax()
        self._bad_gradient = torch.where(self._bad_gradient < 0, place, self._bad_gradient)
        if math.isfinite(largest):  # else every gradient would be multiplied by one
            nn.utils.clip_grads_with_norm_(learning, largest, norm)
        return norm

    def bad_gradient_name(self) -> str:
        """Parameter of the first bad gradient since the last call, or ""; waits for the device."""
        place = int(self._bad_gradient.item())
        self._bad_gradient.fill_(-1)
        return self._learning[place] if place >= 0 else ""

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing needs, as whole tensors and plain values. Called by all processes."""
        task = self.task
        networks = {
            name: None if network is None else network.state_dict()
            for name, network in task.networks().items()
        }
        tensors = {**networks, "optimizer": task.optimizer.state_dict()}
        if self._mesh is not None:
            from cmt_mae.engine.sharding import gathered

            tensors = gathered(tensors)
        return {
            **tensors,
            "meters": self.meters.state_dict(),
            "nonfinite_row": float(self.nonfinite_row),
            **task.extra_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``, before the first ``enter``."""
        self.task.load_state(state)
        self.task.optimizer.load_state_dict(state["optimizer"])
        self.meters.load_state_dict(state["meters"])
        self.nonfinite_row = torch.tensor(state["nonfinite_row"], device=self.device)
