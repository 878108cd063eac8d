"""Can a guided mask do anything? Whether the map that guides it lies on objects, where these are known."""

import tempfile
from pathlib import Path
from typing import Any

from cmt_mae.core.errors import InputError
from cmt_mae.data.sample import write_coco
from cmt_mae.method.cmtmae import Alphas
from cmt_mae.method.masking import GUIDED
from cmt_mae.method.vit import build_student
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.diagnose.finding import Finding, warning
from cmt_mae.tools.inspect.aim import aims_of, better, read_objects, verdict
from cmt_mae.tools.inspect.networks import Networks, Run

IMAGES = 100
"""Looked at, at most."""
SAMPLE = "sample"


def check_aim(
    settings: PretrainConfig, run: Path | None, objects: str
) -> tuple[dict[str, Any], list[Finding]]:
    """How well the maps of a run (or, before its first step, of the teacher) find objects; a warning where not.

    objects: a folder in COCO's or DAVIS's layout or with images/ and masks/; "sample": scenes of the package.
    Raises InputError where there are no objects to look for.
    """
    if settings.mask.rule not in GUIDED:
        return {"verdict": f"mask rule {settings.mask.rule} is not guided"}, []
    networks = Run(run).at() if run is not None else untrained(settings)
    with tempfile.TemporaryDirectory(prefix="cmt-mae-doctor-") as folder:
        if objects == SAMPLE:
            write_coco(folder, 1, 20)
        aims = aims_of(networks, read_objects(folder if objects == SAMPLE else objects, IMAGES))
    works, line = verdict(aims)
    facts = {
        "objects": objects,
        "works": works,
        "verdict": line,
        "maps": {
            aim.name: {
                "auc": round(aim.auc, 4),
                "error": round(aim.error, 4),
                "hidden_more": aim.hidden_more,
            }
            for aim in aims
        },
    }
    if works or objects == SAMPLE:  # the run's own images may be quite unlike the sample
        return facts, []
    best = better(aims)
    other = (
        "" if best is None else f"; {best.name} has AUC {best.auc:.3f}: --teacher.attention_block"
    )
    fix = f"a teacher that sees the images larger (--teacher.view photo){other}, or --mask.rule random"
    return facts, [warning("teacher", "the mask does not see objects", line, fix)]


def untrained(settings: PretrainConfig) -> Networks:
    """The run's teacher beside a student before its first step. Raises InputError where there is no teacher."""
    channels = settings.student.in_chans
    stats = assembly.IMAGENET if channels == 3 else ((0.5,) * channels, (0.25,) * channels)
    teacher, _ = assembly.build_teacher(settings, stats)
    if teacher is None:
        raise InputError(
            "--objects needs a teacher whose attention guides the mask: name one with --teacher"
        )
    return Networks(
        name="before the first step", student=build_student(settings.student).eval(), momentum=False,
        teacher=teacher, learner=None, config=settings, weights=Alphas(0.0, 0.0), stats=stats, step=0,
    )  # fmt: skip
