"""What a weights file does not say: known from its kind or its shapes, else the user has to say it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from cmt_mae.backbones.backbone import Backbone, network_facts, state_digest
from cmt_mae.backbones.build import UnbuiltBackbone, patch_of, require_vit, some
from cmt_mae.backbones.clip import GELU_OR_QUICK
from cmt_mae.backbones.licences import if_published
from cmt_mae.backbones.shapes import (
    behaviour,
    fitting,
    fixed_positions,
    infer_beit,
    infer_vit,
    is_just,
    meta_model,
    native_grid,
    positions_without_prefix,
    prefix_of,
    sizes_of,
    square_grid,
    table_holds,
)
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.text import one_line

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]

# Published weights that nothing but their numbers tell from others of the same shapes.
CHECKSUMS = {
    "3ef8d710a6f50fb10290e63ceb19552c7e3390b57c555a3aaa515e209b9e4a13": "deit_tiny_patch16_224.fb_in1k"
}
DINO_FILES = {
    "dino_deitsmall16_pretrain.pth": "vit_small_patch16_224.dino",
    "dino_deitsmall8_pretrain.pth": "vit_small_patch8_224.dino",
    "dino_vitbase16_pretrain.pth": "vit_base_patch16_224.dino",
    "dino_vitbase8_pretrain.pth": "vit_base_patch8_224.dino",
}
# Families of timm whose weights all come from one project, with shapes that no other network has.
ONE_PROJECT = re.compile("siglip|dinov2|dinov3")


def complete(weights: UnbuiltBackbone, given: BackboneFacts, path: Path) -> UnbuiltBackbone:
    """The same weights with architecture, heads, grid, mean and std known.

    InputError in one line names everything that is unknown and the options that say it.
    """
    where = str(path)
    weights = replace(weights, kwargs=dict(weights.kwargs), known_from=dict(weights.known_from))
    missing = _Missing(given)
    if bool(given.mean) != bool(given.std):
        raise InputError(f"{where}: give {given.prefix}mean and {given.prefix}std together")
    if given.arch:
        require_vit(given.arch.split(".")[0], f"{given.prefix}arch")
    names = _network(weights, given, where, missing)
    _heads(weights, given, missing)
    _grid(weights, given, where, names, missing)
    _normalisation(weights, given, path, names, missing)
    missing.for_all(where, names, weights)
    return weights


class _Missing:
    """What is unknown, and the options that would say it."""

    def __init__(self, given: BackboneFacts) -> None:
        self.given, self.prefix = given.given, given.prefix if given.given else "--"
        self.unknown: list[str] = []
        self.options: list[str] = []

    def __call__(self, unknown: str, *options: str) -> None:
        self.unknown.append(unknown)
        self.options += [self.prefix + option for option in options]

    def for_all(self, where: str, names: list[str], weights: UnbuiltBackbone) -> None:
        """One InputError for all that is unknown."""
        if not self.unknown:
            return
        tagged = [t for n in names[:2] for t in timm.list_pretrained(f"{n}.*")]
        options, hint = " ".join(self.options), ""
        if weights.mean is None and tagged:
            hint = f"; {self.prefix}arch NAME alone if these are weights of timm: {some(tagged, 4)}"
        way = (
            f"add {options}; cmt-mae export with them writes a file that says it"
            if self.given
            else f"make a folder that does and give that: cmt-mae export --backbone {where} --out FOLDER {options}"
        )
        raise InputError(f"{where} does not say {', nor '.join(self.unknown)}: {way}{hint}")


def _network(
    weights: UnbuiltBackbone, given: BackboneFacts, where: str, missing: _Missing
) -> list[str]:
    """Fill in architecture and arguments; returns timm's names with just these shapes, as far as needed."""
    state = weights.state
    patch = patch_of(state, where)
    named = given.arch.split(".")[0] if given.arch else None
    if weights.architecture is not None:
        return [named] if named and is_just(state, named) else []
    channels = int(state["patch_embed.proj.weight"].shape[1])
    if named and not is_just(state, named):
        weights.architecture, weights.kwargs = named, _own_sizes(state, named, where)
        weights.known_from["network"] = f"{given.prefix}arch {named}, sizes from its shapes"
        return []
    if named:
        names, source = [named], f"{given.prefix}arch {named}"
    else:
        names = [] if weights.ask else fitting(state, patch)
        kinds = [behaviour(n) for n in names]
        if not names or any(kind != kinds[0] for kind in kinds):
            sizes_of(state, where)  # says so where these are no blocks of a ViT at all
            odd = (
                GELU_OR_QUICK
                if "norm_pre.weight" in state
                else (
                    f"{some(sorted(names, key=len), 4)} of timm have its shapes and compute different things"
                    if names
                    else "no network of timm has just its shapes; NAME: one of the same kind"
                )
            )
            missing(f"its network, activation and eps ({weights.ask or odd})", "arch NAME")
            if not names and not given.heads:
                missing.options.append(f"{missing.prefix}heads N")
            return names
        source = f"the shapes, timm's {names[0]}"
    weights.architecture = names[0]
    weights.known_from["network"] = source
    if channels != 3:
        weights.kwargs["in_chans"] = channels
    if "norm.weight" not in state and "fc_norm.weight" in state:
        weights.kwargs["global_pool"] = "avg"
    return names


