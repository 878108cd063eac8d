"""A grid: which variants an experiment compares, read from YAML (built in, or a file of one's own)."""

import itertools
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.core.recipes import MAX_BYTES, merge, read_settings, recipe_text
from cmt_mae.core.text import hint, one_line

GRID_KEYS = ("title", "recipe", "baseline", "variants", "axes", "settings", "evaluate")
VARIANT_KEYS = ("recipe", "settings", "what", "paper", "train")
# what is measured where the grid says nothing: both pools, as the loss may reach one of them alone
EVALUATE: dict[str, dict[str, Any]] = {
    "knn": {"pools": ["mean", "cls"], "k": [20]},
    "linear": {"pools": ["mean", "cls"]},
}
MAX_VARIANTS = 1000
"""A grid of more variants counts as a mistake."""


@dataclass
class Variant:
    """One row of the table."""

    name: str
    """Also part of the names of its runs' folders."""
    recipe: str
    """The method: recipes joined by commas; the scale comes after it, ``settings`` last."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Nested settings of `pretrain`."""
    what: str = ""
    """In words."""
    paper: str = ""
    """Name of the row in the paper's tables (report/paper.py), where it has one."""
    levels: dict[str, str] = field(default_factory=dict)
    """Axis -> value, for grids made of axes."""
    train: bool = True
    """False: the encoder before its first step is measured."""


@dataclass
class Experiment:
    """An experiment without its seeds, data and scale."""

    name: str
    title: str
    baseline: str
    """Name of the variant that the others are tested against."""
    variants: list[Variant]
    axes: dict[str, list[str]] = field(default_factory=dict)
    """Axis -> its values in words, the baseline's first."""
    evaluate: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Task -> its settings."""


def grid_names() -> list[str]:
    """The experiments in the package, sorted."""
    files = resources.files("cmt_mae.tools.ablate").joinpath("grids").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_grid(name: str) -> Experiment:
    """A built-in experiment, or one of a YAML file. Raises InputError with one line for what is wrong in it."""
    if name.endswith((".yaml", ".yml")):
        text, short = recipe_text(name), name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    elif name in grid_names():
        folder = resources.files("cmt_mae.tools.ablate").joinpath("grids")
        text, short = (folder / f"{name}.yaml").read_text(encoding="utf-8"), name
    else:
        raise InputError(
            f"experiment '{one_line(name, 60)}' is unknown{hint(name, grid_names())}: use "
            f"{', '.join(grid_names())}, or a .yaml file"
        )
    assert len(text) <= MAX_BYTES
    where = f"grid {one_line(name, 60)}"
    content = read_settings(text, where)
    check_keys(content, GRID_KEYS, where)
    section(content, "variants", where), section(content, "axes", where)
    if bool(content.get("variants")) == bool(content.get("axes")):
        raise InputError(f"{where}: give variants or axes, one of the two")
    base = section(content, "settings", where)
    recipe = str(content.get("recipe", "cmt"))
    axes: dict[str, list[str]] = {}
    if content.get("axes"):
        variants, axes = from_axes(content["axes"], recipe, base, where)
    else:
        variants = [
            variant(str(key), value, recipe, base, where)
            for key, value in content["variants"].items()
        ]
    baseline = str(content.get("baseline", variants[0].name))
    if baseline not in [one.name for one in variants]:
        raise InputError(
            f"{where}: baseline '{one_line(baseline, 60)}' is none of its variants "
            f"({', '.join(one.name for one in variants)})"
        )
    evaluate = section(content, "evaluate", where) or EVALUATE
    if not all(isinstance(settings, dict) for settings in evaluate.values()):
        raise InputError(f"{where}: write evaluate as 'TASK: {{setting: value}}', e.g. 'knn: {{}}'")
    return Experiment(short, str(content.get("title", short)), baseline, variants, axes, evaluate)


def check_keys(content: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise InputError for a key that a grid does not have."""
    for key in content:
        if key not in known:
            raise InputError(
                f"{where}: '{one_line(key, 60)}' is unknown{hint(key, known)}: use {', '.join(known)}"
            )


def section(content: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A part with keys of its own; empty where it is not given."""
    value = content.get(name) or {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {name} wants lines such as 'name: value'")
    return value


def variant(name: str, content: Any, recipe: str, base: dict[str, Any], where: str) -> Variant:
    """One entry of ``variants``. Its settings go over those of the whole grid."""
    if content is None:
        content = {}
    if not isinstance(content, dict) or not name_is_plain(name):
        raise InputError(
            f"{where}: variant '{one_line(name, 60)}' wants a name of letters, digits, . _ + - and lines such "
            "as 'settings: {alpha: 0.5}'"
        )
    check_keys(content, VARIANT_KEYS, f"{where}, variant {name}")
    settings: dict[str, Any] = {}
    merge(settings, base)
    merge(settings, section(content, "settings", f"{where}, variant {name}"))
    return Variant(
        name, str(content.get("recipe", recipe)), settings, str(content.get("what", "")),
        str(content.get("paper", "")), train=bool(content.get("train", True)),
    )  # fmt: skip


def from_axes(
    axes: dict[str, Any], recipe: str, base: dict[str, Any], where: str
) -> tuple[list[Variant], dict[str, list[str]]]:
    """Every combination of the axes' values; axis ``mask.rule`` sets that setting."""
    for name, values in axes.items():
        words = [word_of(value) for value in values] if isinstance(values, list) else []
        if not words or len(set(words)) < len(words) or not all(map(name_is_plain, words)):
            raise InputError(
                f"{where}: axis {one_line(name, 60)} wants a list of different plain values, e.g. [0.1, 0.3]"
            )
    combinations = list(itertools.product(*axes.values()))
    if len(combinations) > MAX_VARIANTS:
        raise InputError(f"{where} has {len(combinations)} variants: {MAX_VARIANTS} are enough")
    variants = []
    for values in combinations:
        settings: dict[str, Any] = {}
        merge(settings, base)
        for name, value in zip(axes, values, strict=True):
            merge(settings, nested(name, value))
        words = [word_of(value) for value in values]
        variants.append(
            Variant("_".join(words), recipe, settings, levels=dict(zip(axes, words, strict=True)))
        )
    return variants, {name: [word_of(value) for value in values] for name, values in axes.items()}


def nested(name: str, value: Any) -> dict[str, Any]:
    """("mask.rule", "high") -> {"mask": {"rule": "high"}}."""
    for part in reversed(name.split(".")):
        value = {part: value}
    content: dict[str, Any] = value
    return content


def word_of(value: Any) -> str:
    """A value as it stands in names: 0.3, true, all+cls."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def name_is_plain(name: str) -> bool:
    """Whether a name can be that of a folder everywhere."""
    return (
        0 < len(name) <= 60
        and name[0] not in ".-"
        and all(c.isalnum() or c in "._+-" for c in name)
    ) and name.isascii()
