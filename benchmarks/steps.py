"""One training step of ours and of public code, at the same shapes: what the harness times.

lightly is no dependency of this project: ``pip install --no-deps lightly lightly_utils`` for these comparisons.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.naive_cmt import Materialise, NaiveCMT, make_optimizer, train_step
from benchmarks.timing import Step
from cmt_mae.backbones import Backbone
from cmt_mae.core.recipes import load_recipes
from cmt_mae.data.loader import Batch
from cmt_mae.engine.processes import keep_memory
from cmt_mae.engine.trainer import Trainer
from cmt_mae.method.vit import sincos_table
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.task import Pretraining
from cmt_mae.tools.bench.build import frozen_backbone, make_trainer, synthetic_batches

SIZES: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: recipe of the scale, further settings, images a step
    "micro": (
        "micro64",
        {"teacher.name": "embedded", "student.depth": 2, "student.img_size": [32], "decoder.depth": 1}, 4,
    ),
    "small": ("micro64", {"teacher.name": "embedded"}, 16),
    "vits16": ("imagenette_vits16", {}, 4),
    "vitb16": ("", {"student.preset": "base"}, 4),
    "vitl16": ("", {"student.preset": "large"}, 4),
}  # fmt: skip
METHODS = {"mae": ("mae", "one"), "one": ("cmt", "one"), "two": ("cmt", "two")}
"""name -> (recipe, stage)."""


def settings(method: str, size: str, **changes: Any) -> PretrainConfig:
    """A method (mae, one, two) at a size on one CPU process in fp32. changes: settings, "__" for the dot.

    Needs no parser of command lines, which a machine with a GPU may lack.
    """
    scale, more, images = SIZES[size]
    recipe = METHODS[method][0]
    run = PretrainConfig(out="benchmark", batch_size=images, precision="fp32")
    run.data.path, run.runtime.device = "synthetic images", "cpu"
    fill(run, load_recipes(f"{recipe},{scale}" if scale else recipe))
    run.batch_size = images
    for name, value in {**more, **changes}.items():
        *way, last = name.replace("__", ".").split(".")
        owner: Any = run
        for part in way:
            owner = getattr(owner, part)
        setattr(owner, last, value)
    run.check()
    return run


def fill(config: Any, content: dict[str, Any]) -> None:
    """Put a recipe's values into a dataclass of settings."""
    for name, value in content.items():
        if isinstance(value, dict):
            fill(getattr(config, name), value)
        else:
            setattr(config, name, value)


def describe(config: PretrainConfig) -> str:
    """E.g. ViT of width 384 and depth 12 at 224 px, patch 16."""
    _, kwargs = config.student.architecture()
    return (
        f"ViT of width {kwargs['embed_dim']} and depth {kwargs['depth']} at {config.student.size()[0]} px, patch "
        f"{config.student.patch_size}, decoder {config.decoder.depth} x {config.decoder.width}"
    )


# --- ours ------------------------------------------------------------------------------------------------


def our_trainer(
    config: PretrainConfig, stage: str, backbone: Backbone | None = None, pin: bool = False
) -> tuple[Trainer, Pretraining, Iterator[Batch], int]:
    """A trainer in its stage, its task, synthetic uint8 batches, and a step of that stage."""
    trainer, task = make_trainer(config, backbone)
    step = task.switch_step if stage == "two" else 0
    trainer.enter(step)
    crops = assembly.crop_settings(config, task.frozen_networks.teacher)
    rule, patches = config.mask.rule, task.plan.n_patches
    batches = synthetic_batches(crops, rule, patches, task.micro_batch, pin=pin)
    return trainer, task, batches, step


def ours(config: PretrainConfig, stage: str) -> Step:
    """A whole optimizer step as `pretrain` takes it: uint8 in, meters and the guard against NaN included."""
    backbone = frozen_backbone(config) if config.needs_teacher() else None
    trainer, task, batches, step = our_trainer(config, stage, backbone)
    held = backbone.model if backbone is not None else None
    facts = {
        "frozen_gb": gigabytes(held, task.frozen_networks.momentum),
        "gradient_bytes": sum(4 * p.numel() for p in task.learner.parameters() if p.requires_grad),
    }
    del backbone, held
    return Step(lambda: trainer.step(batches, step), facts)


