"""What ran, on what, how to do it again, and how runs differ: words from config.yaml and run.json."""

import json
import shlex
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from cmt_mae.core.run_reader import RunRecord, section
from cmt_mae.core.settings import resume_safe_settings
from cmt_mae.core.text import one_line, printable

Pairs = list[tuple[str, str]]


def what_ran(record: RunRecord) -> Pairs:
    """Method, networks, images, schedule and machine of a run; only what its files say."""
    pairs = [
        ("Method", method(record)),
        ("Student", student(record)),
        ("Teacher", teacher(record)),
        ("Images", images(record)),
        ("Schedule", schedule(record)),
        ("Machine", machine(record)),
        ("Versions", versions(record)),
        ("Started", started(record)),
    ]
    return [(name, text) for name, text in pairs if text]


def method(record: RunRecord) -> str:
    """The mask, the targets, and the stages."""
    get = record.setting
    if get("mask.rule") is None:
        return ""
    ratio = get("mask.ratio")
    hidden, patches = record.plan("n_mask"), record.plan("n_patches")
    many = f"{hidden} of {patches} patches hidden" if patches else f"ratio {value(ratio)}"
    guided = get("mask.rule") not in ("random", "block", "square")
    by = f" by the attention of {networks(get('mask.source'))}" if guided else ""
    text = f"mask {value(get('mask.rule'))}{by}, {many}; predicts {networks(get('target.source'))}"
    text += f" at {value(get('target.tokens'))} tokens"
    if record.switch_step:
        text += f"; two stages, alpha {value(get('alpha'))} after step {record.switch_step}"
    return text


def networks(source: Any) -> str:
    """Words for the choices of mask.source and target.source."""
    words = {
        "teacher": "the teacher", "momentum": "the momentum student", "collab": "teacher and momentum student",
        "pixel": "pixels", "hog": "histograms of gradients",
    }  # fmt: skip
    return words.get(source, value(source)) if isinstance(source, str) else value(source)


def student(record: RunRecord) -> str:
    """Preset, size and patch."""
    get = record.setting
    if get("student.preset") is None:
        return ""
    own = [
        f"{n} {value(get(f'student.{n}'))}"
        for n in ("width", "depth", "heads")
        if get(f"student.{n}")
    ]
    size = " x ".join(map(str, _list(get("student.img_size"))))
    parts = [f"{value(get('student.preset'))}{' (' + ', '.join(own) + ')' if own else ''}"]
    parts += [f"{size} px, patch {value(get('student.patch_size'))}"]
    return ", ".join(parts)


def teacher(record: RunRecord) -> str:
    """Name, licence of its weights, digest."""
    facts = section(record.facts, "teacher")
    if not facts:
        return "none" if record.facts else ""
    parts = [one_line(facts.get("source") or facts.get("name") or "unnamed")]
    parts.append(f"licence of its weights: {one_line(facts.get('licence') or 'not stated')}")
    if facts.get("digest"):
        parts.append(f"weights {one_line(facts['digest'])[:12]}")
    return "; ".join(parts)


def images(record: RunRecord) -> str:
    """Where, how many, fingerprint."""
    data = section(record.facts, "data")
    path = data.get("path") or record.setting("data.path")
    if not path:
        return ""
    parts = [one_line(path)]
    if isinstance(data.get("images"), int):
        parts.append(f"{data['images']:,} images".replace(",", " "))
    if data.get("fingerprint"):
        parts.append(f"fingerprint {one_line(data['fingerprint'])[:12]}")
    return ", ".join(parts)


def schedule(record: RunRecord) -> str:
    """Epochs, steps, batch, learning rate, seed."""
    get = record.setting
    parts = []
    if get("epochs") is not None:
        parts.append(f"{record.number('epochs'):.4g} epochs")
    if record.total_steps:
        parts.append(f"{record.total_steps} steps of {value(get('batch_size', '?'))} images")
    peak = section(record.facts, "plan").get("lr")
    if isinstance(peak, float):
        parts.append(f"peak learning rate {peak:g}")
    if get("seed") is not None:
        parts.append(f"seed {value(get('seed'))}")
    return ", ".join(parts)


