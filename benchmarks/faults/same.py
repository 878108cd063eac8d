"""Is a run that was hurt and continued the undisturbed one, bit for bit?"""

import json
from pathlib import Path
from typing import Any

import torch

from cmt_mae.core.checkpoint import list_checkpoints, load_checkpoint

TIMED = ("images_per_second", "data_wait_share", "peak_memory_gb")
CLOCKED = ("run.lock", "run.json")  # hold dates, process numbers and the list of starts
TOLD = "warnings.jsonl"  # holds what was said of the accidents themselves


def steps_done(run: Path) -> list[int]:
    """Steps of the whole lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [json.loads(line)["step"] for line in text.split("\n") if line.endswith("}")]


def differences(whole: Path, other: Path, stopped: bool = False) -> list[str]:
    """In what a run differs from the undisturbed one: files, checkpoints bit for bit, metrics line by line.

    stopped: a polite stop writes a checkpoint of its own, so of the steps only the newest are compared.
    """
    found = []
    names, others = _names(whole), _names(other)
    if stopped:
        names, others = names - _older(whole), others - _older(other)
    if names != others:
        found.append(f"files: {sorted(names ^ others)}")
    for name in sorted(names & others):
        mine, theirs = whole / name, other / name
        if name.endswith("metrics.jsonl"):
            found += _lines_apart(mine, theirs)
        elif "/results/" in f"/{name}" and name.endswith(".json"):
            kept = [json.loads(p.read_text()) for p in (mine, theirs)]
            different = [
                k for k in kept[0] if k not in ("seconds", "date") and kept[0][k] != kept[1][k]
            ]
            found += [f"{name}: {different}"] if different else []
        elif name.endswith(".pt"):
            states = [load_checkpoint(p) for p in (mine, theirs)]
            for state in states:
                state.get("settings", {}).pop("out", None)  # where the run lies
            found += [f"{name}: {where}" for where in apart(*states)][:3]
        elif name.endswith(".sha256") or name in CLOCKED:
            continue
        elif mine.read_bytes() != theirs.read_bytes():
            found.append(f"{name}: bytes")
    return found


def _older(run: Path) -> set[str]:
    older = list_checkpoints(run / "checkpoints")[:-1]
    return {str(p.with_suffix(s).relative_to(run)) for p in older for s in (".pt", ".sha256")}


def _names(run: Path) -> set[str]:
    files = (str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())
    return {n for n in files if not n.startswith("tensorboard/") and Path(n).name != TOLD}


def _lines_apart(one: Path, two: Path) -> list[str]:
    rows = [[json.loads(line) for line in p.read_text().splitlines()] for p in (one, two)]
    plain = [[{k: v for k, v in row.items() if k not in TIMED} for row in r] for r in rows]
    if plain[0] == plain[1]:
        return []
    steps = [[row["step"] for row in r] for r in plain]
    if steps[0] != steps[1]:
        return [f"metrics.jsonl: steps {steps[1]} instead of {steps[0]}"]
    row = next(a["step"] for a, b in zip(*plain, strict=True) if a != b)
    return [f"metrics.jsonl: the line of step {row}"]


def apart(one: Any, two: Any, where: str = "") -> list[str]:
    """Places in which two states differ in type, shape or any bit."""
    if type(one) is not type(two):
        return [f"{where}: {type(one).__name__}, {type(two).__name__}"]
    if isinstance(one, dict):
        if list(map(str, one)) != list(map(str, two)):
            return [f"{where}: keys"]
        return [line for key in one for line in apart(one[key], two[key], f"{where}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [f"{where}: length"]
        pairs = enumerate(zip(one, two, strict=True))
        return [line for n, pair in pairs for line in apart(*pair, f"{where}/{n}")]
    if isinstance(one, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape
        return [] if same and one.numpy().tobytes() == two.numpy().tobytes() else [where]
    return [] if one == two else [f"{where}: {one}, {two}"]


def loads(run: Path) -> int:
    """Step of the newest checkpoint, which is loaded; -1 where there is none. Raises InputError."""
    paths = list_checkpoints(run / "checkpoints")
    return int(load_checkpoint(paths[-1])["step"]) if paths else -1