def gigabytes(*networks: Any) -> float:
    """Of the weights of frozen networks."""
    held = [p for net in networks if net is not None for p in net.parameters()]
    return float(sum(p.numel() * p.element_size() for p in held)) / 1e9


# --- the others -------------------------------------------------------------------------------------------


def images_of(config: PretrainConfig) -> Tensor:
    """Normalised images, ready: the others are spared the way from uint8."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(config.batch_size, 3, *config.student.size(), generator=generator)


def keeping(maker: Callable[[], Step]) -> Step:
    """A contestant whose process keeps freed memory, as ours does."""
    keep_memory()
    return maker()


def naive(config: PretrainConfig, stage: str, materialise: Materialise = "last") -> Step:
    """benchmarks/naive_cmt.py at the same shapes."""
    model = naive_model(config, frozen_backbone(config), materialise)
    if stage == "two":
        model.start_stage_two()
    optimizer, images = make_optimizer(model), images_of(config)
    facts = {"frozen_gb": gigabytes(model.teacher, model.momentum)}
    return Step(partial(train_step, model, optimizer, images), facts)


def naive_model(config: PretrainConfig, backbone: Backbone, materialise: Materialise) -> NaiveCMT:
    """Its student is timm's network of the same name and shape."""
    name, kwargs = config.student.architecture()
    student: Any = timm.create_model(name, num_classes=0, **kwargs)
    table = sincos_table(student.embed_dim, config.student.grid())
    student.pos_embed = nn.Parameter(table[None], requires_grad=False)
    teacher: Any = copy.deepcopy(backbone.model)
    return NaiveCMT(
        student, teacher, backbone.proj, images=assembly.IMAGENET,
        teacher_images=(backbone.mean, backbone.std), mask_ratio=config.mask.ratio, alpha=config.alpha,
        decoder=(config.decoder.width, config.decoder.depth, config.decoder.heads), materialise=materialise,
    )  # fmt: skip


def transformers_model(config: PretrainConfig) -> Any:
    """ViTMAEForPreTraining of the same shapes."""
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
    return model


def transformers(config: PretrainConfig) -> Step:
    """One step as its documentation and its Trainer's defaults make it."""
    model = transformers_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = images_of(config)

    def step() -> None:
        loss = model(pixel_values=images).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return Step(step)


def why_not_lightly() -> str:
    """Why lightly cannot be compared here; "" where it can."""
    if importlib.util.find_spec("lightly") is None:
        return "not installed on the machine of this measurement"
    try:
        import lightly.models.modules  # noqa: F401
    except Exception as error:  # whatever of its own dependencies is missing
        return f"cannot be imported ({error})"
    return ""


class LightlyMAE(nn.Module):
    """lightly's parts put together as its documentation does (examples: MAE)."""

    def __init__(self, config: PretrainConfig) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        name, kwargs = config.student.architecture()
        self.vit: Any = timm.create_model(name, num_classes=0, **kwargs)
        self.backbone: Any = MaskedVisionTransformerTIMM(vit=self.vit)
        self.patch_size, self.ratio = config.student.patch_size, config.mask.ratio
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the class of its own example, which it calls deprecated
            self.decoder: Any = MAEDecoderTIMM(
                num_patches=self.vit.patch_embed.num_patches, patch_size=self.patch_size,
                embed_dim=self.vit.embed_dim, decoder_embed_dim=config.decoder.width,
                decoder_depth=config.decoder.depth, decoder_num_heads=config.decoder.heads, mlp_ratio=4.0,
            )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """The loss. images (B, 3, H, W) normalised."""
        from lightly.models import utils

        batch, length = len(images), self.backbone.sequence_length
        keep, hidden = utils.random_token_mask((batch, length), mask_ratio=self.ratio)
        visible = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (batch, length))
        tokens = utils.set_at_index(tokens, keep, visible.type_as(tokens))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        patches = utils.patchify(images, self.patch_size)
        target = utils.get_at_index(patches, hidden - 1)  # its places count the class token
        return nn.functional.mse_loss(predicted, target)


def lightly(config: PretrainConfig) -> Step:
    """One optimizer step of lightly's parts at the same shapes."""
    model = LightlyMAE(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    images = images_of(config)

    def step() -> None:
        loss = model(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Step(step)
