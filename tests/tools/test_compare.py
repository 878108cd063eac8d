"""One table of results: marks, seeds, rows, texts, bad files."""

import io
import json
import math
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.result import Result
from cmt_mae.tools.report.compare import CompareConfig, compare, letters, tabulate
from cmt_mae.tools.report.comparison_text import as_plain_table, footnote_lines, print_table
from cmt_mae.tools.report.gains import gain
from cmt_mae.tools.report.paper import paper_numbers

HEADLINES = {"knn": "cls/k20/top1", "linear": "top1", "coco": "box/AP", "davis": "J&F"}


def make(task="linear", value=70.0, *, name="runs/a", digest="a", seed=0, data=None, **changes):
    headline = HEADLINES.get(task, "score")
    more = changes.pop("metrics", {})
    return Result(
        task=task,
        metrics={headline: value, **more},
        protocol={"name": "mae", "headline": headline, "epochs": 90, **changes},
        backbone={"name": name, "architecture": "vit_small_patch16_224", "digest": digest * 64},
        data={"path": "data/x", "fingerprint": "f" * 64, "train": 10, "val": 4, **(data or {})},
        seed=seed,
        date="2026-01-01",
    )


def table(*results, paper=False):
    found = [(Path(f"{i}.json"), result) for i, result in enumerate(results)]
    return tabulate(found, paper_numbers() if paper else [])


def run(tmp_path, *results, **config):
    for result in results:
        result.save(tmp_path)
    return compare(CompareConfig(runs=[str(tmp_path)], **config))


SETTING = st.one_of(st.integers(0, 2), st.booleans(), st.sampled_from(["0", "1"]), st.none())
RESULT = st.builds(
    lambda task, name, seed, epochs, data, path, value: make(
        task, value, name=name, digest=name[-1], seed=seed, epochs=epochs,
        data={"fingerprint": data, "path": path},
    ),
    st.sampled_from([*HEADLINES, "a task of tomorrow"]),
    st.sampled_from(["runs/a", "runs/b"]),
    st.integers(0, 2),
    st.one_of(SETTING, st.lists(SETTING, max_size=2)),
    st.sampled_from(["e" * 64, "f" * 64, None]),
    st.sampled_from(["x", "y"]),
    st.one_of(st.floats(0, 100), st.just(math.nan)),
)  # fmt: skip


def strictly(value):
    """Equal only for equal values of equal types: True is not 1."""
    return (
        [strictly(v) for v in value] if isinstance(value, list) else (type(value).__name__, value)
    )


@given(results=st.lists(RESULT, min_size=1, max_size=12), paper=st.booleans())
@settings(max_examples=150, deadline=None)
def test_equal_marks_are_equal_protocols_on_equal_data(results, paper):
    """In every column, and for every pair of numbers; the paper's never share a mark with ours."""
    made = table(*results, paper=paper)
    for column in made.columns:
        marked: list[tuple[str, object]] = []
        for row in made.rows:
            cell = row.cells.get(column, [])
            assert len({number.mark for number in cell}) == len(cell)
            for number in cell:
                if row.group != "measured":
                    marked.append((number.mark, ("paper", number.files[0])))
                    continue
                for file in number.files:
                    result = results[int(Path(file).stem)]
                    assert result.task == column[0]
                    assert result.backbone["name"] == row.name
                    of = (strictly(result.protocol["epochs"]), result.data["fingerprint"])
                    marked.append((number.mark, str(of)))
        for mark, of in marked:
            for other_mark, other in marked:
                if isinstance(of, tuple) and isinstance(other, tuple):
                    if of != other:  # of one table there are several marks, one a set of doubts
                        assert mark != other_mark
                else:
                    assert (mark == other_mark) == (of == other)
    files = [f for row in made.rows for cell in row.cells.values() for n in cell for f in n.files]
    assert {f for f in files if f.endswith(".json")} == {f"{i}.json" for i in range(len(results))}
    explained = {mark for mark, _ in footnote_lines(made)}
    for mark in {n.mark for row in made.rows for cell in row.cells.values() for n in cell}:
        doubts = [f"†{number}" for number in mark.partition("†")[2].split(",") if number]
        assert {"Pn" if mark.startswith("P") else mark, *doubts} <= explained
    json.dumps(made.as_dict(), allow_nan=False)


