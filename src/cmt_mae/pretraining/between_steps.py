"""What a pre-training does between its steps: k-NN and pictures, warnings, broken images, files of the student."""

from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_text
from cmt_mae.core.runs import RunDir
from cmt_mae.engine.collapse import FIX, signs
from cmt_mae.engine.processes import say, warn
from cmt_mae.engine.task import Evaluation
from cmt_mae.pretraining.student_files import as_backbone, save_student
from cmt_mae.pretraining.teacher_store import TeacherStore, teacher_store

if TYPE_CHECKING:
    from cmt_mae.pretraining.task import Pretraining

ENOUGH_SEEN = 1000
"""Images after which the share of broken ones is judged (an epoch where it is shorter)."""
Broken = dict[int, tuple[str, str]]
"""Index -> (name, reason)."""


def open_store(task: "Pretraining", run: RunDir) -> TeacherStore:
    """The teacher's outputs so far, and a line about them."""
    teacher = task.frozen_networks.teacher
    assert task.images is not None
    assert task.teacher is not None
    assert teacher is not None
    source = task.images.source
    store = teacher_store(task.config, teacher, source, task.accelerator, task.teacher)
    if run.writes:
        store.create()
    task.accelerator.wait_for_everyone()
    store.open()
    say(
        task.accelerator,
        f"the teacher's outputs of {store.pictures} pictures take {store.bytes / 1e9:.2f} GB in "
        f"{store.folder}; {store.count()} are there",
    )
    return store


def evaluate(
    task: "Pretraining", step: int, run: RunDir, *, probes: bool, draws: bool
) -> Evaluation:
    """k-NN accuracy of the student so far, and a picture of what guides the mask, where they are due."""
    metrics = {}
    if task.hooks.probe is not None and probes:
        backbone = as_backbone(task.config, task.whole_student(), task.stats)
        metrics["knn_top1"] = task.hooks.probe(backbone)
    if task.hooks.draw is not None and draws:
        student = task.whole_student()
        with task.in_one_piece(task.frozen_networks.running()):
            if run.writes:
                task.hooks.draw(task, student, step, run)
    return Evaluation(metrics)


def check(task: "Pretraining", row: dict[str, Any], run: RunDir) -> None:
    """After a line of metrics: warn of collapse, once until it is over; name broken images, and stop where there
    are too many."""
    found = {sign.split()[0]: sign for sign in signs(row)}
    new = [sign for name, sign in found.items() if name not in task.collapse]
    task.collapse = set(found)
    if new:
        text = f"signs of collapse at step {row['step']}: {', '.join(new)}: {FIX}"
        warn(task.accelerator, run, row["step"], text)
    assert task.images is not None
    name_broken_images(
        task.broken,
        task.accelerator,
        run,
        seen=min(len(task.images.source), row["step"] * task.batch_size),
        epoch=task.steps_per_epoch * task.batch_size,
        over=row["step"] == task.total_steps,
        most=task.config.data.max_bad,
    )


def publish(task: "Pretraining", step: int, run: RunDir) -> None:
    """backbone.safetensors, and that of the momentum student."""
    average = task.frozen_networks.momentum
    if average is not None:
        average = task.whole(average, average)
    student = task.whole_student()
    if run.writes:
        facts = task.facts(step)
        save_student(run.path, task.config, student, task.stats, facts, "")
        if average is not None:
            save_student(run.path, task.config, average, task.stats, facts, "_momentum")


def of_all(own: Broken, accelerator: Accelerator) -> Broken:
    """What all processes met. Called by all of them."""
    found: list[tuple[int, tuple[str, str]]] = list(own.items())
    if accelerator.num_processes > 1:
        found = gather_object(found)
    return dict(found)


def name_broken_images(
    own: Broken,
    accelerator: Accelerator,
    run: RunDir,
    *,
    seen: int,
    epoch: int,
    over: bool,
    most: float,
) -> None:
    """Name them in bad_images.txt; raise InputError where there are too many. Called by all processes.

    own: those of this process. seen: images of the data that have been read so far; epoch: of one epoch; over: the
    run ends here; most: share of ``seen`` that may be broken.
    """
    bad = of_all(own, accelerator)
    if not bad:
        return
    path = run.path / "bad_images.txt"
    if run.writes:
        lines = [f"{name}\t{reason}\n" for _, (name, reason) in sorted(bad.items())]
        write_text(path, "".join(lines))
    if seen < min(epoch, ENOUGH_SEEN) and not over:
        return  # one broken image among the first eight says nothing of the data
    if len(bad) > most * seen:
        names = ", ".join(name for name, _ in list(bad.values())[:3])
        raise InputError(
            f"{len(bad)} of {seen} images cannot be read (first: {names}), more than data.max_bad "
            f"{most}: fix or delete them, all are named in {path}"
        )
