"""Where faults are put into a process of cmt-mae: the only file of the harness that reaches into its parts.

Everything here is called in a fork, before the command runs; the product's own functions run, wrapped.
"""

import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_mae.core import checkpoint
from cmt_mae.data import loader
from cmt_mae.engine.fit import _Fit
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method import cmtmae, frozen
from cmt_mae.method.decoder import Decoder
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools import pretrain

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.truncate", "os.rmdir")
"""Of Python's audit hooks."""
COUNTED = ("file", "byte", "step", "decode")


class Counters:
    """How often something happened in a process and its forks: shared memory."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(COUNTED))

    def add(self, kind: str, amount: int = 1) -> int:
        """The count before."""
        at = 8 * COUNTED.index(kind)
        before: int = struct.unpack_from("q", self._memory, at)[0]
        struct.pack_into("q", self._memory, at, before + amount)
        return before

    def read(self) -> dict[str, int]:
        """Kind -> count."""
        return dict(zip(COUNTED, struct.unpack(f"{len(COUNTED)}q", self._memory[:]), strict=True))


@dataclass(frozen=True)
class KillAt:
    """SIGKILL at the n-th operation on a file of the run, byte of checkpoints, micro-batch or decoded image."""

    kind: str
    at: int
    rank: int = 0


def few_pictures() -> None:
    """Else most of a tiny run is spent, and killed, drawing pictures."""
    pretrain.PICTURED = 1


def watch(counters: Counters, fault: KillAt | None, out: Path) -> None:
    """Count in this process (and its workers) what kills are placed by, and place one."""
    process, text = os.getpid(), str(out)

    def die() -> None:
        os.kill(process, signal.SIGKILL)
        time.sleep(60)  # a worker, whose parent this was

    def count(kind: str) -> None:
        before = counters.add(kind)
        if fault is not None and fault.kind == kind and before >= fault.at:
            die()

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_EVENTS and any(str(a).startswith(text) for a in args[:2]):
            count("file")

    sys.addaudithook(audit)
    write, decode, to_device = checkpoint._Hashed.write, loader.decode_image, Pretraining.to_device

    def write_some(self: Any, data: bytes) -> int:
        before = counters.add("byte", len(data))
        if fault is not None and fault.kind == "byte" and before <= fault.at < before + len(data):
            self.file.write(bytes(data)[: fault.at - before])
            self.file.flush()
            die()
        return write(self, data)

    def decode_one(*args: Any, **more: Any) -> Any:
        image = decode(*args, **more)
        count("decode")
        return image

    def take_micro(self: Any, batch: Any) -> Any:
        count("step")
        return to_device(self, batch)

    checkpoint._Hashed.write = write_some  # type: ignore[method-assign]
    loader.decode_image = decode_one
    Pretraining.to_device = take_micro  # type: ignore[method-assign]


def before_step(act: Callable[[int], None]) -> None:
    """Call ``act`` with the number of every optimizer step (from 1), of any training, before it is taken."""
    real = Trainer.step

    def step(self: Any, batches: Any, number: int) -> Any:
        act(number + 1)
        return real(self, batches, number)

    Trainer.step = step  # type: ignore[method-assign]


def slow_steps(seconds: float) -> None:
    """So that something can be done to a run while it goes on."""
    before_step(lambda _: time.sleep(seconds))


def stop_after(step: int) -> Callable[[int], None]:
    """SIGTERM to process 0 itself once a step is done."""

    def place(rank: int) -> None:
        if rank == 0:
            before_step(lambda n: signal.raise_signal(signal.SIGTERM) if n == step else None)

    return place


def jumping_clock(seconds: float) -> Callable[[int], None]:
    """time.time() jumps to and fro by so much at every call, as a clock that is set does."""

    def place(_: int) -> None:
        real, calls = time.time, [0]

        def jumped() -> float:
            calls[0] += 1
            return real() + (seconds if calls[0] % 2 else -seconds)

        time.time = jumped

    return place


def leave_weights(out: Path, rank: int) -> None:
    """Every process leaves the sums of its weights behind, exactly, for comparison."""
    real = _Fit.run_to_the_end

    def run(self: Any) -> Any:
        last = real(self)
        sums = [p.detach().double().sum().item().hex() for p in self.task.model.parameters()]
        (out.parent / f"{out.name}.weights{rank}").write_text(" ".join(sums))
        return last

    _Fit.run_to_the_end = run  # type: ignore[method-assign]


# --- numbers that are spoilt -------------------------------------------------------------------------

Now = Callable[[], bool]
"""Whether this is the moment (and the process) for the fault."""
POISONED_GRADIENT = "student.blocks.1.mlp.fc1.weight"


def moment(first: int, last: int, rank: int, hurt: int | None) -> Now:
    """True in steps first..last (from 1) on process ``hurt`` (None: on all)."""
    at = [0]

    def note(number: int) -> None:
        at[0] = number

    before_step(note)
    return lambda: first <= at[0] <= last and hurt in (None, rank)


def poison(made: Tensor, value: float) -> Tensor:
    """A copy in which one number is spoilt."""
    spoilt = made.clone()
    spoilt.view(-1)[spoilt.numel() // 2] = value
    return spoilt


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """``owner.name`` whose result goes through ``change(result, *arguments)``."""
    real = getattr(owner, name)

    def run(*args: Any, **more: Any) -> Any:
        return change(real(*args, **more), *args)

    setattr(owner, name, run)


def spoil(place: str, now: Now, value: float) -> None:
    """One number of one part becomes ``value`` when it is ``now``."""

    def one(made: Any, *_: Any) -> Any:
        return poison(made, value) if now() else made

    if place == "image":
        wrapped(Pretraining, "to_device", lambda made, *_: (one(made[0]), made[1]))
    elif place in ("teacher", "momentum"):
        wrapped(
            frozen.CachedForwards, "features", lambda made, _, name, *__: one(made) if name == place else made
        )
    elif place == "student":
        wrapped(cmtmae, "encode_visible", one)
    elif place == "decoder":
        wrapped(Decoder, "forward", one)
    else:
        real = cmtmae.StudentWithDecoder.__init__

        def init(self: Any, *args: Any) -> None:
            real(self, *args)
            if place == "head":
                self.heads["momentum"].register_forward_hook(lambda _, __, made: one(made))
            elif place == "gradient":
                self.get_parameter(POISONED_GRADIENT).register_hook(one)
            else:  # a weight, by its name

                def spoil_weight(module: Any, _: Any) -> None:
                    if now():
                        with torch.no_grad():
                            module.get_parameter(place).view(-1)[0] = value

                self.register_forward_pre_hook(spoil_weight)

        cmtmae.StudentWithDecoder.__init__ = init  # type: ignore[method-assign]


PLACES = {
    "image": "image", "teacher": "teacher", "momentum": "momentum student", "student": "student",
    "decoder": "decoder", "head": "head", "gradient": f"gradient of {POISONED_GRADIENT}",
}  # fmt: skip
"""Where a number is spoilt -> the words in which the warning must name it."""


def dull_teacher(how: str) -> Callable[[int], None]:
    """constant features | all along one line | attention on one patch | no attention on any patch."""

    def features(made: Tensor, _: Any, name: str, *__: Any) -> Tensor:
        if name != "teacher":
            return made
        return torch.ones_like(made) if how == "constant" else made[..., :1] * torch.ones_like(made)

    def attention(made: tuple[Tensor, Tensor], _: Any, name: str, *__: Any) -> tuple[Tensor, Tensor]:
        if name != "teacher":
            return made
        raw = torch.zeros_like(made[0])
        if how == "one patch":
            raw[:, 3] = 1.0
        return raw, made[1]

    def place(_: int) -> None:
        if how in ("constant", "one line"):
            wrapped(frozen.CachedForwards, "features", features)
        else:
            wrapped(frozen.CachedForwards, "attention", attention)

    return place
