"""The start of a student: another network's weights, and with student.preset init_from its shape too."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.backbone import network_facts
from cmt_mae.core.backbone_facts import AssumedFacts, BackboneFacts
from cmt_mae.core.checkpoint import load_last
from cmt_mae.core.errors import InputError
from cmt_mae.method.cmtmae import StudentWithDecoder
from cmt_mae.pretraining.settings import IMAGENET, PretrainConfig, Statistics


def start_name(config: PretrainConfig) -> str:
    """The network to start from: a name that ``load_backbone`` takes."""
    return config.teacher.name if config.init_from == "teacher" else config.init_from


def start_facts(config: PretrainConfig) -> BackboneFacts:
    """What is known of that network besides its file.

    A student of a preset takes the weights alone: what features depend on besides is its own. One that takes
    the network's shape too has to know it.
    """
    if config.init_from == "teacher":
        return config.teacher
    if config.student.preset == "init_from":
        return BackboneFacts()
    name, sizes = config.student.architecture()
    rows, columns = config.student.grid()
    return AssumedFacts(
        arch=name, heads=sizes["num_heads"], grid=[] if rows == columns else [rows, columns],
        mean=[0.5] * config.student.in_chans, std=[0.5] * config.student.in_chans,
    )  # fmt: skip


def take_shape(config: PretrainConfig) -> None:
    """With student.preset init_from: write into the settings the shape, patch, channels and normalisation of the
    network to start from. To be called before ``PretrainConfig.check``.

    Raises InputError where none is named, or it is no vision transformer with a class token and positions that are
    added to its patches: only of these can some patches be left out as MAE does.
    """
    if config.student.preset != "init_from" or config.student.network:
        return
    if not config.init_from:
        raise InputError("student.preset init_from: say which network, with --init_from NAME")
    name, student = start_name(config), config.student
    backbone = load_backbone(name, img_size=student.size(), facts=start_facts(config))
    vit, why = backbone.model, ""
    if not isinstance(vit, VisionTransformer) or vit.pos_embed is None:
        why = f"is a {type(vit).__name__}, whose positions are not added to its patches"
    elif vit.cls_token is None:
        why = "has no class token"
    elif isinstance(vit.norm, nn.Identity) or not isinstance(vit.patch_embed.norm, nn.Identity):
        why = "has no norm after its last block, or one in its patch embedding"
    if why:
        raise InputError(
            f"init_from {name} {why}, so it cannot be trained on some of its patches here: it can be the "
            "teacher of a student of another shape (student.preset)"
        )
    student.network = json.dumps([backbone.architecture, backbone.kwargs])
    parts: Any = vit
    student.width, student.depth = int(parts.embed_dim), len(parts.blocks)
    student.patch_size, student.in_chans = int(parts.patch_embed.patch_size[0]), len(backbone.mean)
    if not config.data.mean and not config.data.std:
        config.data.mean, config.data.std = list(backbone.mean), list(backbone.std)


def start_from(
    learner: StudentWithDecoder, config: PretrainConfig, stats: Statistics | None
) -> None:
    """Load ``init_from``: everything of a run with the same shapes, else the student alone."""
    source = start_name(config)
    state = load_last(Path(source) / "checkpoints")
    if state is not None and shapes(state["learner"]) == shapes(learner.state_dict()):
        learner.load_state_dict(state["learner"])
        data = (state.get("settings") or {}).get("data", {})
        given_there = (tuple(data["mean"]), tuple(data["std"])) if data.get("mean") else None
        warn_of_other(
            config, stats, given_there or (IMAGENET if config.student.in_chans == 3 else None)
        )
        return
    backbone = load_backbone(source, img_size=config.student.size(), facts=start_facts(config))
    theirs, mine = network_facts(backbone.model), network_facts(learner.student)
    if (theirs["heads"], theirs["activation"]) != (mine["heads"], mine["activation"]):
        raise InputError(
            f"init_from {source} computes something else than the student ({theirs}, here {mine}): "
            "choose student.heads and so on of that network"
        )
    given = backbone.model.state_dict()
    own = learner.student.state_dict()
    if shapes(given) != shapes(own):
        names = sorted(
            k
            for k in {*given, *own}
            if k not in given or k not in own or given[k].shape != own[k].shape
        )
        raise InputError(
            f"init_from {source} does not fit the student ({len(names)} tensors differ, first "
            f"{', '.join(names[:3])}): choose student.preset, patch_size and pos_embed of that network"
        )
    learner.student.load_state_dict(given)
    assumed = backbone.known_from.get("normalisation", "").startswith(AssumedFacts.prefix)
    warn_of_other(config, stats, None if assumed else (backbone.mean, backbone.std))


def warn_of_other(
    config: PretrainConfig, stats: Statistics | None, theirs: Statistics | None
) -> None:
    """One line on stderr where ``init_from`` saw images normalised in another way. theirs: None, not known."""
    if stats is None or theirs is None or os.environ.get("RANK", "0") != "0":
        return
    same = (
        round(a, 3) == round(b, 3) for i in (0, 1) for a, b in zip(stats[i], theirs[i], strict=True)
    )
    if not all(same):
        print(
            f"warning: init_from {config.init_from} was trained on images with mean {list(theirs[0])} and std "
            f"{list(theirs[1])}, here they have {list(stats[0])} and {list(stats[1])}: "
            "--data.mean and --data.std set them",
            file=sys.stderr,
        )


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
