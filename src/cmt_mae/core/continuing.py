"""Before a run goes on in its folder: what is there has to be this run, with the same settings."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmt_mae.core.checkpoint import list_checkpoints
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import same_fingerprint
from cmt_mae.core.parsing import flatten
from cmt_mae.core.recipes import read_settings

if TYPE_CHECKING:
    from cmt_mae.core.runs import RunDir


def refuse_another(run: "RunDir") -> None:
    """Raise InputError where the folder holds a run with other settings, or one that would be lost."""
    if not list_checkpoints(run.checkpoints):  # it never got anywhere: settings may change
        refuse_to_lose(run)
        return
    config = run.path / "config.yaml"
    before = read_settings(config.read_text(errors="replace"), str(config))
    refuse_changes(run.path, before, run.settings, run.resume_safe, run.defaults)


def refuse_to_lose(run: "RunDir") -> None:
    """Raise InputError where checkpoints are gone that this run has had: it would be trained anew."""
    if any(run.checkpoints.glob("step_*.pt")):  # there, without checksums: loading says so
        return
    kept = [p.name for p in sorted(run.path.glob("*.safetensors"))]
    rows = len(run.read_metrics())
    # runs of version 0.1 did not note it
    had = run.known_facts().get("has_checkpoint", bool(kept or rows))
    if had and (kept or rows):
        what = ", ".join([*kept, f"metrics.jsonl with {rows} lines"])
        raise InputError(
            f"{run.path} holds a run whose checkpoints are gone: it would be trained anew, and {what} lost; "
            "bring its folder checkpoints back, delete the run to start over, or choose another --out"
        )


def refuse_other_settings(run: "RunDir", state: dict[str, Any]) -> None:
    """Raise InputError for the state of a checkpoint that was written with other settings than this run's."""
    # those of --extend are older than the settings that config.yaml has since; version 0.1 kept none
    resume_safe = (*run.resume_safe, "epochs", "extended")
    settings = state.get("settings") or run.settings
    found = changes(settings, run.settings, resume_safe, run.defaults)
    if found:
        raise InputError(
            f"the checkpoint of step {state['step']} in {run.checkpoints} belongs to another run, "
            f"{state.get('run')}, with other settings ({'; '.join(found)}): bring this run's own back from a "
            "copy, or delete that one"
        )


def refuse_other_facts(run: Path, known: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise InputError where networks or data are not those that the run was started with.

    known: run.json of the start; facts: what it would hold now.
    """
    digests = (("backbone", "digest"), ("teacher", "digest"), ("data", "fingerprint"))
    # a run from before there were facts is compared by its digests alone
    for part, key in (*digests, ("backbone", "facts"), ("teacher", "facts")):
        old = (known.get(part) or {}).get(key)
        new = (facts.get(part) or {}).get(key)
        if old is not None and new is not None and not same_fingerprint(str(old), str(new)):
            name = (facts.get(part) or {}).get("path", part)
            raise InputError(
                f"{run} was started with another {part} ({key} {str(old)[:150]}, now "
                f"{str(new)[:150]}: {name} has changed): give that one, or another --out"
            )
    old, new = known.get("functions") or {}, facts.get("functions") or {}
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise InputError(
                f"{run} was started with {name} {old.get(name) or 'by name'}, now it is "
                f"{new.get(name) or 'by name'} (name and hash of the source): pass in the same function, or "
                "choose another --out"
            )


def refuse_changes(
    run: Path,
    before: dict[str, Any],
    now: dict[str, Any],
    resume_safe: tuple[str, ...],
    defaults: dict[str, Any] | None = None,
) -> None:
    """Raise InputError with the differences where a setting that affects results has changed."""
    found = changes(before, now, resume_safe, defaults or {})
    if found:
        raise InputError(
            f"{run} holds a run with other settings ({'; '.join(found)}): give the same settings to "
            "continue it, or another --out"
        )


def changes(
    before: dict[str, Any],
    now: dict[str, Any],
    resume_safe: tuple[str, ...],
    defaults: dict[str, Any],
) -> list[str]:
    """The settings that affect results and have changed, as "name: old -> new"."""
    old, new = {**flatten(defaults), **flatten(before)}, flatten(now)
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not key.startswith(resume_safe)
    ]