def test_seeds_become_mean_and_spread(tmp_path):
    values = [70.0, 71.0, 73.0]
    content = run(
        tmp_path, *(make(value=v, seed=s) for s, v in enumerate(values)), make(seed=3, epochs=1)
    )
    first, second = content["rows"][0]["cells"]
    assert first["value"] == pytest.approx(214 / 3)
    assert first["spread"] == pytest.approx(statistics.stdev(values))
    assert (first["n"], first["seeds"], len(first["files"])) == (3, [0, 1, 2], 3)
    assert (second["n"], second["spread"], second["value"]) == (1, None, 70.0)
    assert first["mark"] != second["mark"]
    text = as_plain_table(table(*(make(value=v, seed=s) for s, v in enumerate(values))))
    assert "71.33 ± 1.53 (3 seeds) [a]" in text
    assert "sample standard deviation over seeds" in text


def test_a_metric_that_does_not_exist():
    made = table(make("coco", math.nan, seed=0), make("coco", 5.0, seed=1, epochs=1))
    assert "n/a [a]" in as_plain_table(made)
    assert made.as_dict()["rows"][0]["cells"][0]["value"] is None
    (number,) = table(make(value=math.nan), make(value=4.0, seed=1)).rows[0].cells["linear", "top1"]
    assert (number.value, number.n, number.spread) == (4.0, 1, None)


def test_student_momentum_and_equal_weights_are_told_apart():
    made = table(
        make(name="runs/a", digest="a"),
        make(name="runs/a (momentum)", digest="b"),
        make(name="./runs/a/", digest="a", seed=1),
        make(name="copy", digest="a"),
    )
    found = [(row.name, row.weights[0]) for row in made.rows]
    assert found == [("runs/a", "a"), ("runs/a (momentum)", "b"), ("copy", "a")]
    assert made.rows[0].cells["linear", "top1"][0].n == 2
    assert made.notes == ["the same weights (aaaaaaaa): runs/a, copy"]


def test_columns():
    made = table(
        make("davis", metrics={"J_mean": 1.0, "F_mean": 2.0, "J_decay": 3.0}),
        make("coco", metrics={"mask/AP": 1.0, "box/APs": 2.0}),
        make("knn", metrics={"mean/k20/top1": 1.0}),
        make("other"),
    )
    assert made.columns == [
        ("knn", "top1"), ("coco", "box/AP"), ("coco", "mask/AP"), ("davis", "J&F"), ("davis", "J_mean"),
        ("davis", "F_mean"), ("other", "score"),
    ]  # fmt: skip
    assert [letters(i) for i in (0, 25, 26, 51, 52, 701, 702)] == ["a", "z", "aa", "az", "ba", "zz", "aaa"]


def test_footnotes_say_the_protocol_and_how_others_differ():
    made = table(
        make(sizes=[224, 224], augment=True),
        make(sizes=[224, 224], augment=True, epochs=30),
        make(sizes=[224, 224], augment=True, data={"path": "y", "fingerprint": "e" * 64}),
    )
    lines = [line for line in as_plain_table(made, True).splitlines() if line.startswith("[")]
    assert lines[:3] == [
        "[a] linear probe, protocol mae; data data/x (fingerprint ffffffffffff, train 10, val 4); "
        "epochs 90, sizes 224 / 224, augment yes; headline top1; seed 0",
        "[b] linear probe, protocol mae: as [a], but epochs 30 instead of 90; seed 0",
        "[c] linear probe, protocol mae: as [a], but data y (fingerprint eeeeeeeeeeee, train 10, "
        "val 4); seed 0",
    ]
    (short, *rest) = [line for line in as_plain_table(made).splitlines() if line.startswith("[")]
    assert short == (
        "[a] linear probe, protocol mae; data data/x (fingerprint ffffffffffff, train 10, val 4); seed 0"
    )
    assert rest == lines[1:], "how a protocol differs is always said"
    made = table(make(warmup=1 / 3), make(warmup=0.33334))  # short, but two that differ are told apart
    lines = [line for line in as_plain_table(made, True).splitlines() if line.startswith("[")]
    assert "warmup 0.3333;" in lines[0]
    assert "warmup 0.33334 instead of 0.3333333333" in lines[1]