def _own_sizes(state: dict[str, Tensor], name: str, where: str) -> dict[str, Any]:
    """Arguments for a network of the kind of a timm architecture with other sizes."""
    kind = type(meta_model(name, depth=1)).__name__
    if kind == "Beit":
        return infer_beit(state, where)[1]
    if kind == "VisionTransformer":
        clip = "clip" if "norm_pre.weight" in state else None
        return infer_vit(state, where, clip=clip)[1]
    return sizes_of(state, where)


def _heads(weights: UnbuiltBackbone, given: BackboneFacts, missing: _Missing) -> None:
    """Heads of networks whose sizes were read off shapes, which do not show them."""
    kwargs = weights.kwargs
    if weights.architecture is None or "num_heads" in kwargs or "embed_dim" not in kwargs:
        return
    published = weights.heads.get((kwargs["embed_dim"], kwargs["depth"]))
    if published or given.heads:
        kwargs["num_heads"] = published or given.heads
        source = "" if published else f", heads from {given.prefix}heads"
        weights.known_from["network"] = weights.known_from.get("network", "its kind") + source
    else:
        missing(f"its heads (width {kwargs['embed_dim']})", "heads N")


def _grid(
    weights: UnbuiltBackbone, given: BackboneFacts, where: str, names: list[str], missing: _Missing
) -> None:
    """Fill in img_size, and whether positions have rows for the tokens before the patches."""
    state, patch = weights.state, patch_of(weights.state, where)
    patch = patch if "patch_size" not in weights.kwargs else _pair(weights.kwargs["patch_size"])
    stated = weights.kwargs.get("img_size")
    fixed = fixed_positions(state.get("pos_embed"))
    candidates = {
        f"{given.prefix}grid": _pair(given.grid) if given.grid else None,
        weights.known_from.get("grid", "its file"): (
            (stated[0] // patch[0], stated[1] // patch[1]) if stated else None
        ),
        "its kind": square_grid(state) if weights.square else None,
        f"timm's {names[0] if names else ''}": native_grid(names[0], patch) if names else None,
        "its fixed positions": fixed[1] if fixed else None,
    }
    if given.grid and not table_holds(state, _pair(given.grid)):
        raise InputError(
            f"{where}: its positions are for another number of patches than {given.prefix}grid {given.grid}"
        )
    holding = [(s, g) for s, g in candidates.items() if g and table_holds(state, g)]
    if not holding:
        if weights.architecture is not None or "pos_embed" in state:
            missing("the grid of patches that its positions are for", "grid=[ROWS,COLUMNS]")
        return
    source, grid = holding[0]
    weights.known_from["grid"] = source
    weights.kwargs["img_size"] = (grid[0] * patch[0], grid[1] * patch[1])
    if weights.architecture is not None and "pos_embed" in state and prefix_of(state):
        model = meta_model(weights.architecture, depth=1)
        without = positions_without_prefix(state, grid)
        if bool(getattr(model, "no_embed_class", False)) != without:
            weights.kwargs["no_embed_class"] = without


def _pair(value: Any) -> tuple[int, int]:
    """Two numbers from a setting: one counts for both."""
    values = [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)]
    if len(values) not in (1, 2) or min(values) < 1:
        raise InputError(f"grid {value}: give rows and columns, both at least 1")
    return values[0], values[-1]


def _normalisation(
    weights: UnbuiltBackbone, given: BackboneFacts, path: Path, names: list[str], missing: _Missing
) -> None:
    """Fill in mean and std, and the licence of weights that are known to be published ones."""
    named = given.arch if given.arch and given.arch.split(".")[0] in names else None
    if given.mean and given.binding and weights.usual:
        weights.mean = weights.std = None
    if weights.mean is None:
        _find_normalisation(weights, given, path, names, named, missing)
    tagged = given.binding and named and "." in named and not given.mean
    if tagged and weights.mean and (weights.mean, weights.std) not in timm_normalisations(named):
        raise InputError(
            f"{path}: {given.prefix}arch {named} stands for another mean and std than "
            f"{weights.known_from.get('normalisation', 'the file')}; leave out its tag"
        )


