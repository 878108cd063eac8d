"""Any backbone by one name."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import timm

from cmt_mae.backbones.backbone import Backbone, learned_state
from cmt_mae.backbones.build import Weights, as_backbone, build, check_size, create, require_vit
from cmt_mae.backbones.clip import check_tower, quickgelu_name
from cmt_mae.backbones.container import read_container
from cmt_mae.backbones.facts import agree, announce, complete
from cmt_mae.backbones.save import HEADER, read_ours
from cmt_mae.backbones.shapes import VIT_MODULES, pair
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

EMBEDDED = Path(__file__).parent.parent / "teachers" / "embedded.safetensors"
RUN_FILES = {None: "backbone.safetensors", "momentum": "backbone_momentum.safetensors"}
FOLDER_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
UNEXPECTED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def load_backbone(
    name: str,
    *,
    img_size: int | Sequence[int] | None = None,
    key: str | None = None,
    pretrained: bool = True,
    facts: BackboneFacts | None = None,
) -> Backbone:
    """A backbone by name, on the CPU, in float32 and eval mode.

    `name` is one of
      a run directory (`key="momentum"` takes the momentum student's weights);
      a file of ours, of MAE, DINO, iBOT / AttMask, MoCo v3, BEiT, data2vec, CLIP (OpenAI's
      archive, open_clip, Hugging Face), I-JEPA, DeiT, DINOv2, DINOv3, or any other in timm's names;
      a folder with config.json and model.safetensors (Hugging Face or timm);
      a timm name with or without tag, `timm:NAME` where a folder has the same name: weights from
      the local cache or the hub, or none with `pretrained=False` (drawn from torch's generator);
      "embedded", the package's own small teacher.
    `img_size` (one side, or height and width) brings the positions to another size by bicubic
    resizing. `key` takes another entry or prefix of a file with several, e.g. "student" of DINO's.
    `facts` (a `BackboneFacts`, or settings that are one) says what a file does not: architecture,
    heads, grid, mean and std. Nothing of these is guessed. One line on stderr says what was loaded
    and where these are known from.
    Raises InputError in one line when there is no such thing, or it is damaged, hostile, its names
    are not exactly those that its kind is known to hold, or it does not say what features depend on.
    """
    given = facts or BackboneFacts()
    path = Path(name).expanduser()
    if name == "embedded":
        if not EMBEDDED.is_file():
            raise InputError(f"{EMBEDDED}: the embedded teacher is not in this installation")
        backbone = from_file(EMBEDDED, img_size, key, given)
    elif name.startswith("timm:") or not path.exists():
        backbone = from_timm(name.removeprefix("timm:"), img_size, key, pretrained)
        agree(backbone, given, name, resized=img_size is not None)
    elif path.is_dir():
        backbone = from_folder(path, img_size, key, given)
    else:
        backbone = from_file(path, img_size, key, given)
    announce(backbone, name if key is None else f"{name} ({key})")
    return backbone


def from_file(
    path: Path, img_size: int | Sequence[int] | None, key: str | None, given: BackboneFacts
) -> Backbone:
    """A backbone from one file of weights."""
    container = read_container(path)
    if HEADER in container.metadata and key is not None:
        raise InputError(f"{path}: holds one backbone; it has no entry '{key}'")
    try:
        if HEADER in container.metadata:
            weights = read_ours(container)
        else:
            from cmt_mae.backbones.formats import (
                read_foreign,
            )  # a run with a file of ours needs none

            weights = complete(read_foreign(container, key), given, path)
        backbone = build(weights, img_size, str(path))
    except UNEXPECTED as error:
        # a file may hold any shapes, and a config.json beside it any values
        raise InputError(
            f"{path}: shapes or configuration are those of no network we know ({one_line(error)})"
        ) from error
    check_tower(backbone.model, backbone.architecture, str(path))
    agree(backbone, given, str(path), resized=img_size is not None)
    return backbone


def from_folder(
    path: Path, img_size: int | Sequence[int] | None, key: str | None, given: BackboneFacts
) -> Backbone:
    """A backbone from a run directory, or from a folder as Hugging Face and timm lay it out."""
    if (path / "config.yaml").is_file() or any((path / f).is_file() for f in RUN_FILES.values()):
        if key not in RUN_FILES:
            raise InputError(f"{path}: key '{key}' is unknown for a run; take none or 'momentum'")
        file = path / RUN_FILES[key]
        if not file.is_file():
            raise InputError(f"{path}: this run has no {file.name} yet; let it reach its end first")
        return from_file(file, img_size, None, given)
    for candidate in FOLDER_FILES:
        if (path / candidate).is_file():
            return from_file(path / candidate, img_size, key, given)
    raise InputError(f"{path}: no run directory, and none of {', '.join(FOLDER_FILES)} in it")


def from_timm(
    name: str, img_size: int | Sequence[int] | None, key: str | None, pretrained: bool
) -> Backbone:
    """A backbone by timm name, with the weights that timm has for it or with fresh ones."""
    if key is not None:
        raise InputError(f"'{name}': a timm model has one set of weights; leave out key '{key}'")
    architecture = name.split(".", 1)[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, timm.list_models(module=list(VIT_MODULES)), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise InputError(f"'{name}': no such file, run directory or timm model{hint}")
    require_vit(architecture, name)
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"'{name}': {one_line(error)}") from error
    if cfg is None:
        raise InputError(f"'{name}': timm does not say how its input is normalised")
    weights = Weights(
        state={},
        architecture=architecture,
        kwargs={"img_size": pair(cfg.input_size[1:])},
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        source=f"timm {name}",
        licence=cfg.license,
        known_from=dict.fromkeys(("network", "normalisation", "grid"), f"timm's {name}"),
    )
    return _published(name, weights, img_size) if pretrained else _fresh(name, weights, img_size)


def _published(name: str, weights: Weights, img_size: int | Sequence[int] | None) -> Backbone:
    """The weights that timm has under this name, from the cache or the hub."""
    right = quickgelu_name(name)
    if right is not None:
        raise InputError(f"'{name}': these weights need QuickGELU; take '{right}'")
    try:
        with _offline_if_unreachable():
            model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds when there is no network
        raise InputError(
            f"'{name}': no weights in the local cache and none to be had from the hub "
            f"({one_line(error)}); go online once, give a file, or take what is in the package (pretrain: "
            "--teacher embedded --recipe cmt_all,micro64)"
        ) from error
    state = {k: v.detach() for k, v in learned_state(model).items()}
    head, bias = state.pop("head.weight", None), state.pop("head.bias", None)
    state = {k: v for k, v in state.items() if not k.startswith("head")}
    if "_clip_" in name and head is not None and (bias is None or not bias.any()):
        weights = replace(weights, proj=head)  # a classifier has a bias, the projection has none
    backbone = build(replace(weights, state=state), img_size, name)
    check_tower(backbone.model, backbone.architecture, name)
    return backbone


def _fresh(name: str, weights: Weights, img_size: int | Sequence[int] | None) -> Backbone:
    """Random weights at the size asked for."""
    size = pair(weights.kwargs["img_size"] if img_size is None else img_size)
    check_size(size, (1, 1), name)
    kwargs = weights.kwargs | {"img_size": size}
    model = create(name.split(".", 1)[0], kwargs, name)
    check_size(size, pair(model.patch_embed.patch_size), name)  # type: ignore[union-attr, arg-type]
    source = f"{weights.source} (random weights)"
    return as_backbone(model, replace(weights, source=source, licence=None), kwargs, name)


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Tell the hub's client to look in its cache alone when the hub has no address here.

    Without it a machine with no network waits through a minute of retries.
    """
    from huggingface_hub import constants

    proxied = any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    before = constants.HF_HUB_OFFLINE
    if not proxied:
        try:
            socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
