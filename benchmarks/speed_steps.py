"""Training steps against public code (mae, cmt), and their cost against the count of multiplications (cost)."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.naive_cmt import Materialise, NaiveCMT, make_optimizer, train_step
from benchmarks.speed_lightly import lightly_step, why_not
from benchmarks.speed_timing import (
    OURS,
    Comparison,
    Options,
    alternate,
    alternate_processes,
)
from cmt_mae.backbones import Backbone
from cmt_mae.core.parsing import parse
from cmt_mae.engine import compiling
from cmt_mae.engine.memory import keep_memory
from cmt_mae.method.vit import sincos_table
from cmt_mae.pretraining import assemble
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.stepping import Stepper
from cmt_mae.recipes import load_recipes
from cmt_mae.tools.bench.build import frozen_backbone, make_stepper, synthetic_batches
from cmt_mae.tools.bench.flops import OURS as OUR_CUTS
from cmt_mae.tools.bench.flops import PLAIN, step_macs, step_of

# name: recipe of the scale, further settings, images a step
SIZES: dict[str, tuple[str, list[str], int]] = {
    "small": ("micro64", ["--teacher.name=embedded"], 16),
    "vits16": ("imagenette_vits16", [], 4),
    "vitb16": ("", [], 4),
}
Step = Callable[[], object]
COMPILED = "ours, compiled"
RIVALS = ("transformers", "lightly", "naive, maps in last", "naive, maps in all")
APART = (
    "Each runs in a process of its own, as its users start it: ours keeps freed memory for the next step "
    "(training/memory.py); 'memory kept' is the rival in such a process, 'ours, compiled' has "
    "--runtime.compile true."
)


def settings(method: str, size: str, *words: str, quick: bool = False) -> PretrainConfig:
    """A method (mae, cmt) at a size, on one CPU process in fp32; quick: with 2 images a step."""
    scale, more, images = SIZES[size]
    images = 2 if quick else images
    recipe = f"{method},{scale}" if scale else method
    common = [
        "--runtime.device=cpu", "--precision=fp32", "--out=x", "--data.path=x", f"--batch_size={images}"
    ]  # fmt: skip
    made: PretrainConfig = parse(
        "side_by_side", PretrainConfig, [*common, *more, *words], load_recipes(recipe)
    )
    return made


def describe(config: PretrainConfig) -> str:
    """E.g. ViT 384 x 12 at 224 px, patch 16."""
    _, kwargs = config.student.architecture()
    return (
        f"ViT of width {kwargs['embed_dim']} and depth {kwargs['depth']} at {config.student.size()[0]} px, patch "
        f"{config.student.patch_size}, decoder {config.decoder.depth} x {config.decoder.width}"
    )


def our_step(
    config: PretrainConfig, stage: str, backbone: Backbone | None = None
) -> tuple[Stepper, Step]:
    """A whole optimizer step as `pretrain` takes it: uint8 in, meters and the guard against NaN included."""
    stepper, teacher = make_stepper(config, backbone)
    step = stepper.plan.switch_step if stage == "two" else 0
    stepper.enter_stage(step)
    crops = assemble.crop_settings(config, teacher)
    batches = synthetic_batches(crops, config.mask.rule, stepper.plan.n_patches, config.batch_size)
    return stepper, lambda: stepper.step(batches, step)


def images_of(config: PretrainConfig) -> Tensor:
    """Normalised images, ready: rivals are spared the way from uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(config.batch_size, 3, *config.student.size(), generator=generator)


# --- mae ---------------------------------------------------------------------------------------------


def compare_mae(options: Options) -> Iterator[dict[str, Any]]:
    """Our `mae` against transformers' ViTMAEForPreTraining and lightly's MAE."""
    for size in options.sizes:
        config = settings("mae", size, quick=options.quick)
        makers: dict[str, Callable[[], Step]] = {
            OURS: partial(our_run, config, "one"),
            "transformers": partial(transformers_step, config),
            "transformers, memory kept": partial(keeping, partial(transformers_step, config)),
        }
        missing, uncompiled = why_not(), compiling.why_not(torch.device("cpu"))
        if not uncompiled:
            makers[COMPILED] = partial(our_run, compiled(config), "one")
        if not missing:
            makers["lightly"] = partial(lightly_run, config)
        comparison = Comparison(
            "mae", f"mae/{size}",
            f"One optimizer step of MAE on {config.batch_size} images, {describe(config)}: ours from uint8, "
            "transformers' ViTMAEForPreTraining (SDPA, its default; gradients clipped, as its Trainer does by "
            "default) and lightly's MAE (timm's blocks, raw pixels as target) with fused AdamW from normalised "
            f"images. {APART}",
            config.batch_size, target={name: 1.25 for name in makers if name in RIVALS},
            absent={
                name: why for name, why in (("lightly", missing), (COMPILED, uncompiled)) if why
            },
            facts={"dtype": "fp32"},
        )  # fmt: skip
        yield comparison.measured(alternate_processes(makers, options.rounds, comparison.name))