def machine(record: RunRecord) -> str:
    """Device, processor, processes."""
    hardware, placement = section(record.facts, "hardware"), section(record.facts, "placement")
    if not hardware:
        return ""
    on_gpu = placement.get("device") not in (None, "cpu")
    name = hardware.get("gpu") if on_gpu else hardware.get("processor")
    parts = [one_line(name or hardware.get("machine") or "unknown machine")]
    parts.append(
        f"{value(hardware.get('cores'))} cores, {value(hardware.get('threads'))} thread(s)"
    )
    if placement:
        parts.append(f"{value(placement.get('processes'))} process(es)")
    if record.setting("precision") is not None:
        parts.append(f"precision {value(record.setting('precision'))}")
    return ", ".join(parts)


def versions(record: RunRecord) -> str:
    """Python and the libraries."""
    found = section(record.facts, "versions")
    return ", ".join(f"{one_line(name, 40)} {one_line(text, 40)}" for name, text in found.items())


def started(record: RunRecord) -> str:
    """Date of the first start, and how often it was continued."""
    dates = [day(start.get("date")) for start in starts(record)]
    if not dates:
        return ""
    again = f"; continued {len(dates) - 1} time(s), last {dates[-1]}" if len(dates) > 1 else ""
    return f"{dates[0]}{again}"


def day(date: Any) -> str:
    """``2026-11-27T03:46:36+00:00`` -> ``2026-11-27 03:46 UTC``; anything else as it is."""
    try:
        return datetime.fromisoformat(date).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (TypeError, ValueError, OverflowError):
        return one_line(date, 40)


def starts(record: RunRecord) -> list[dict[str, Any]]:
    """The starts of run.json that can be read."""
    found = record.facts.get("starts")
    return [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []


def repeat(record: RunRecord) -> list[tuple[str, str]]:
    """(what it does, command): the settings in full, and each different command that was given."""
    placement = section(record.facts, "placement")
    processes = placement.get("processes")
    launch = "cmt-mae"
    if isinstance(processes, int) and processes > 1:
        launch = f"torchrun --nproc-per-node {processes} -m cmt_mae"
    commands = []
    if (record.path / "config.yaml").is_file():
        recipe = printable(shlex.quote(str(record.path / "config.yaml")))
        commands.append(
            (
                "The same run again, every setting as it was",
                f"{launch} pretrain --recipe {recipe} --out NEW",
            )
        )
    given: dict[str, str] = {}
    for start in starts(record):
        words = start.get("command")
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            given.setdefault(as_command(words, launch), day(start.get("date")))
    for command, date in given.items():
        commands.append((f"As it was given, {date}", command))
    return commands


def as_command(words: list[str], launch: str) -> str:
    """sys.argv as one would type it; control characters are shown, not kept."""
    first = PurePath(words[0]).name
    program = launch if first in ("__main__.py", "cmt-mae") else shlex.quote(words[0])
    return one_line(" ".join([program, *map(shlex.quote, words[1:])]), 4000)


def differences(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Settings and facts that are not the same in all runs: name, one text per run, whether it moves the result.

    Names of folders (out, the label) always differ and are left out.
    """
    from cmt_mae.pretraining.settings import PretrainConfig  # loads torch: for several runs alone

    safe = resume_safe_settings(PretrainConfig)
    names = dict.fromkeys(name for record in records for name in record.settings)
    found = []
    for name in names:
        values = [
            value(record.settings[name]) if name in record.settings else "not said"
            for record in records
        ]
        if name != "out" and len(set(values)) > 1:
            found.append(
                {
                    "name": name,
                    "values": values,
                    "matters": not name.startswith(safe),
                }
            )
    for name, of in (
        ("images (fingerprint)", lambda r: section(r.facts, "data").get("fingerprint")),
        (
            "weights of the teacher",
            lambda r: section(r.facts, "teacher").get("digest") or (r.facts and "none"),
        ),
        ("versions", versions),
        ("machine", machine),
    ):
        texts = [one_line(of(record) or "not said") for record in records]
        if len(set(texts)) > 1:
            short = [t[:12] if name not in ("versions", "machine") else t for t in texts]
            found.append({"name": name, "values": short, "matters": name != "machine"})
    return sorted(found, key=lambda row: not row["matters"])


def all_settings(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Every setting of every run."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    return [
        {
            "name": name,
            "values": [value(r.settings[name]) if name in r.settings else "" for r in records],
        }
        for name in names
    ]


def value(setting: Any) -> str:
    """A setting in words: yes and no, lists with commas, numbers without needless digits."""
    if setting is None:
        return "none"
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    if isinstance(setting, float):
        return f"{setting:.10g}"
    if isinstance(setting, list):
        return ", ".join(map(value, setting)) or "none"
    if isinstance(setting, str):
        return one_line(setting) or "none"
    return one_line(json.dumps(setting, default=str))


def _list(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]
