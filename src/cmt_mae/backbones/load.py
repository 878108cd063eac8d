"""Any backbone by one name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import timm

from cmt_mae.backbones.backbone import Backbone
from cmt_mae.backbones.build import Weights, as_backbone, build, check_size, create, one_line, pair
from cmt_mae.backbones.build import require_vit
from cmt_mae.backbones.container import read_container
from cmt_mae.backbones.formats import read_foreign
from cmt_mae.backbones.save import HEADER, read_ours
from cmt_mae.errors import InputError

EMBEDDED = Path(__file__).parent.parent / "teachers" / "embedded.safetensors"
RUN_FILES = {None: "backbone.safetensors", "momentum": "backbone_momentum.safetensors"}
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
FOLDER_FILES += ("open_clip_pytorch_model.bin",)


def load_backbone(
    name: str,
    *,
    img_size: int | Sequence[int] | None = None,
    key: str | None = None,
    pretrained: bool = True,
) -> Backbone:
    """A backbone by name, on the CPU, in float32 and eval mode.

    `name` is one of
      a run directory (`key="momentum"` takes the momentum student's weights);
      a file of ours, of MAE, DINO, iBOT / AttMask, MoCo v3, BEiT, data2vec, CLIP (OpenAI's
      archive, open_clip, Hugging Face), I-JEPA, DeiT, or any other in timm's names;
      a folder with config.json and model.safetensors (Hugging Face or timm);
      a timm name with or without tag, `timm:NAME` where a folder has the same name: weights from
      the local cache or the hub, or none with `pretrained=False` (drawn from torch's generator);
      "embedded", the package's own small teacher.
    `img_size` (one side, or height and width) brings the positions to another size by bicubic
    resizing. `key` takes another entry of a file with several, e.g. "student" of DINO's.
    Raises InputError in one line when there is no such thing, or it is damaged, hostile, or its
    keys are not exactly those its format is known to hold.
    """
    if name == "embedded":
        if not EMBEDDED.is_file():
            raise InputError(f"{EMBEDDED}: the embedded teacher is not in this installation")
        return from_file(EMBEDDED, img_size, key)
    if name.startswith("timm:"):
        return from_timm(name.removeprefix("timm:"), img_size, key, pretrained)
    path = Path(name).expanduser()
    if path.is_dir():
        return from_folder(path, img_size, key)
    if path.exists():
        return from_file(path, img_size, key)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise InputError(f"'{name}': no such file, run directory or timm model{hint}")
    return from_timm(name, img_size, key, pretrained)


def from_file(path: Path, img_size: int | Sequence[int] | None, key: str | None) -> Backbone:
    """A backbone from one file of weights."""
    container = read_container(path)
    if HEADER in container.metadata:
        if key is not None:
            raise InputError(f"{path}: holds one backbone; it has no entry '{key}'")
        weights = read_ours(container)
    else:
        weights = read_foreign(container, key, None if img_size is None else pair(img_size))
    return build(weights, img_size, str(path))


def from_folder(path: Path, img_size: int | Sequence[int] | None, key: str | None) -> Backbone:
    """A backbone from a run directory, or from a folder as Hugging Face and timm lay it out."""
    if (path / "config.yaml").is_file() or any((path / f).is_file() for f in RUN_FILES.values()):
        if key not in RUN_FILES:
            raise InputError(f"{path}: key '{key}' is unknown for a run; take none or 'momentum'")
        file = path / RUN_FILES[key]
        if not file.is_file():
            raise InputError(f"{path}: this run has no {file.name} yet; let it reach its end first")
        return from_file(file, img_size, None)
    for candidate in FOLDER_FILES:
        if (path / candidate).is_file():
            return from_file(path / candidate, img_size, key)
    raise InputError(f"{path}: neither a run directory nor a folder with {' or '.join(FOLDER_FILES)}")


def from_timm(
    name: str, img_size: int | Sequence[int] | None, key: str | None, pretrained: bool
) -> Backbone:
    """A backbone by timm name, with the weights that timm has for it or with fresh ones."""
    if key is not None:
        raise InputError(f"'{name}': a timm model has one set of weights; leave out key '{key}'")
    if not timm.is_model(name):
        raise InputError(f"timm {timm.__version__} has no model '{name}'")
    architecture = name.split(".", 1)[0]
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"'{name}': {one_line(error)}") from error
    refuse_wrong_activation(name)
    if cfg is None:
        raise InputError(f"'{name}': timm does not say how its input is normalised")
    weights = Weights(
        state={},
        architecture=architecture,
        kwargs={"img_size": pair(cfg.input_size[1:])},
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        source=f"timm {name}" + ("" if pretrained else " (random weights)"),
        licence=cfg.license,
    )
    if not pretrained:
        return _fresh(weights, img_size)
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises many kinds when there is no network
        raise InputError(
            f"'{name}': no weights; not in the local cache and not to be had from the network "
            f"({one_line(error)}); give a file instead"
        ) from error
    require_vit(model, name)
    state = {k: v.detach() for k, v in model.state_dict().items()}
    head = [state.pop(k) for k in ("head.weight", "head.bias") if k in state]
    if "_clip_" in architecture and len(head) == 2 and not head[1].any():
        weights.proj = head[0]  # a trained classifier has a bias, the projection has none
    return build(replace(weights, state=state), img_size, name)


def _fresh(weights: Weights, img_size: int | Sequence[int] | None) -> Backbone:
    """Random weights at the size asked for."""
    size = pair(weights.kwargs["img_size"] if img_size is None else img_size)
    kwargs = weights.kwargs | {"img_size": size}
    check_size(size, (1, 1), weights.source)
    model = create(weights.architecture, kwargs)
    check_size(size, pair(model.patch_embed.patch_size), weights.source)
    weights.licence = None
    return as_backbone(model, weights, kwargs)


def refuse_wrong_activation(name: str) -> None:
    """InputError for CLIP weights trained with QuickGELU under timm's name with plain GELU.

    timm lists e.g. `vit_base_patch16_clip_224.openai` beside `vit_base_patch16_clip_quickgelu_224
    .openai`: the same weights, but only the second computes what they were trained for.
    """
    architecture, _, tag = name.partition(".")
    right = architecture.replace("_clip_", "_clip_quickgelu_")
    if "quickgelu" in architecture or right == architecture or not timm.is_model(right):
        return
    if not tag:
        cfg = timm.get_pretrained_cfg(architecture)
        tag = "" if cfg is None else str(cfg.tag or "")
    if f"{right}.{tag}" in timm.list_pretrained(f"{right}.*"):
        raise InputError(f"'{name}': these weights need QuickGELU; take '{right}.{tag}'")