def our_run(config: PretrainConfig, stage: str) -> Step:
    """As ``our_step``, with everything made here."""
    backbone = frozen_backbone(config) if config.needs_teacher() else None
    return our_step(config, stage, backbone)[1]


def compiled(config: PretrainConfig) -> PretrainConfig:
    """The same with compiled blocks."""
    return replace(config, runtime=replace(config.runtime, compile=True))


def lightly_run(config: PretrainConfig) -> Step:
    """As ``lightly_step``, with its images made here."""
    return lightly_step(config, images_of(config))


def keeping(maker: Callable[[], Step]) -> Step:
    """A contestant whose process keeps freed memory, as ours does."""
    keep_memory()
    return maker()


def transformers_step(config: PretrainConfig) -> Step:
    """ViTMAEForPreTraining of the same shapes, as its documentation trains it."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    _, kwargs = config.student.architecture()
    width, decoder = kwargs["embed_dim"], config.decoder
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width, num_hidden_layers=kwargs["depth"], num_attention_heads=kwargs["num_heads"],
            intermediate_size=4 * width, image_size=config.student.size()[0], patch_size=config.student.patch_size,
            decoder_hidden_size=decoder.width, decoder_num_hidden_layers=decoder.depth,
            decoder_num_attention_heads=decoder.heads, decoder_intermediate_size=4 * decoder.width,
            layer_norm_eps=1e-6, mask_ratio=config.mask.ratio, norm_pix_loss=True,
        )
    ).train()  # fmt: skip
    assert model.config._attn_implementation == "sdpa"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = images_of(config)

    def step() -> None:
        loss = model(pixel_values=images).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


# --- cmt -----------------------------------------------------------------------------------------------


def compare_cmt(options: Options) -> Iterator[dict[str, Any]]:
    """Our `cmt` against the paper written plainly on timm, stage by stage."""
    for size in options.sizes:
        config = settings("cmt", size, quick=options.quick)
        backbone = frozen_backbone(config)
        for stage in ("one", "two"):
            makers: dict[str, Callable[[], Step]] = {OURS: partial(our_run, config, stage)}
            for how in ("last", "all"):
                makers[f"naive, maps in {how}"] = partial(naive_run, config, stage, how)
            makers["naive, memory kept"] = partial(keeping, makers["naive, maps in last"])
            uncompiled = compiling.why_not(torch.device("cpu"))
            if not uncompiled:
                makers[COMPILED] = partial(our_run, compiled(config), stage)
            comparison = Comparison(
                "cmt", f"cmt/{size}/{stage}",
                f"One optimizer step of CMT-MAE, stage {stage}, on {config.batch_size} images, "
                f"{describe(config)}, teacher {backbone.source}. Naive is benchmarks/naive_cmt.py; attention maps "
                "exist as matrices in the last block only, or in all blocks of teacher and momentum student, as "
                f"Hugging Face's output_attentions does. {APART}",
                config.batch_size,
                target={name: 1.6 for name in makers if name in RIVALS and stage == "two"},
                absent={COMPILED: uncompiled} if uncompiled else {},
                facts={"dtype": "fp32"},
            )  # fmt: skip
            yield comparison.measured(alternate_processes(makers, options.rounds, comparison.name))


def naive_run(config: PretrainConfig, stage: str, materialise: Materialise) -> Step:
    """As ``naive_step``, with its teacher made here."""
    return naive_step(config, stage, frozen_backbone(config), materialise)[1]


def naive_step(
    config: PretrainConfig, stage: str, backbone: Backbone, materialise: Materialise
) -> tuple[NaiveCMT, Step]:
    """benchmarks/naive_cmt.py at the same shapes."""
    model = naive_model(config, backbone, materialise)
    if stage == "two":
        model.start_stage_two()
    optimizer, images = make_optimizer(model), images_of(config)
    return model, lambda: train_step(model, optimizer, images)


def naive_model(config: PretrainConfig, backbone: Backbone, materialise: Materialise) -> NaiveCMT:
    """Its student is timm's network of the same name and shape."""
    name, kwargs = config.student.architecture()
    student: Any = timm.create_model(name, num_classes=0, **kwargs)
    table = sincos_table(student.embed_dim, config.student.grid())
    student.pos_embed = nn.Parameter(table[None], requires_grad=False)
    teacher: Any = copy.deepcopy(backbone.model)
    return NaiveCMT(
        student, teacher, backbone.proj, images=assemble.IMAGENET,
        teacher_images=(backbone.mean, backbone.std), mask_ratio=config.mask.ratio, alpha=config.alpha,
        decoder=(config.decoder.width, config.decoder.depth, config.decoder.heads), materialise=materialise,
    )  # fmt: skip