@pytest.mark.parametrize(("hits", "count"), [(0, 5), (5, 5), (3, 4), (71, 100), (12_345, 50_000)])
def test_interval_of_an_accuracy_is_scipys_wilson(hits, count):
    result = make("knn", 100 * hits / count, data={"val": count})
    ends = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert result.interval("cls/k20/top1") == pytest.approx(
        (100 * ends.low, 100 * ends.high), abs=1e-3
    )
    (number,) = table(result).rows[0].cells["knn", "top1"]
    assert number.interval == pytest.approx(list(result.interval("cls/k20/top1")))
    assert number.counted == f"{count} images"


def test_what_has_no_interval_says_how_many_images():
    assert "70.00 (4 images) [a]" in as_plain_table(table(make("coco")))
    assert make("coco").interval("box/AP") is None
    boxes = make("coco", metrics={"box/APs": 5.0})
    boxes.details["objects"] = {"": 31, "s": 2, "m": 9, "l": 20}
    assert "70.00 (4 images, 31 objects) [a]" in as_plain_table(table(boxes))
    assert boxes.over("box/APs") == "4 images, 2 objects"
    assert "70.00 [a]" in as_plain_table(table(make("other", data={"val": None})))


def videos(*values, **more):
    made = make("davis", statistics.fmean(values), data={"sequences": len(values)}, **more)
    made.details["sequences"] = [{"name": str(i), "J&F": v} for i, v in enumerate(values)]
    return made


def test_student_minus_teacher_on_what_both_have():
    """By the digest in the student's file; accuracies unpaired (400 images), videos by their differences."""
    few = {"val": 400}
    student = [
        make("knn", 60.0, data=few), make("linear", 50.0, data=few), videos(50.0, 40.0, 63.0),
        make("coco", 30.0),
    ]  # fmt: skip
    for one in student:
        one.backbone["teacher"] = {"digest": "t" * 64, "name": "big"}
    teacher = [
        make("knn", 70.0, name="dino", digest="t", data=few, size=[96, 96]),
        videos(48.0, 39.0, 60.0, name="dino", digest="t"),
        make("linear", 99.0, name="dino", digest="t", data={"fingerprint": "e" * 64}),  # other images
    ]
    other = make("knn", 10.0, name="other", digest="o", data=few)
    made = table(*student, *teacher, other)
    found = {gain.column: gain for gain in made.gains}
    assert list(found) == [("knn", "top1"), ("davis", "J&F")]
    knn = found["knn", "top1"]
    assert (knn.student, knn.teacher, knn.difference) == ("runs/a", "dino", -10.0)
    assert knn.interval == pytest.approx([-16.485, -3.39], abs=0.01)
    assert knn.differs == "size None and [96, 96]"
    jf = found["davis", "J&F"]
    ends = stats.t.interval(0.95, 2, loc=2.0, scale=stats.sem([2.0, 1.0, 3.0]))
    assert jf.interval == pytest.approx(list(ends), abs=1e-4)
    ends = stats.t.interval(0.95, 2, loc=51.0, scale=stats.sem([50.0, 40.0, 63.0]))
    assert student[2].interval("J&F") == pytest.approx(list(ends), abs=1e-4)
    assert videos(90.0, 20.0, 95.0).interval("J&F") == (0.0, 100.0)  # no share is outside
    lines = [line for line in as_plain_table(made).splitlines() if " minus its teacher " in line]
    assert lines[0] == (
        "runs/a minus its teacher dino: k-NN top-1 -10.00 (-16.49 to -3.39); size None and [96, 96]"
    )
    named = make("knn", 75.0, name="big", digest="x", data=few)  # its positions resized: other weights
    assert [gain.teacher for gain in table(student[0], named).gains] == ["big"]


@pytest.mark.parametrize(
    ("ours", "theirs", "ends"),  # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10
    [
        ((56, 70), (48, 80), (5.24, 33.39)),
        ((9, 10), (3, 10), (17.05, 80.90)),
        ((10, 10), (0, 10), (60.75, 100.0)),
    ],
)
def test_a_difference_of_accuracies_is_newcombes(ours, theirs, ends):
    sides = [[make("knn", 100 * hits / n, data={"val": n})] for hits, n in (ours, theirs)]
    _, interval = gain(*sides, "cls/k20/top1", "cls/k20/top1")
    assert interval == pytest.approx(list(ends), abs=0.01)


