"""Where a training evaluation lives, and what is said when nothing tells."""

from pathlib import Path

import pytest

from cmt_mae.core.errors import InputError
from cmt_mae.engine.task_settings import TaskSettings


def test_it_lives_where_asked_else_inside_the_backbones_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    run = str(tmp_path)
    place = TaskSettings(backbone=run, data="d").run_directory("coco", "1x")
    assert place == tmp_path / "evaluations" / "coco-1x"
    place = TaskSettings(backbone=run, data="d", key="momentum").run_directory("coco", "1x")
    assert place == tmp_path / "evaluations" / "coco-1x-momentum"
    assert TaskSettings(backbone="b", data="d", out="o").run_directory("coco", "1x") == Path("o")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "d"}, "no backbone"),
        ({"backbone": "b"}, "no data"),
        ({"backbone": "embedded", "data": "d"}, "give --out"),
        ({"backbone": "runs/nope", "data": "d"}, "no such run directory or file"),
        ({"backbone": "b", "data": "d", "out": "o", "log_every": 0}, "log_every"),
        ({"backbone": "b", "data": "d", "out": "o", "micro_batch": -1}, "micro_batch"),
    ],
)
def test_what_is_missing_or_impossible_is_told(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TaskSettings(**settings).run_directory("coco", "1x")  # type: ignore[arg-type]
