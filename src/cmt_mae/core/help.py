"""What ``--help`` and ``--help-all`` print: names, meanings and defaults come from the settings dataclasses."""

import ast
import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from functools import cache
from textwrap import dedent
from typing import Annotated, Any, Literal

from cmt_mae.core.parsing import as_word
from cmt_mae.core.recipes import head_comment, recipe_names, recipe_text
from cmt_mae.core.settings import default_of, walk

LEFT = 26  # columns of the options' names
VALUES = {
    "recipe": "NAME[,NAME]", "data": "PATH", "data_root": "PATH", "out": "PATH", "teacher": "NAME",
    "backbone": "NAME", "probe_data": "PATH", "init_from": "NAME", "images": "PATH", "run": "RUN",
}  # fmt: skip
"""Word for the value of an option in its help; for the other options it follows from the type."""
PRETRAIN_FIRST = (
    "recipe", "data", "teacher", "out", "epochs", "batch_size", "student.preset", "student.img_size", "mask.rule",
    "alpha", "probe_data", "init_from", "device", "seed",
)  # fmt: skip
TRAIN_FIRST = (
    "backbone", "data", "out", "preset", "epochs", "iterations", "batch_size", "blr", "lr", "size", "crop_size",
    "few_shot", "classes", "key", "seed", "device", "micro_batch", "json",
)  # fmt: skip
NEEDED = "--backbone NAME --data PATH"
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pretrain": ("--recipe METHOD,SCALE --data PATH --out PATH", PRETRAIN_FIRST),
    "pack": ("--data PATH --out PATH", ()),
    "export": ("--backbone NAME --out PATH", ()),
    "embed": ("--backbone NAME --images DIR --out FILE.npz",
     ("backbone", "images", "out", "patches", "key", "size", "arch", "mean", "std", "heads", "range", "device",
      "json")),
    "demo": ("[--data PATH]", ()),
    "compare": ("RUN ...", ()),
    "report": ("RUN ...", ()),
    "watch": ("RUN", ()),
    "bench": ("--recipe METHOD,SCALE",
     ("recipe", "data", "teacher", "out", "images", "rounds", "steps", "stages", "peak", "device", "json")),
    "explain": ("--run RUN --images PATH ...",
     ("run", "backbone", "images", "what", "out", "count", "checkpoints", "size", "teacher", "rule", "alpha",
      "data", "formats", "json")),
    "ablate": ("EXPERIMENT", ()),
    "doctor": ("[RUN] [--recipe METHOD,SCALE --data PATH]",
     ("recipe", "data", "teacher", "run", "sample", "images", "machine", "estimate", "seconds", "device",
      "json")),
    "app": ("[RUN ...]", ()),
    "evaluate knn": (NEEDED,
     ("backbone", "data", "out", "k", "temperature", "pools", "size", "key", "val_share", "device",
      "batch_size", "cache", "json")),
    "evaluate linear": (NEEDED,
     ("backbone", "data", "out", "protocol", "pools", "epochs", "blr", "augment", "size", "key", "val_share",
      "device", "cache", "json")),
    "evaluate finetune": (NEEDED, TRAIN_FIRST),
    "evaluate coco": (NEEDED, TRAIN_FIRST),
    "evaluate ade20k": (NEEDED, TRAIN_FIRST),
    "evaluate davis": (NEEDED,
     ("backbone", "data", "out", "protocol", "sequences", "key", "size", "topk", "pictures", "compare",
      "device", "json")),
    "evaluate all": ("--backbone NAME --data-root PATH",
     ("backbone", "data_root", "out", "tasks", "preset", "key", "device", "json")),
}  # fmt: skip
"""Command -> how it is called; the options of --help (none: all), the others being under --help-all."""
USAGE = """usage: cmt-mae COMMAND [options]      (cmt-mae COMMAND --help shows them)

  pretrain         pre-train a backbone: --recipe R --data D --out O; the same command again continues
  evaluate TASK    knn | linear | finetune | coco | ade20k | davis: --backbone B --data D [--out O] [--json]
  evaluate all     every task that the data below a folder allow: --backbone B --data-root ROOT
  compare RUN ...  one table of the results of runs [--paper] [--format markdown | json]
  explain          pictures of attention, masks, features, predictions, curves: --run R --images DIR
  report RUN ...   one HTML page of a run, or of several side by side [--out FILE]
  watch RUN        the same page live, on this machine only [--port N] [--open]
  export           write a backbone as timm, hf or torch
  embed            features of all images of a folder: --backbone B --images DIR --out F.npz | .parquet | .csv
  pack             pack images into a memory-mapped array for fast epochs
  bench            images/s, MFU and memory of a step: --recipe R
  ablate WHAT      a grid of runs x seeds and its table: components | alpha | masks | FILE.yaml ...
  doctor [RUN]     machine, images, teacher, what a run will take; why a run does not learn [--json]
  app [RUN ...]    look at attention, masks and features by hand, in the browser (extra `app`)
  recipes [NAME]   list recipes, or show one
  demo             a small two-stage run on sample images (or --data D), compared with MAE

--debug (or CMT_MAE_DEBUG=1) shows the traceback of an error. Exit status: 0 done, 2 bad input, 75 stopped with a
checkpoint, 130 interrupted, 1 a fault of cmt-mae itself, or problems that doctor found."""


