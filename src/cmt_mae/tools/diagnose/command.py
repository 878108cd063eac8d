"""`cmt-mae doctor`: look at everything that a run needs, and at a run; say what is wrong and how to fix it."""

import copy
import dataclasses
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import RunRecord, read_run
from cmt_mae.core.runs import plain
from cmt_mae.core.settings import CountOrNone, Positive, check_fields
from cmt_mae.data.source import Source
from cmt_mae.data.sources import open_split
from cmt_mae.method.teacher import TeacherConfig
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.start import take_shape
from cmt_mae.tools.diagnose.aim import SAMPLE, check_aim
from cmt_mae.tools.diagnose.estimate import estimate
from cmt_mae.tools.diagnose.finding import Finding, problem, warning
from cmt_mae.tools.diagnose.images import check_images
from cmt_mae.tools.diagnose.machine import check_machine
from cmt_mae.tools.diagnose.run import diagnose, skipped_steps
from cmt_mae.tools.diagnose.settings import check_pixels, check_settings
from cmt_mae.tools.diagnose.show import show
from cmt_mae.tools.diagnose.teacher import check_teacher
from cmt_mae.tools.diagnose.verdict import judge
from cmt_mae.tools.inspect.networks import read_config

UNFIT = "settings and images do not fit"
WAITING = 0.2  # share of a step spent waiting for images
ORDER = ("run", "settings", "data", "teacher", "estimate", "machine")  # of findings of one weight
FULL = 0.9  # of the memory that is free


@dataclasses.dataclass
class DoctorConfig(PretrainConfig):
    """Look at this machine, at images and teacher, at what a run will take, and at a run that does not learn.

    Without a word: the machine. With `--data`, `--teacher` or `--recipe` (and any other setting of `pretrain`):
    the images, the teacher, the settings and an estimate too. With a run directory: what is wrong with the run,
    from its files, its images and its teacher. Trains nothing and leaves nothing behind. Exit status 1 where there
    is a problem.
    """

    run: str = ""
    """A run directory to look at."""
    recipe: str = ""
    """The recipe, as in `pretrain`."""
    sample: CountOrNone = 2000
    """How many images of each split are read, drawn at random; 0: all of them."""
    images: CountOrNone = 0
    """How many images the run will have, where --data does not give them."""
    objects: str = SAMPLE
    """Images with known objects (COCO's or DAVIS's layout, or images/ and masks/; `sample`: scenes of the
    package): says whether the attention that guides the mask lies on objects; of `sample` no finding is made."""
    machine: bool = True
    """Look at the machine too (an estimate always does)."""
    estimate: bool = True
    """Measure steps and say what the run will take (with --data or --recipe, without a run directory)."""
    seconds: Positive = 15.0
    """How long each stage's step is measured, about."""

    def settings(self) -> PretrainConfig:
        """The settings of the run-to-be. Raises InputError for settings that cannot work."""
        names = [one.name for one in dataclasses.fields(PretrainConfig)]
        run = PretrainConfig(**{name: copy.deepcopy(getattr(self, name)) for name in names})
        run.out = run.out or "run"
        run.data.path = run.data.path or "synthetic images"
        take_shape(run)
        run.check()
        return run


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Look, show a report on stderr, and return it: facts by part, and the findings, problems first.

    Raises InputError where there is nothing to look at: no such run, no images, settings that cannot work.
    """
    check_fields(config)
    report: dict[str, Any] = {}
    findings: list[Finding] = []
    console = Console(stderr=True)
    run = read_run(config.run) if config.run else None
    if run is not None:
        settings = read_config(run.path)
        path, settings.runtime.device = settings.data.path, config.runtime.device
    else:
        settings, path = config.settings(), config.data.path

    def note(part: str, result: tuple[dict[str, Any], list[Finding]]) -> None:
        report[part] = result[0]
        findings.extend(result[1])

    will_run = run is None and bool(config.recipe or path)
    if config.machine or (will_run and config.estimate):
        with console.status("the machine"):
            where = str(run.path) if run else config.out
            note("machine", check_machine(settings.runtime.device, settings.precision, where))
    source = open_images(path, run is None, findings)
    planned = run or RunRecord(Path(settings.out), "planned", config=plain(settings))
    if source is not None:
        bar = settings.runtime.progress and config.runtime.progress
        note(
            "data",
            check_images(path, settings.student.in_chans, config.sample, bar, settings.data.range),
        )
        size = min(settings.student.size())
        findings.extend(check_pixels(planned, size, report["data"]["splits"]["train"]))
    named = config.teacher.name != TeacherConfig().name
    if (run or config.recipe or source or named) and settings.needs_teacher():
        with console.status("the teacher"):
            note("teacher", check_teacher(settings, source))
    guided = config.objects and "teacher" in report and settings.mask_source() != "none"
    if guided and can_run(findings):
        # of a run that has nothing to look at yet, the sample pictures say nothing either
        missing = suppress(InputError) if config.objects == SAMPLE else nullcontext()
        with console.status("the objects"), missing:
            note("aim", check_aim(settings, run.path if run else None, config.objects))
    if run is not None:
        note("run", (facts_of(run), diagnose(run)))
    elif will_run:
        note("settings", judge_settings(settings, planned, source, config.images))
        if config.estimate and can_run(findings):
            with console.status("a few steps"):
                note("estimate", judge_estimate(config, settings, source, report))
    return finish(report, findings, console)


def facts_of(run: RunRecord) -> dict[str, Any]:
    """Where the run stands, in plain numbers, and the line at the top of its report."""
    last = next((row for row in reversed(run.rows) if "loss" in row), {})
    return {
        "path": str(run.path),
        "verdict": judge(run).line,
        "step": run.last_step,
        "total_steps": run.total_steps or None,
        "state": "finished" if run.finished else "not finished",
        "losses": {
            name: round(value, 4) for name, value in last.items() if name.startswith("loss")
        },
        "knn_top1": [list(one) for one in run.knn()],
        "skipped_steps": skipped_steps(run),
        "bad_images": len(run.bad_images),
        "images_per_second": last.get("images_per_second"),
        "data_wait_share": last.get("data_wait_share"),
    }


def open_images(path: str, must: bool, findings: list[Finding]) -> Source | None:
    """The training images; None where no path is given. That an old run's are gone is a finding, not an error."""
    if not path:
        return None
    try:
        return open_split(path, "train")
    except InputError as error:
        if must:
            raise
        findings.append(
            warning(
                "data",
                "the run's images are gone",
                str(error),
                "bring them back to look at them too",
            )
        )
        return None


