"""What this project is made of: hashes of all pinned packages, and everybody's licence.

    python -m benchmarks.supply hashes      # constraints.txt -> constraints-hashed.txt, from the package index
    python -m benchmarks.supply licences    # metadata of the installed packages, timm -> docs/licences.md

The hashes are for Linux, x86-64, CPython 3.11, as the index states them: nothing is downloaded where the index
serves metadata apart from the files.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import timm

from cmt_mae.backbones.licences import licence_of
from cmt_mae.backbones.load import EMBEDDED
from cmt_mae.backbones.own_file import HEADER
from cmt_mae.core.recipes import load_recipes, recipe_names

REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "constraints.txt"
HASHED = REPOSITORY / "constraints-hashed.txt"
LICENCES = REPOSITORY / "docs" / "licences.md"
ORIGIN = REPOSITORY / "src" / "cmt_mae" / "tools" / "report" / "page" / "assets" / "uplot.ORIGIN.txt"

# One published teacher of every family that the recipes or the README name, by its timm name.
TEACHERS = (
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_large_patch14_clip_quickgelu_224.openai",
    "vit_base_patch16_clip_224.laion2b",
    "vit_base_patch16_siglip_224.webli",
    "vit_base_patch16_224.dino",
    "vit_base_patch14_dinov2.lvd142m",
    "vit_base_patch16_dinov3.lvd1689m",
    "vit_base_patch16_224.mae",
    "vit_huge_patch14_gap_224.in1k_ijepa",
    "beitv2_base_patch16_224.in1k_ft_in22k",
    "eva02_base_patch14_224.mim_in22k",
    "deit_tiny_patch16_224.fb_in1k",
    "deit3_base_patch16_224.fb_in1k",
    "vit_base_patch16_224.augreg_in21k",
)


def main(words: list[str]) -> int:
    """Write the file that the word names."""
    commands = {"hashes": (HASHED, hashes), "licences": (LICENCES, licences)}
    if len(words) != 1 or words[0] not in commands:
        print(__doc__, file=sys.stderr)
        return 2
    path, make = commands[words[0]]
    path.write_text(make(), encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
    return 0


def pinned() -> dict[str, str]:
    """Name -> version, as constraints.txt has them."""
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines()]
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name: version for name, version in pairs}  # noqa: C416 (pairs are lists)


def canonical(name: str) -> str:
    """A distribution's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def hashes() -> str:
    """A requirements file for ``pip install --require-hashes``, by pip's own report of what it would take."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "install", "--quiet", *options]
        subprocess.run([*command, "--report", str(report), "-r", str(CONSTRAINTS)], check=True)
        found = json.loads(report.read_text())["install"]
    sums = {
        canonical(item["metadata"]["name"]): item["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
        for item in found
    }
    lines = [
        "# Made by `python -m benchmarks.supply hashes` from constraints.txt: do not edit.",
        "# Linux, x86-64, CPython 3.11. Install: pip install --require-hashes -r constraints-hashed.txt,",
        "# then pip install --no-deps --no-build-isolation -e .",
    ]
    for name, version in pinned().items():
        lines.append(f"{name}=={version} \\\n    --hash=sha256:{sums[canonical(name)]}")
    return "\n".join(lines) + "\n"


def licences() -> str:
    """The page: libraries, and teachers."""
    lines = [
        "# Licences",
        "",
        "cmt-mae itself: Apache-2.0. Made by `python -m benchmarks.supply licences`: do not edit.",
        "",
        "## Teachers",
        "",
        "As timm states them for the weights (`timm.get_pretrained_cfg(NAME).license`); the publisher's own text",
        "is what counts. A licence may bind what is learnt from the weights: cc-by-nc-4.0 forbids commercial use,",
        "and dinov3-license has terms of its own. `cmt-mae pretrain` and `cmt-mae export` print that of",
        "the teacher in use.",
        "",
        "| teacher | licence of its weights |",
        "| --- | --- |",
        *[f"| {name} | {licence} |" for name, licence in teachers().items()],
        "",
        "## Inside the package",
        "",
        f"- {inlined()}. It draws the curves of `cmt-mae report` and stands in every page, with its licence.",
        "",
        "## Libraries",
        "",
        "Every package of constraints.txt (the tests' and the evaluations' included), as its metadata state it.",
        "",
        "| package | version | licence |",
        "| --- | --- | --- |",
        *[f"| {name} | {version} | {licence_or_kept(name)} |" for name, version in pinned().items()],
    ]
    return "\n".join(lines) + "\n"


def licence_or_kept(name: str) -> str:
    """By the metadata; of a package that is not installed here, as the page says already."""
    if installed(name) is not None:
        return licence_of(name)
    rows = re.findall(rf"^\| {re.escape(name)} \| \S+ \| (.+) \|$", LICENCES.read_text(), re.MULTILINE)
    return rows[0] if rows else "not looked up"


def inlined() -> str:
    """The charting library whose files the package holds: name, version, licence, place."""
    return ORIGIN.read_text(encoding="utf-8").splitlines()[0]


def teachers() -> dict[str, str]:
    """Name -> licence: the embedded one, those of the recipes, and one of each further family."""
    from safetensors import safe_open

    with safe_open(EMBEDDED, framework="pt") as file:
        embedded = json.loads(file.metadata()[HEADER])["licence"]
    asked = [load_recipes(name).get("teacher", {}).get("name") for name in recipe_names()]
    known = [name for name in asked if name and timm.is_model(name.split(".")[0])]
    found = {"embedded": str(embedded)}
    for name in dict.fromkeys([*TEACHERS, *known]):
        cfg = timm.get_pretrained_cfg(name)
        found[name] = (cfg.license if cfg is not None else None) or "not stated"
    return found


def installed(name: str) -> str | None:
    """Version of a distribution here; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
