"""Ways to run one and the same step on a GPU: eager, compiled, captured graphs, a second stream, fp8.

Each is a ``Stepper`` of the product; what the product has no setting for is put on that one object.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_fp8 import use_fp8
from cmt_mae.backbones import Backbone
from cmt_mae.data.loader import Batch
from cmt_mae.method import cmtmae
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.recipes import load_recipes
from cmt_mae.tools.bench.build import frozen_backbone, make_stepper
from cmt_mae.tools.bench.measure import replaced

METHODS = {"mae": ("mae", "one"), "one": ("cmt", "one"), "two": ("cmt", "two")}
SIZES = {"micro": "micro64", "small": "micro64", "base": "", "large": ""}
WARM = 3  # runs on a side stream before a capture, as torch's manual asks


@dataclass(frozen=True)
class Variant:
    """Settings of the product, and what is added to them here."""

    what: str
    compiled: bool = False
    frozen_bf16: bool = False
    graph: str = ""
    """"" | guides (forward of the frozen networks) | step (all of forward and backward)."""
    second_stream: bool = False
    fp8: bool = False


VARIANTS: dict[str, Variant] = {
    "eager": Variant("as written"),
    "frozen": Variant("frozen networks wholly in bf16", frozen_bf16=True),
    "compiled": Variant("blocks compiled", compiled=True),
    "compiled_frozen": Variant("both", compiled=True, frozen_bf16=True),
    "guides_graph": Variant(
        "both, the frozen networks' forward as one graph",
        compiled=True, frozen_bf16=True, graph="guides",
    ),
    "step_graph": Variant("forward and backward as one graph", frozen_bf16=True, graph="step"),
    "compiled_step_graph": Variant(
        "compiled blocks, forward and backward as one graph",
        compiled=True, frozen_bf16=True, graph="step",
    ),
    "second_stream": Variant(
        "both, the teacher beside the momentum student on a second stream",
        compiled=True, frozen_bf16=True, second_stream=True,
    ),
    "fp8": Variant(
        "both, the frozen networks' large products in fp8", compiled=True, frozen_bf16=True, fp8=True
    ),
}  # fmt: skip


def settings(size: str, method: str, variant: Variant, batch: int, **more: Any) -> PretrainConfig:
    """The recipe of a method at a size. more: fields of PretrainConfig. Needs no parser of command lines."""
    recipe, _ = METHODS[method]
    run = PretrainConfig(out="gpu", batch_size=batch)
    scale = SIZES[size]
    fill(run, load_recipes(f"{recipe},{scale}" if scale else recipe))
    run.student.preset = "micro" if size == "small" else size
    if size == "micro":
        run.student.depth, run.student.img_size, run.decoder.depth = 2, [32], 1
        run.teacher.name = "embedded"
    run.data.path, run.batch_size = "synthetic images", batch
    run.runtime.compile = variant.compiled
    run.frozen_precision = "bf16" if variant.frozen_bf16 else "auto"
    for name, value in more.items():
        setattr(run, name, value)
    run.check()
    return run


def fill(config: Any, content: dict[str, Any]) -> None:
    """Put a recipe's values into a dataclass of settings."""
    for name, value in content.items():
        if isinstance(value, dict):
            fill(getattr(config, name), value)
        else:
            setattr(config, name, value)


@contextmanager
def stepper_of(
    run: PretrainConfig,
    method: str,
    variant: Variant,
    backbones: dict[str, Backbone],
) -> Iterator[tuple[Stepper, Any, int]]:
    """(stepper in the method's stage, teacher, a step of that stage). ``backbones`` keeps what was built."""
    backbone = None
    if run.needs_teacher():
        name = f"{run.teacher.name} {run.student.grid()}"
        backbone = backbones.get(name) or frozen_backbone(run)
        backbones[name] = backbone
    stepper, teacher = make_stepper(run, backbone)
    if variant.compiled and stepper.no_compiler:
        raise RuntimeError(f"nothing can be compiled here: {stepper.no_compiler}")
    step = stepper.plan.switch_step if METHODS[method][1] == "two" else 0
    if variant.fp8:  # before compiling: modules are exchanged
        if teacher is None:
            raise RuntimeError("no frozen network to run in fp8")
        if step:
            stepper.guides.start_momentum(stepper.learner.student)
        use_fp8(stepper.guides)
    stepper.enter_stage(step)
    with second_stream(stepper.device) if variant.second_stream else nullcontext():
        if variant.graph == "step":
            capture_step(stepper)
        elif variant.graph == "guides":
            capture_guides(stepper)
        yield stepper, teacher, step


