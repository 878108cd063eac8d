"""Pictures from files: a run's metrics, a ladder, the outputs of evaluations."""

from pathlib import Path

from cmt_mae.core.run_reader import read_metrics
from cmt_mae.data.ade20k import open_ade20k
from cmt_mae.data.coco import open_coco
from cmt_mae.data.davis import open_davis
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.pretraining.stepping import Plan, weights_at
from cmt_mae.tools.inspect.desk import Desk, NotHere
from cmt_mae.tools.inspect.networks import read_config, read_plan
from cmt_mae.tools.report.curves import curves_figure
from cmt_mae.tools.report.galleries import (
    Output,
    detections_sheet,
    outputs,
    read_detections,
    segmentations_sheet,
    strips_figure,
)
from cmt_mae.tools.report.ladder import ladder_figure, read_ladder

ALPHA_POINTS = 200
"""Of the curve of alpha."""


def curves(desk: Desk) -> None:
    """The run's metrics over epochs."""
    if not desk.config.run:
        raise NotHere("a plain backbone has no curves: give --run")
    folder = Path(desk.config.run)
    settings, plan = read_config(folder), read_plan(folder)
    rows = read_metrics(folder)
    if not rows:
        raise NotHere(f"{folder}/metrics.jsonl has no lines yet")
    per_epoch, switch = 1.0, None
    if plan is not None:
        per_epoch = plan.steps_per_epoch
        switch = plan.switch_step if 0 < plan.switch_step < plan.total_steps else None
        if settings.needs_momentum():
            rows += alpha_rows(settings, plan, rows[-1]["step"])
    title = f"{folder.name}: {max(row['step'] for row in rows)} steps"
    desk.save(curves_figure(rows, per_epoch, switch, title), "curves")


def alpha_rows(settings: PretrainConfig, plan: Plan, last: int) -> list[dict[str, float]]:
    """alpha of Eqs. 3 and 4 up to step ``last``, exact at the switch of stages between two lines of metrics."""
    steps = {round(last * part / ALPHA_POINTS) for part in range(1, ALPHA_POINTS + 1)}
    steps |= {step for step in (plan.switch_step, plan.switch_step + 1) if 0 < step <= last}
    rows = []
    for step in sorted(steps - {0}):
        alphas = weights_at(settings, plan, step - 1)  # those of the step that came last
        rows.append({"step": step, "alpha_mask": alphas.mask, "alpha_loss": alphas.loss})
    return rows


def ladder(desk: Desk) -> None:
    """Bars of a ladder.json."""
    for file in desk.config.results:
        desk.save(ladder_figure(read_ladder(Path(file))), Path(file).stem)
    if not desk.config.results:
        raise NotHere("give its file with --results docs/results/ladder.json")


def results(desk: Desk, task: str) -> list[Output]:
    """Outputs of the methods to compare, in the order given; those in the run itself by default."""
    config = desk.config
    if not config.data:
        raise NotHere("give the data set it was measured on with --data")
    folders = config.results or [config.run or config.backbone]
    return outputs(folders, task)


def davis(desk: Desk) -> None:
    """Strips of at most ``count`` videos that every method has been through."""
    methods, config = results(desk, "davis"), desk.config
    sequences = [
        sequence
        for sequence in open_davis(config.data)
        if all((m.folder / "scores" / f"{sequence.name}.json").is_file() for m in methods)
    ]
    if not sequences:
        raise NotHere("these methods have no video in common")
    for sequence in sequences[: config.count]:
        figure = strips_figure(sequence, methods, config.columns)
        desk.save(figure, f"davis_{sequence.name}")


def detections(desk: Desk) -> None:
    """COCO images: truth and each method."""
    methods = results(desk, "coco")
    ids = set().union(*(read_detections(method.folder / "predictions") for method in methods))
    split = open_coco(desk.config.data, "val")
    if ids and not ids & set(split.ids.tolist()):  # evaluated with --eval_split train
        split = open_coco(desk.config.data, "train")
    desk.save(detections_sheet(split, methods, desk.config.count).figure, "detections")


def segmentations(desk: Desk) -> None:
    """Images of ADE20K's layout: truth and each method."""
    methods = results(desk, "ade20k")
    data = open_ade20k(desk.config.data)
    desk.save(segmentations_sheet(data, methods, desk.config.count).figure, "segmentations")