def test_a_difference_of_miou_has_an_interval_where_both_have():
    sides = [[make("ade20k", v, metrics={"mIoU": v})] for v in (40.0, 50.0)]
    assert gain(*sides, "mIoU", "mIoU") == (-10.0, None)
    sides[0][0].details["intervals"] = {"mIoU": [37.0, 42.0]}
    sides[1][0].details["intervals"] = {"mIoU": [46.0, 54.0]}
    assert gain(*sides, "mIoU", "mIoU")[1] == pytest.approx([-10 - 5.0, -10 + math.hypot(2, 4)])


def test_the_teacher_of_an_older_result_is_that_of_its_run(tmp_path):
    run = tmp_path / "a"
    make("knn", 60.0, name=str(run)).save(run)
    make("knn", 70.0, name="embedded", digest="t").save(run)
    (run / "run.json").write_text(json.dumps({"teacher": {"digest": "t" * 64, "name": "embedded"}}))
    content = compare(CompareConfig(runs=[str(run)]))
    (gain,) = content["student_minus_teacher"]
    assert (gain["student"], gain["teacher"], gain["difference"]) == (str(run), "embedded", -10.0)


def test_paper_rows_only_where_there_is_a_column(tmp_path, capsys):
    content = run(tmp_path, make(value=79.8), paper=True)
    assert content["columns"] == [{"task": "linear", "metric": "top1"}]
    paper = [row for row in content["rows"] if row["group"] != "measured"]
    cells = [cell for row in paper for cell in row["cells"]]
    assert len(cells) == sum(n.task == "linear" for n in paper_numbers())
    assert all(re.fullmatch(r"P[145](†\d+(,\d+)*)?", cell["mark"]) for cell in cells)
    for cell in cells:
        note = content["footnotes"][cell["mark"]]
        assert note["source"] == f"arXiv 2412.17566, table {cell['mark'][1]}"
        assert "follows MAE" in note["protocol"]["linear"]
    # a measured number equal to the paper's still has another mark
    assert content["rows"][0]["cells"][0]["mark"] == "a"
    printed = capsys.readouterr()
    assert re.search(r"79\.80 \(\d+\.\d–\d+\.\d\) \[a\]", printed.out)
    assert "CMT-MAE, 800 epochs" in printed.out
    assert "doubt: 75.7 is a ViT-S/16" in printed.out
    assert "of the paper's 162 numbers are of other columns" in printed.err
    groups = list(dict.fromkeys(row["group"] for row in paper))
    assert groups == ["paper, tables 1-3", "paper, table 4", "paper, table 5"]


def test_markdown_is_a_table_whatever_the_names(tmp_path, capsys):
    name = "runs/a|b [x](http://y) *z* <b>&amp;</b> `c` \x1b[31m\nnew"
    run(tmp_path, make(name=name), make(name="plain", digest="b"), format="markdown")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\x1b" not in out
    assert lines[2] == (
        r"| runs/a\|b \[x\](http:/y) \*z\* &lt;b&gt;&amp;amp;&lt;/b&gt; \`c\` \\x1b\[31m\\nnew "
        r"| vit_small_patch16_224 | aaaaaaaa | 70.00 (26.7–93.7) <sup>a</sup> |"
    )
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in lines[:4]]
    assert cells == [6] * 4
    assert lines[4] == ""
    assert lines[5].startswith("- <sup>a</sup> linear probe, protocol mae; data data/x")


def test_terminal_shows_names_as_they_are_and_cuts_no_number():
    results = [
        make(task, 71.25, name="[red]/x[/red] \x1b[2J", seed=s, metrics={"mask/AP": 3.0})
        for task in HEADLINES
        for s in range(2)
    ]
    made = table(*results, paper=True)
    for width in (40, 60, 80, 100, 200):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        print_table(made, console)
        text = console.file.getvalue()
        assert "…" not in text
        assert text.count("71.25 ± 0.00 (2 seeds)") == len(HEADLINES)
        assert "\x1b[2J" not in text
    assert "[red]/x[/red] \\x1b[2J" in as_plain_table(made)


