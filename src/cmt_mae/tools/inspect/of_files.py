"""Pictures from files: a run's metrics, a ladder, the outputs of evaluations."""

from pathlib import Path

from cmt_mae.core.run_reader import is_run, read_run
from cmt_mae.data.ade20k import open_ade20k
from cmt_mae.data.coco import open_coco
from cmt_mae.data.davis import open_davis
from cmt_mae.tools.inspect.curves import curves_figure
from cmt_mae.tools.inspect.desk import Desk, NotHere
from cmt_mae.tools.inspect.galleries import (
    Output,
    detections_sheet,
    outputs,
    read_detections,
    segmentations_sheet,
    strips_figure,
)
from cmt_mae.tools.inspect.ladder import ladder_figure, read_ladder


def curves(desk: Desk) -> None:
    """The run's metrics over epochs."""
    if not desk.config.run:
        raise NotHere("a plain backbone has no curves: give --run")
    run = read_run(desk.config.run)
    if not run.rows:
        raise NotHere(f"{run.path}/metrics.jsonl has no lines yet")
    desk.save(curves_figure(run, f"{run.label}: {run.last_step} steps"), "curves")


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
    folder = methods[0].folder
    settings = read_run(folder).config if is_run(folder) else {}
    data = open_ade20k(desk.config.data, settings.get("classes"), settings.get("zero_label"))
    desk.save(segmentations_sheet(data, methods, desk.config.count).figure, "segmentations")