def _find_normalisation(
    weights: UnbuiltBackbone,
    given: BackboneFacts,
    path: Path,
    names: list[str],
    named: str | None,
    missing: _Missing,
) -> None:
    """Mean and std of a file that does not say them itself. named: timm's name that was given and fits."""
    published = published_name(weights.state, path, names)
    one = names and all(ONE_PROJECT.search(n) for n in names)
    of_names = {n for name in names for n in timm_normalisations(name)}
    if published:
        (weights.mean, weights.std), *_ = timm_normalisations(published)
        weights.known_from["normalisation"] = f"timm's {published}, published as this file"
        weights.licence = weights.licence or timm_licence(published)
        weights.architecture = published.split(".")[0]
    elif given.mean:
        weights.mean, weights.std = tuple(given.mean), tuple(given.std)
        weights.known_from["normalisation"] = f"{given.prefix}mean and {given.prefix}std"
    elif named and len(timm_normalisations(named)) == 1:
        ((weights.mean, weights.std),) = timm_normalisations(named)
        weights.known_from["normalisation"] = f"timm's {named} ({given.prefix}arch)"
        weights.licence = weights.licence or if_published(timm_licence(named))
    elif one and len(of_names) == 1:
        ((weights.mean, weights.std),) = of_names
        weights.known_from["normalisation"] = f"timm's {names[0]}: all weights of this shape"
        weights.licence = weights.licence or if_published(timm_licence(names[0]))
    else:
        missing("the mean and std of its input", "mean=[R,G,B]", "std=[R,G,B]")


@cache
def timm_normalisations(name: str) -> set[Normalisation]:
    """(mean, std) of timm's weights of this name; of all its weights where the name has no tag."""
    tagged = [name] if "." in name else timm.list_pretrained(f"{name}.*")
    try:
        found = [timm.get_pretrained_cfg(one) for one in tagged]
    except RuntimeError as error:
        raise InputError(f"'{name}': {one_line(error)}") from error
    return {(tuple(c.mean), tuple(c.std)) for c in found if c is not None}


def timm_licence(name: str) -> str | None:
    """Licence that timm states for weights of this name."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg.license if cfg is not None else None


def published_name(state: dict[str, Tensor], path: Path, names: list[str]) -> str | None:
    """timm's name of published weights, by their checksum or the hash in the file's name; None: not known.

    DINO's files have no hash: their own names count, where the shapes are those of the published network.
    """
    if names and is_just(state, "deit_tiny_patch16_224"):
        found = CHECKSUMS.get(state_digest({k: v.float() for k, v in state.items()}))
        if found:
            return found
    named = DINO_FILES.get(path.name)
    if named and named.split(".")[0] in names:
        return named
    match = re.fullmatch(r"(.+)-([0-9a-f]{8,64})\.pth", path.name)
    if match and match[1] in names and checked_hash(path):
        return next(iter(timm.list_pretrained(f"{match[1]}.*")), None)
    return None


def checked_hash(path: Path) -> bool:
    """Whether a name NAME-HASH.pth, as torch.hub has them, ends in the first digits of the file's sha256."""
    match = re.fullmatch(r".+-([0-9a-f]{8,64})\.pth", path.name)
    if not match:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(match[1])


def agree(backbone: Backbone, given: BackboneFacts, where: str, resized: bool = False) -> None:
    """InputError where what is given is not what the file says. resized: its grid is no longer the file's."""
    if not given.binding:
        return
    facts = backbone.facts
    patch = backbone.model.patch_embed.patch_size  # type: ignore[union-attr]
    grid = [backbone.img_size[0] // patch[0], backbone.img_size[1] // patch[1]]  # type: ignore[index, operator]
    pairs = {
        "mean": (facts["mean"], list(given.mean), "normalisation"),
        "std": (facts["std"], list(given.std), "normalisation"),
        "heads": (facts["heads"], given.heads, "network"),
        "grid": (grid, list(_pair(given.grid)) if given.grid and not resized else None, "grid"),
    }
    if given.arch:
        timms = network_facts(meta_model(given.arch.split(".")[0], depth=1))  # type: ignore[arg-type]
        for name in ("eps", "activation"):
            pairs[f"arch {given.arch}: {name}"] = (facts[name], timms[name], "network")
    for name, (found, wanted, kind) in pairs.items():
        if wanted and found != wanted:
            source = backbone.known_from.get(kind, "its file")
            raise InputError(
                f"{where}: {given.prefix}{name} {wanted}, but {source} says {found}; leave it out, or correct that"
            )
