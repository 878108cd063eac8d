"""Run directories as they are found: whole, damaged, foreign."""

import os
from pathlib import Path

import pytest

from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import labels_of, read_run
from cmt_mae.tools.report.page import facts
from cmt_mae.tools.report.page.cost import cost
from written_run import Write


def test_what_is_no_run_is_told_in_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError) as told:
            read_run(str(path))
        assert "\n" not in str(told.value)


def test_damaged_files_are_named_and_the_rest_is_read(write: Write) -> None:
    run = write(knn={100: 50.0})
    (run / "config.yaml").write_text("a: [1\n")
    (run / "run.json").write_text("[]")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "lo')
    record = read_run(str(run))
    assert len(record.problems) == 2
    assert record.problems[0].startswith("config.yaml is no valid YAML")
    assert record.problems[1] == "run.json is damaged and left out"
    assert record.last_step == 100
    assert record.knn() == [(100, 50.0)]


def test_hostile_numbers_are_none(write: Write) -> None:
    run = write(done=0)
    big = "9" * 400
    (run / "metrics.jsonl").write_text(
        f'{{"step": 1, "loss": {big}}}\n{{"step": {big}, "loss": 1}}\n{{"step": -4}}\n'
        '{"step": 2, "loss": Infinity}\n'
        '{"step": true, "loss": 1}\n{"step": 3, "loss": {"a": 1}, "x": "text", "y": true}\n'
    )
    rows = read_run(str(run)).rows
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row.get("loss", 0) != row.get("loss", 0) for row in rows[:2])  # nan
    assert rows[2] == {"step": 3}


def test_links_out_of_the_run_are_not_followed(write: Write) -> None:
    run, other = write(), write("other")
    picture = run / "pictures" / "linked.png"
    picture.symlink_to(other / "pictures" / "attention_step_00000050.png")
    (run / "bad_images.txt").symlink_to("/etc/passwd")
    record = read_run(str(run))
    assert [p.name for p in record.pictures] == ["attention_step_00000050.png"]
    assert record.bad_images == []
    assert record.problems == [
        "bad_images.txt cannot be read: no regular file of this run",
        "1 picture(s) lead out of the run: left out",
    ]


def test_a_pipe_is_not_waited_for(write: Write) -> None:
    run = write()
    for name in ("run.json", "metrics.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)
    assert len(read_run(str(run)).problems) == 2


def test_labels_are_short_and_different() -> None:
    assert labels_of(["runs/a", "runs/b/"]) == ["a", "b"]
    assert labels_of(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert labels_of(["x/run", "x/run"])[1].endswith("(2)")


def test_what_differs(write: Write) -> None:
    one = write("a")
    two = write("b", settings={"seed": 1, "out": "runs/b", "runtime": {"log_every": 5}})
    records = [read_run(str(run)) for run in (one, two)]
    rows = {row["name"]: row for row in facts.differences(records)}
    assert set(rows) == {"seed", "runtime.log_every", "runtime.probe_data"}
    assert rows["seed"]["values"] == ["0", "1"]
    assert rows["seed"]["matters"]
    assert not rows["runtime.log_every"]["matters"]
    assert rows["runtime.probe_data"]["values"] == ["labelled/", "not said"]


def test_the_command_is_given_as_one_would_type_it(write: Write) -> None:
    run = write(more_facts={"placement": {"processes": 2}})
    (_, full), (_, given) = facts.repeat(read_run(str(run)))
    assert (
        full
        == f"torchrun --nproc-per-node 2 -m cmt_mae pretrain --recipe {run}/config.yaml --out NEW"
    )
    assert given == "torchrun --nproc-per-node 2 -m cmt_mae pretrain --data 'my photos/'"


def test_cost_by_hand(write: Write) -> None:
    """50 steps of 64 images at 100 a second, 50 at 50: 32 + 64 s."""
    run = write(lines=lambda _: {"gpu_joules": 360_000.0})
    said = dict(cost(read_run(str(run))))
    assert said["Images per second"] == "100 in stage one, 50 in stage two (medians)"
    assert said["Time"].startswith("96 s")
    assert said["Energy"].startswith("1 kWh")  # ten lines of 0.1 kWh


def test_nothing_is_said_of_what_was_not_measured(write: Write) -> None:
    said = dict(cost(read_run(str(write()))))
    assert "Energy" not in said