class Graph:
    """A function without arguments, captured as a CUDA graph; on a CPU it just runs again.

    What it reads must stay where it is; ``result`` is written anew by every ``replay``.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            self.result = function()
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def replay(self) -> Any:
        """Run it once more."""
        if self.graph is None:
            self.result = self.function()
        else:
            self.graph.replay()
        return self.result


def capture_step(stepper: Stepper) -> None:
    """Forward and backward of ``stepper`` become one graph at its first step; the optimizer stays outside.

    For one process without accumulation, at one step's weights (alpha must not grow, no mix_random).
    """
    if stepper.plan.accumulation != 1 or stepper.accelerator.num_processes != 1:
        raise RuntimeError("a captured step needs one process and no accumulation")
    eager, kept = stepper.loss, dict[str, Any]()

    def loss(batch: Batch, step: int) -> Tensor:
        if not kept:
            kept["static"] = on_device(batch, stepper.device)
            kept["graph"] = Graph(lambda: both(kept["static"], step), stepper.device)
            kept["gradients"] = [(p, p.grad) for p in stepper.learner.parameters()]
        copy_batch(batch, kept["static"])
        value, numbers = kept["graph"].replay()
        # the graph writes to the gradients it was captured with
        if kept["graph"].graph is not None:
            for parameter, gradient in kept["gradients"]:
                parameter.grad = gradient
        stepper.meters.add(numbers, step + 1)
        return value

    def both(batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        numbers: dict[str, Tensor] = {}
        stepper.optimizer.zero_grad(set_to_none=True)
        with replaced(stepper.meters, "add", lambda _: lambda new, *_: numbers.update(new)):
            value = eager(batch, step)
        value.backward()
        return value.detach(), numbers

    stepper.loss = loss  # type: ignore[method-assign]
    stepper.accelerator.backward = lambda *_: None


def capture_guides(stepper: Stepper) -> None:
    """The forward of the frozen networks, mask and targets included, becomes one graph at its first call."""
    guides, kept = stepper.guides, dict[str, Any]()
    eager = guides.forward

    def forward(images: Tensor, noise: Tensor, *words: Any, **names: Any) -> Any:
        second = names.pop("teacher_images", None)
        if not kept:
            kept["inputs"] = [x if x is None else x.clone() for x in (images, noise, second)]
            still, own_noise, other = kept["inputs"]
            kept["graph"] = Graph(
                lambda: eager(still, own_noise, *words, teacher_images=other, **names),
                stepper.device,
            )
        for mine, given in zip(kept["inputs"], (images, noise, second), strict=True):
            if mine is not None:
                mine.copy_(given)
        return kept["graph"].replay()

    guides.forward = forward  # type: ignore[method-assign]


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A copy of a batch that stays where it is."""
    moved: Any = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    return Batch(**moved)


def copy_batch(source: Batch, goal: Batch) -> None:
    """Into the tensors that a graph reads."""
    for name, value in source.items():
        mine: Any = goal[name]  # type: ignore[literal-required]
        if isinstance(mine, Tensor):
            mine.copy_(value, non_blocking=True)  # type: ignore[arg-type]


@contextmanager
def second_stream(device: torch.device) -> Iterator[None]:
    """Where both networks look at a batch, the teacher does so on a stream of its own."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def state(look: cmtmae.CachedForwards, name: str) -> Any:
            guides = look.guides
            if look.states or guides.momentum is None or guides.teacher is None or side is None:
                return real(look, name)
            main = torch.cuda.current_stream(device)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                there = real(look, "teacher")
            real(look, "momentum")
            main.wait_stream(side)
            for tensor in (there.tokens, *there.earlier):
                tensor.record_stream(main)
            return look.states[name]

        return state

    with replaced(cmtmae.CachedForwards, "state", wrap):
        yield