def help_page(command: str, settings: type, everything: bool, short: Mapping[str, str]) -> str:
    """The text of ``cmt-mae COMMAND --help``, or of --help-all.

    short: short name -> dotted name, of commands that take a recipe; of others nothing.
    """
    extra = {"json": "Print the outcome as one JSON object, the last line of stdout."}
    if command.startswith("evaluate "):
        extra["protocols"] = "Say every setting of the protocol under the table, not only its name."
    if short:
        names = ", ".join(recipe_names())
        extra["recipe"] = (
            "Settings to start from; several are joined by commas and later ones win, such as a method and a "
            f"scale: cmt_all,micro64. One of {names}, or a YAML file. `cmt-mae recipes NAME` shows one."
        )
    form, first = PAGES[command]
    return show_help(
        f"cmt-mae {command} {form} [options]",
        settings,
        short=short,
        first=() if everything else first,
        extra=extra,
        default="without a recipe" if command == "pretrain" else "default",
    )


def show_recipes(words: list[str]) -> None:
    """All recipes with the first line of their head comment, or the text of one."""
    if words and words[0] not in ("-h", "--help"):
        print(recipe_text(words[0]), end="")
        return
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {head_comment(name).splitlines()[0]}")


def show_help(
    usage: str,
    settings: type,
    *,
    short: Mapping[str, str],
    first: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
    default: str = "default",
) -> str:
    """The page of a command.

    usage: the line after "usage: ". short: short name -> dotted name. first: the options of the first page, by
    their short names; none: all. extra: options that are no settings -> meaning. default: how a default is
    called.
    """
    names = {name: alias for alias, name in short.items()}
    rows = {
        " ".join(["--" + name, *([VALUES[name]] if name in VALUES else [])]): text
        for name, text in (extra or {}).items()
        if not first or name in first
    }
    for name, kind, one in walk(settings):
        shown = names.get(name, name)
        if is_dataclass(kind) or (first and shown not in first):
            continue
        holder, _, last = name.rpartition(".")
        owner = kind_of_section(settings, holder)
        value = default_of(one)
        told = "" if value in (MISSING, None, "", [], ()) else f" ({default}: {as_word(value)})"
        rows[f"--{shown} {value_word(shown, kind)}"] = docs_of(owner).get(last, "") + told
    order = {f"--{name}": place for place, name in enumerate(first or ["recipe"])}
    others = len(order)
    order["--json"] = others + 1
    rows = dict(sorted(rows.items(), key=lambda row: order.get(row[0].split()[0], others)))
    width = min(120, shutil.get_terminal_size().columns)
    lines = [f"usage: {usage}", "", *textwrap.wrap(summary(settings), width), ""]
    for name, text in rows.items():
        block = textwrap.wrap(text, width - LEFT - 2) or [""]
        if len(name) >= LEFT:
            lines.append(f"  {name}")
        else:
            block[0] = f"  {name:{LEFT}}{block[0]}"
            lines.append(block.pop(0))
        lines += [" " * (LEFT + 2) + line for line in block]
    if first:
        lines += ["", "More settings: --help-all"]
    return "\n".join(lines)


def list_settings(settings: Any) -> str:
    """Name, value and meaning of every setting, one a paragraph, for ``help()`` in Python."""
    lines = []
    for name, kind, one in walk(settings):
        if not is_dataclass(kind):
            holder, _, last = name.rpartition(".")
            text = docs_of(kind_of_section(settings, holder)).get(last, "")
            value = default_of(one)
            told = "" if value is MISSING else f" = {value!r}"
            lines += [
                f"    {name}{told}",
                *textwrap.wrap(text, 92, initial_indent=" " * 8, subsequent_indent=" " * 8),
            ]
    return "\n".join(lines)


@cache
def docs_of(settings: Any) -> dict[str, str]:
    """Field -> the docstring below it, on one line; of inherited fields too."""
    found: dict[str, str] = {}
    for kind in reversed(settings.__mro__):
        if not is_dataclass(kind):
            continue
        (body,) = ast.parse(dedent(inspect.getsource(typing.cast(type, kind)))).body
        assert isinstance(body, ast.ClassDef)
        for here, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(here, ast.AnnAssign) and isinstance(after, ast.Expr):
                text = ast.literal_eval(after.value)
                found[ast.unparse(here.target)] = " ".join(text.split())
    return found


def summary(settings: type) -> str:
    """The docstring of a settings dataclass on one line."""
    return " ".join((inspect.getdoc(settings) or "").split())


def kind_of_section(settings: type, holder: str) -> type:
    """The dataclass below a dotted name."""
    kinds = {name: kind for name, kind, _ in walk(settings)}
    return typing.cast(type, kinds[holder]) if holder else settings


def value_word(name: str, kind: Any) -> str:
    """E.g. N for a whole number, PATH, A|B for two words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return value_word(name, parts[0])
    if origin is Literal:
        words = "|".join(map(str, parts))
        return words if len(words) <= LEFT else "WORD"
    if origin in (list, tuple):
        word = value_word(name, parts[0])
        return (
            f"[{word},...]"
            if origin is list or parts[-1] is Ellipsis
            else f"[{','.join([word] * len(parts))}]"
        )
    if parts:
        return "|".join(value_word(name, part) for part in parts if part is not type(None))
    return {int: "N", float: "X", bool: "true|false"}.get(kind, VALUES.get(name, "TEXT"))