@pytest.mark.parametrize(
    ("name", "start"), [("t.md", "| backbone"), ("t.json", "{"), ("t.txt", "┏")]
)
def test_out_takes_the_format_of_its_ending_and_json_is_what_is_returned(
    tmp_path, capsys, name, start
):
    content = run(tmp_path, make(), out=str(tmp_path / "sub" / name))
    written = (tmp_path / "sub" / name).read_text()
    assert written.startswith(start)
    assert not name.endswith("json") or json.loads(written) == content
    assert capsys.readouterr().out == ""


def test_runs_folders_of_runs_and_files(tmp_path):
    (tmp_path / "a").mkdir()
    make(name="a").save(tmp_path / "a")
    make("coco", name="a").save(tmp_path / "a" / "evaluations" / "coco-1x")  # its own training
    make(name="b", digest="b").save(tmp_path / "b")
    file = next((tmp_path / "b" / "results").glob("*.json"))
    runs = [str(tmp_path / "a"), str(file), str(tmp_path / "b"), str(tmp_path / "a" / "results")]
    content = compare(CompareConfig(runs=runs))
    assert [row["name"] for row in content["rows"]] == ["a", "b"]
    assert len(content["rows"][0]["cells"]) == 2
    whole = compare(CompareConfig(runs=[str(tmp_path)]))  # runs side by side
    assert [row["name"] for row in whole["rows"]] == ["a", "b"]
    assert whole["notes"] == content["notes"] == []


def test_the_newer_of_two_files_of_one_measurement(tmp_path):
    old, new = make(value=1.0), make(value=2.0)
    new.date = "2026-02-02"
    for folder, result in (("x", new), ("y", old)):
        result.save(tmp_path / folder)
    content = compare(CompareConfig(runs=[str(tmp_path / "x"), str(tmp_path / "y")]))
    (cell,) = content["rows"][0]["cells"]
    assert (cell["value"], cell["n"]) == (2.0, 1)
    assert "the newer one is shown" in content["notes"][0]


BAD = {
    "torn.json": '{"task": "knn"',
    "list.json": "[1]",
    "foreign.json": '{"name": "package"}',
    "deep.json": "[" * 100_000,
    "binary.json": b"\xff\xfe\x00",
    "kinds.json": json.dumps({**vars(make()), "metrics": [1]}),
    "seed.json": json.dumps({**vars(make()), "seed": None}),
    "word.json": json.dumps({**vars(make()), "metrics": {"top1": "high"}}),
    "more.json": json.dumps({**vars(make()), "colour": 1}),
}


@pytest.mark.parametrize("name", BAD)
def test_foreign_files_are_one_line(tmp_path, capsys, name):
    make().save(tmp_path)
    bad = tmp_path / "results" / name
    text = BAD[name]
    bad.write_bytes(text if isinstance(text, bytes) else text.encode())
    content = compare(CompareConfig(runs=[str(tmp_path)]))
    assert len(content["rows"]) == 1
    (note,) = content["notes"]
    assert note.startswith(f"left out: {bad} is not a result of cmt-mae evaluate: ")
    assert "\n" not in note
    assert f"note: {note}" in capsys.readouterr().err
    with pytest.raises(InputError, match="not a result of cmt-mae evaluate") as error:
        compare(CompareConfig(runs=[str(bad)]))  # a file that the user named must be right
    assert "\n" not in str(error.value)


def test_runs_without_results(tmp_path):
    run_dir = tmp_path / "my run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("")
    with pytest.raises(InputError, match="holds no results") as error:
        compare(CompareConfig(runs=[str(run_dir)]))
    assert f"cmt-mae evaluate linear --backbone '{run_dir}' --data DIR" in str(error.value)
    (tmp_path / "folder").mkdir()
    make().save(tmp_path / "other")
    runs = [str(tmp_path / name) for name in ("other", "my run", "folder")]
    content = compare(CompareConfig(runs=runs))
    assert len(content["rows"]) == 1
    assert "--backbone" in content["notes"][0]
    assert f"--backbone B --data DIR --out {tmp_path / 'folder'}" in content["notes"][1]
    with pytest.raises(InputError, match="no such run directory or result file"):
        compare(CompareConfig(runs=[str(tmp_path / "missing")]))
    with pytest.raises(InputError, match="needs run directories"):
        compare(CompareConfig(runs=[]))
    with pytest.raises(InputError, match="format is 'html': give one of table, markdown, json"):
        compare(CompareConfig(runs=[str(tmp_path / "other")], format="html"))
