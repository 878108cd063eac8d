"""Any backbone by one name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cmt_mae.backbones.backbone import Backbone
from cmt_mae.backbones.build import build
from cmt_mae.backbones.own_file import own_header, read_ours
from cmt_mae.core.backbone_facts import FACTS, BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line, printable

EMBEDDED = Path(__file__).parent.parent / "teachers" / "embedded.safetensors"
RUN_FILES = {None: "backbone.safetensors", "momentum": "backbone_momentum.safetensors"}
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
        from cmt_mae.backbones.of_timm import from_timm

        backbone = from_timm(name.removeprefix("timm:"), img_size, key, pretrained)
    elif path.is_dir():
        backbone = from_folder(path, img_size, key, given)
    else:
        backbone = from_file(path, img_size, key, given)
    if any(getattr(given, fact) for fact in FACTS):
        from cmt_mae.backbones.facts import agree

        agree(backbone, given, name, resized=img_size is not None)
    announce(backbone, name if key is None else f"{name} ({key})")
    return backbone


def from_file(
    path: Path, img_size: int | Sequence[int] | None, key: str | None, given: BackboneFacts
) -> Backbone:
    """A backbone from one file of weights."""
    own = own_header(path) if path.suffix == ".safetensors" else None
    if own is not None and key is not None:
        raise InputError(f"{path}: holds one backbone; it has no entry '{key}'")
    try:
        if own is not None:
            weights = read_ours(path, own)
        else:
            from cmt_mae.backbones.container import read_container
            from cmt_mae.backbones.facts import complete
            from cmt_mae.backbones.formats import read_foreign

            weights = complete(read_foreign(read_container(path), key), given, path)
        backbone = build(weights, img_size, str(path))
    except UNEXPECTED as error:
        # a file may hold any shapes, and a config.json beside it any values
        raise InputError(
            f"{path}: shapes or configuration are those of no network we know ({one_line(error)})"
        ) from error
    if "_clip_" in backbone.architecture:
        from cmt_mae.backbones.clip import check_tower

        check_tower(backbone.model, backbone.architecture, str(path))
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
    from cmt_mae.backbones.container import LIBRARY_FILES

    for candidate in LIBRARY_FILES:
        if (path / candidate).is_file():
            return from_file(path / candidate, img_size, key, given)
    raise InputError(f"{path}: no run directory, and none of {', '.join(LIBRARY_FILES)} in it")


_SAID: set[str] = set()


def announce(backbone: Backbone, name: str) -> None:
    """One line on stderr, once a process and name: the network and where its facts are known from."""
    facts, known = backbone.facts, backbone.known_from
    mean, std = (
        "/".join(f"{v:.3f}".rstrip("0") for v in values) for values in (backbone.mean, backbone.std)
    )
    line = (
        f"{name}: {backbone.network}, {facts['heads']} heads, {facts['activation']}, eps {facts['eps']:g} "
        f"from {known.get('network', 'its file')}; mean {mean}, std {std} from "
        f"{known.get('normalisation', 'its file')}"
    )
    if line not in _SAID and os.environ.get("RANK", "0") == "0":
        _SAID.add(line)
        print(printable(line), file=sys.stderr)
