"""Stage one, trained once for runs that have it in common.

Exact: before the switch of stages nothing depends on alpha, on the momentum's schedule or on where the switch
lies, so a sibling's checkpoint from there holds, bit for bit, what the run would have written itself. The run
then resumes from it as from its own.
"""

import json
from pathlib import Path

import yaml

from cmt_mae.core.checkpoint import (
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    step_of,
)
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import make_folder, write_text
from cmt_mae.core.run_reader import read_metrics
from cmt_mae.core.runs import plain
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.ablate.plan import PlannedRun, RunPlan, settings_of, stage_one_key


def borrow_stage_one(run: PlannedRun, plan: RunPlan, out: Path) -> str:
    """Begin a new run with the furthest checkpoint of a sibling's stage one; the sibling's name, or "".

    Nothing is done where the run has a checkpoint of its own, or no sibling has one common to both.
    """
    own = settings_of(run, out)
    if not own.needs_teacher() or list_checkpoints(Path(own.out) / "checkpoints"):
        return ""
    key = stage_one_key(run.settings)
    siblings = [
        settings_of(other, out)
        for other in plan.runs
        if other.name != run.name and other.train and stage_one_key(other.settings) == key
    ]
    images = len(own.data.open_train()) if siblings else 0
    common: list[tuple[int, Path]] = []
    for sibling in siblings:
        limit = min(make_plan(one, images, 1).switch_step for one in (own, sibling))
        kept = list_checkpoints(Path(sibling.out) / "checkpoints")
        common += [
            (step_of(path), Path(sibling.out)) for path in kept if 0 < step_of(path) <= limit
        ]
    for step, folder in sorted(common, reverse=True):
        if copy_start(folder, own, step):
            return folder.name
    return ""


def copy_start(sibling: Path, own: PretrainConfig, step: int) -> bool:
    """Checkpoint and lines of metrics up to ``step``; False where the sibling's is damaged or gone by now."""
    try:
        state = load_checkpoint(checkpoint_path(sibling / "checkpoints", step))
    except InputError:
        return False
    folder = Path(own.out)
    lines = [json.dumps(row) + "\n" for row in read_metrics(sibling) if row["step"] <= step]
    make_folder(folder / "checkpoints")
    # with config.yaml alone the folder counts as a run that never got anywhere: a kill here does no harm
    write_text(folder / "config.yaml", yaml.safe_dump(plain(own), sort_keys=False))
    write_text(folder / "metrics.jsonl", "".join(lines))
    # what differs does not matter before the switch; its "run" goes on saying where it came from
    save_checkpoint(folder / "checkpoints", step, {**state, "settings": plain(own)})
    return True
