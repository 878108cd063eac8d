"""The teacher: do its weights and its network belong together, and do its features differ between images?"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.backbones.container import read_container
from cmt_mae.backbones.load import EMBEDDED, RUN_FILES
from cmt_mae.backbones.own_file import HEADER
from cmt_mae.backbones.selfcheck import TOLERANCE, features_of_fixed_picture
from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import center_crop, load_image
from cmt_mae.data.sample import pictures
from cmt_mae.data.source import BadImage, Source
from cmt_mae.method import targets as T
from cmt_mae.method.frozen import as_shares
from cmt_mae.method.teacher import Teacher
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.diagnose.finding import Finding, problem, warning
from cmt_mae.tools.diagnose.limits import GREEDY, SAME, UNIFORM

IMAGES = 48  # through the teacher
AT_ONCE = 16
LEAST_RANK = 2.0  # directions that the features fill


def check_teacher(
    config: PretrainConfig, source: Source | None
) -> tuple[dict[str, Any], list[Finding]]:
    """Facts about the teacher of these settings as the run would use it, and what is wrong with it.

    source: images to show it; None: the sample images. A teacher that cannot be loaded is a finding, not an error.
    """
    channels = config.student.in_chans
    stats = assembly.IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    try:
        native = load_backbone(config.teacher.name, facts=config.teacher)
        teacher, backbone = assembly.build_teacher(config, stats)
    except InputError as error:
        found = problem(
            "teacher", "the teacher cannot be loaded", str(error), "give another --teacher"
        )
        return {"name": config.teacher.name, "error": str(error)}, [found]
    assert teacher is not None
    assert backbone is not None
    images = sample_images(source, teacher, channels)
    mean, std = (torch.tensor(part) for part in stats)
    facts = {
        "name": config.teacher.name,
        "source": backbone.source,
        "licence": backbone.licence,
        "digest": backbone.digest,
        "million_parameters": round(sum(p.numel() for p in backbone.model.parameters()) / 1e6, 2),
        "input_size": list(teacher.input_size),
        "grid": list(teacher.own_grid),
        "student_grid": list(teacher.grid),
        "normalised_by": [list(backbone.mean), list(backbone.std)],
        "activation": activations(backbone.model),
        "known_features": compare_known(config.teacher.name, native),
        "shown": f"{len(images)} {'sample images' if source is None else 'images of the data'}",
        **look(teacher, images, mean, std),
    }
    return facts, judge(facts, guides=config.mask_source() != "none")


def sample_images(source: Source | None, teacher: Teacher, channels: int) -> Tensor:
    """(B, C, H, W) in 0..1 at the teacher's size: centre crops of images from all over the data, or sample images.

    Raises InputError where none of them can be read.
    """
    if source is None:
        pixels = pictures(IMAGES)
        if channels != 3:
            pixels = [
                one.mean(2, keepdims=True).astype(np.uint8).repeat(channels, 2) for one in pixels
            ]
    else:
        pixels = []
        for index in np.unique(np.linspace(0, len(source) - 1, IMAGES).astype(int)).tolist():
            with contextlib.suppress(BadImage):
                pixels.append(load_image(source, index, channels))
    if not pixels:
        raise InputError("none of the images can be read: check the data")
    cut = [center_crop(one, teacher.input_size) for one in pixels]
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def look(teacher: Teacher, images: Tensor, mean: Tensor, std: Tensor) -> dict[str, Any]:
    """What the teacher makes of images (B, C, H, W) in 0..1: numbers about its attention and its features.

    mean, std: (C,), with which the student's images are normalised.
    """
    maps, masses, features = [], [], []
    for batch in images.split(AT_ONCE):
        state = teacher.run_to_last((batch - mean[:, None, None]) / std[:, None, None])
        raw, mass = teacher.attention(state)
        maps.append(as_shares(raw))
        masses.append(mass)
        features.append(teacher.features(state, None))
    shares, tokens = torch.cat(maps), torch.cat(features)
    each = entropy_of(shares)
    return {
        "attention_entropy": round(each.mean().item(), 4),
        "attention_entropy_range": [round(each.min().item(), 4), round(each.max().item(), 4)],
        "attention_class_mass": round(torch.cat(masses).mean().item(), 4),
        "attention_image_share": round(
            T.image_share(shares[:, :, None], None, shares.shape[1]).item(), 4
        ),
        "feature_width": tokens.shape[-1],
        "feature_rank": round(T.effective_rank(tokens).item(), 2),
        "feature_image_share": round(T.image_share(tokens, None, tokens.shape[1]).item(), 4),
        "finite": bool(torch.isfinite(tokens).all() and torch.isfinite(shares).all()),
    }


def entropy_of(shares: Tensor) -> Tensor:
    """Entropy of maps (..., L) that sum to 1, each as a share of the uniform map's."""
    bounded = shares.clamp_min(1e-12)
    return -(bounded * bounded.log()).sum(-1) / math.log(shares.shape[-1])