# --- cost ------------------------------------------------------------------------------------------------

COSTS: dict[str, dict[str, list[str]]] = {
    # axis: point -> settings beside the small preset; "stage" is measured at every size
    "image size": {f"{px} px": [f"--student.img_size=[{px}]"] for px in (64, 96, 128)},
    "width": {
        f"width {w}": [f"--student.width={w}", f"--student.heads={w // 32}"]
        for w in (128, 192, 256, 384)
    },
    "alpha": {f"alpha {a}": [f"--alpha={a}"] for a in (0.0, 0.3, 1.0)},
}
STAGES = {"mae": ("mae", "one"), "stage one": ("cmt", "one"), "stage two": ("cmt", "two")}


def compare_cost(options: Options) -> Iterator[dict[str, Any]]:
    """Time of our step against its multiplications, over stage, image size, width and alpha."""
    for size in options.sizes:
        points = {
            name: (settings(method, size, quick=options.quick), stage)
            for name, (method, stage) in STAGES.items()
        }
        yield measure_costs("stage", size, points, options)
    for axis, values in COSTS.items():
        points = {}
        for name, words in values.items():
            config = settings("cmt", "small", *words, quick=options.quick)
            # alpha 0 is stage one for ever: it has no switch, and a step of it is a step of stage one
            points[name] = (config, "two" if config.needs_momentum() else "one")
        yield measure_costs(axis, "small", points, options)


def measure_costs(
    axis: str, size: str, points: dict[str, tuple[PretrainConfig, str]], options: Options
) -> dict[str, Any]:
    """One axis: time, multiplications and their ratio at every point."""
    contestants, gflop, plain = {}, {}, {}
    for name, (config, stage) in points.items():
        stepper, contestants[name] = our_step(config, stage)
        at = stepper.plan.switch_step if stage == "two" else 0
        sizes = step_of(
            stepper.learner, stepper.guides, stepper.weights_at(at), stepper.plan.n_mask
        )
        gflop[name] = 2e-9 * sum(step_macs(sizes, OUR_CUTS).values())
        plain[name] = 2e-9 * sum(step_macs(sizes, PLAIN).values())
    batch = next(iter(points.values()))[0].batch_size
    comparison = Comparison(
        "cost", f"cost/{size}/{axis}",
        f"Our step on {batch} images at several settings ({axis}), size {size}, and the GFLOP an image that it "
        "computes (forward and backward, matrix products only).",
        batch, facts={"dtype": "fp32", "gflop_per_image": gflop, "gflop_per_image_plain": plain},
    )  # fmt: skip
    entry = comparison.measured(alternate(contestants, options.rounds, comparison.name))
    for name, row in entry["contestants"].items():
        row["gflop_per_second"] = row["rate"] * gflop[name]
    if axis == "stage":
        entry["facts"]["stage_two_over_mae"] = over_mae(entry, plain)
    return entry


def over_mae(entry: dict[str, Any], plain: dict[str, float]) -> dict[str, float]:
    """Cost of stage two over our own MAE: by time (median of the rounds' ratios), by FLOP, and one over the
    other (wanted: 1.05 at most)."""
    rows = entry["contestants"]
    rounds = zip(rows["stage two"]["seconds"], rows["mae"]["seconds"], strict=True)
    ratios = sorted(two / mae for two, mae in rounds)
    time, flop = ratios[len(ratios) // 2], plain["stage two"] / plain["mae"]
    return {"time": time, "flop": flop, "excess": time / flop, "wanted_excess_at_most": 1.05}