def judge_settings(
    settings: PretrainConfig, planned: RunRecord, source: Source | None, images: int
) -> tuple[dict[str, Any], list[Finding]]:
    """The plan of the run-to-be, and what is wrong with its settings."""
    count = len(source) if source is not None else images or 1000 * settings.batch_size
    try:
        plan = make_plan(settings, count, 1)
    except InputError as error:
        return {"error": str(error)}, [problem("settings", UNFIT, str(error), "as it says")]
    known = source is not None or images > 0
    planned.facts = {"plan": vars(plan)}
    facts = {**vars(plan), "images": count if known else None, "epochs": settings.epochs}
    return facts, check_settings(planned)


def can_run(findings: list[Finding]) -> bool:
    """Whether steps can be measured at all: the disk and the teacher are there."""
    stops = (
        "the disk cannot be written", "the teacher cannot be loaded", "the teacher is not finite", UNFIT,
    )  # fmt: skip
    return not any(one.what in stops for one in findings)


def judge_estimate(
    config: DoctorConfig, settings: PretrainConfig, source: Source | None, report: dict[str, Any]
) -> tuple[dict[str, Any], list[Finding]]:
    """What the run will take, and where this machine is too small or too slow for it."""
    images = report["settings"]["images"] or 1000 * settings.batch_size
    facts = estimate(settings, source, images, config.seconds)
    machine = report["machine"]
    found: list[Finding] = []
    fix = "a smaller --runtime.micro_batch (the result stays the same) or a smaller network"
    if "out_of_memory" in facts:
        return facts, [problem("estimate", "out of memory", facts["out_of_memory"], fix)]
    if report["settings"]["images"] is None:
        facts["seconds"] = facts["seconds_range"] = None  # the number of images is not known
    free = machine.get("gpu_memory_gb", machine["memory"]["free_gb"])
    if facts["memory_gb"] > FULL * free:
        found.append(problem(
            "estimate", "out of memory", f"a step takes {facts['memory_gb']:.1f} GB, {free:.1f} GB are there", fix
        ))  # fmt: skip
    disk = facts["checkpoint"]["disk_gb"]
    if disk > machine["disk"].get("free_gb", disk):
        found.append(problem(
            "estimate", "the disk is too small", f"the run writes {disk:.1f} GB, "
            f"{machine['disk']['free_gb']:.1f} GB are free",
            "another --out, or a smaller --runtime.keep_last",
        ))  # fmt: skip
    waits = max(one["data_wait_share"] for one in facts["stages"].values())
    if waits > WAITING:
        found.append(warning(
            "estimate", "waiting for data", f"{waits:.0%} of a step (data.workers {settings.data.workers})",
            "more --workers where there are cores, cmt-mae pack --size 256 once, or a faster disk",
        ))  # fmt: skip
    return facts, found


def finish(report: dict[str, Any], findings: list[Finding], console: Console) -> dict[str, Any]:
    """Findings into the report, likeliest causes first and none twice, and the report for people."""
    ordered = sorted(findings, key=lambda one: (one.level != "problem", ORDER.index(one.part)))
    findings = list({one.what: one for one in reversed(ordered)}.values())[::-1]
    report["findings"] = [vars(one) for one in findings]
    report["problems"] = problems = sum(one.level == "problem" for one in findings)
    report["summary"] = (
        f"{problems} problem(s), {len(findings) - problems} warning(s)"
        if findings
        else "nothing wrong found"
    )
    show(report, console)
    return report