def activations(model: nn.Module) -> list[str]:
    """Names of the activations in the blocks, e.g. ["GELU"]; CLIP of OpenAI must have QuickGELU."""
    blocks: Any = model.blocks
    acts = {type(getattr(block.mlp, "act", None)).__name__ for block in blocks}
    return sorted(acts - {"NoneType"})


def compare_known(name: str, backbone: Backbone) -> dict[str, Any]:
    """Features of one fixed picture against those recorded in the file, where its writer recorded some.

    A wrong activation or normalisation changes no weight and every feature; loading has refused it already.
    """
    path = EMBEDDED if name == "embedded" else Path(name).expanduser()
    if path.is_dir():
        path = path / RUN_FILES[None]
    if not path.is_file():
        return {"recorded": False}
    header = json.loads(read_container(path).metadata.get(HEADER, "{}"))
    written = torch.tensor([float(v) for v in header.get("self_check") or []])
    if not len(written):
        return {"recorded": False}
    now = torch.tensor(
        features_of_fixed_picture(backbone.model, backbone.mean, backbone.std, backbone.img_size)
    )
    off = ((now - written).abs().max() / written.abs().max()).item()
    return {
        "recorded": True,
        "numbers": len(written),
        "largest_difference": off,
        "allowed": TOLERANCE,
    }


def judge(facts: dict[str, Any], guides: bool) -> list[Finding]:
    """What is wrong, from the facts alone. guides: whether its attention chooses what is hidden."""
    other = "give a teacher that was trained on photos (--teacher embedded, DINO, CLIP, DeiT)"
    if not facts["finite"]:
        return [
            problem(
                "teacher",
                "the teacher is not finite",
                "nan or inf in its attention or features",
                other,
            )
        ]
    found: list[Finding] = []
    if facts["feature_image_share"] < SAME or facts["feature_rank"] < LEAST_RANK:
        found.append(problem(
            "teacher", "images say nothing to the teacher",
            f"images make {facts['feature_image_share']:.1%} of their variance, they fill "
            f"{facts['feature_rank']} directions",
            other,
        ))  # fmt: skip
    if not guides:
        return found
    entropy = facts["attention_entropy"]
    if entropy > UNIFORM:
        found.append(problem(
            "teacher", "teacher attends to nothing",
            f"entropy of its class attention is {entropy:.4f} of the uniform map's: random weights, or the "
            f"wrong file",
            f"{other}, or --mask.rule random",
        ))  # fmt: skip
    if facts["attention_class_mass"] > GREEDY:
        found.append(warning(
            "teacher", "attention stays on the class token",
            f"{facts['attention_class_mass']:.1%} of it: what is left for patches is mostly noise",
            "another teacher, or --mask.rule random",
        ))  # fmt: skip
    if facts["attention_image_share"] < SAME:
        found.append(warning(
            "teacher", "the same attention for every image",
            f"images make {facts['attention_image_share']:.1%} of its variance, places the rest",
            "another teacher, or --mask.rule random",
        ))  # fmt: skip
    return found
