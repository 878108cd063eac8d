"""A backbone by timm's name: its published weights, or fresh ones."""

from __future__ import annotations

import difflib
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlparse

import timm

from cmt_mae.backbones.backbone import Backbone, learned_state
from cmt_mae.backbones.build import (
    VIT_MODULES,
    UnbuiltBackbone,
    as_backbone,
    build,
    check_size,
    create,
    pair,
    require_vit,
)
from cmt_mae.backbones.clip import check_tower, quickgelu_name
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line


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
    weights = UnbuiltBackbone(
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


def _published(
    name: str, weights: UnbuiltBackbone, img_size: int | Sequence[int] | None
) -> Backbone:
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


def _fresh(name: str, weights: UnbuiltBackbone, img_size: int | Sequence[int] | None) -> Backbone:
    """Random weights at the wanted size."""
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
