"""The page as text: whole in itself, small, and every foreign name only ever text."""

import base64
import hashlib
import json
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import read_run
from cmt_mae.tools.diagnose.run import diagnose
from cmt_mae.tools.report.page import render
from cmt_mae.tools.report.page.command import ReportConfig, make_report
from cmt_mae.tools.report.page.pictures import chosen
from cmt_mae.tools.report.page.render import MAX_BYTES, page
from written_run import Write


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self.inside[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in self.inside:
            self.inside[str(self.cdata_elem)][-1] += data


def made(*runs: Path) -> tuple[str, Elements]:
    text = page([read_run(str(run)) for run in runs])
    return text, Elements(text)


def test_the_page_asks_nobody_for_anything(write: Write) -> None:
    _, elements = made(write(knn={0: 20.0, 100: 60.0}))
    for tag, attributes in elements.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not any("url(" in style or "@import" in style for style in elements.inside["style"])


def test_the_policy_allows_the_scripts_of_the_page_alone(write: Write) -> None:
    """The browser computes the same sums: with a wrong one, it would run nothing (test_browser.py)."""
    _, elements = made(write())
    policy = next(
        a["content"] for t, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "connect-src 'none'" in policy
    for text in elements.inside["script"][1:] + elements.inside["style"]:  # the first is JSON
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_foreign_names_are_text(hostile: Path, write: Write) -> None:
    for runs in ((hostile,), (hostile, write("b"))):
        text, elements = made(*runs)
        tags = [tag for tag, _ in elements.tags]
        assert tags.count("script") == 3
        assert "hurt=1" in text  # it is shown
        for tag, attributes in elements.tags:
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            if tag == "img":
                assert str(attributes["src"]).startswith("data:")
        data = json.loads(elements.inside["script"][0])
        assert data["runs"][0] == '<img src=x onerror="window.hurt=1">'
        assert "\u202e" not in text  # turns the direction of what follows it
        assert "{{7*7}}" in text  # no template of theirs is filled in


def test_many_large_pictures_stay_below_the_limit(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write(pictures=0)
    monkeypatch.setattr(
        render, "MAX_BYTES", 700_000
    )  # small pictures and a small limit: less to compute
    for number in range(30):
        noise = Image.effect_noise((300, 200), 120).convert("RGB")
        noise.save(run / "pictures" / f"attention_step_{number:08d}.png")
    (run / "pictures" / "broken.png").write_bytes(b"\x89PNG no picture")
    text, elements = made(run)
    assert 400_000 < len(text.encode()) < 700_000
    assert MAX_BYTES == 5_000_000
    shown = [a for t, a in elements.tags if t == "img" and a.get("alt")]
    assert len(shown) >= 6
    assert "attention, step 0" in str(shown[0]["alt"])
    assert "attention, step 29" in str(shown[-1]["alt"])  # the first, the last, and some between
    assert "picture broken.png is left out" in text
    assert "more picture(s) are in" in text


def test_several_runs_stand_side_by_side(write: Write) -> None:
    text, elements = made(
        write("a", knn={0: 20.0, 100: 60.0}), write("b", switch=100, settings={"seed": 5})
    )
    data = json.loads(elements.inside["script"][0])
    assert data["runs"] == ["a", "b"]
    assert data["switches"] == [5.0, None]
    assert {t["run"] for c in data["charts"] if c["key"] == "loss" for t in c["tables"]} == {0, 1}
    assert text.index("What differs") < text.index("What ran, on what")
    assert '<th scope="row">Images</th><td colspan="2">photos/, 640 images' in text  # said once
    assert '<th scope="row">seed</th><td>0</td><td>5</td><td>yes</td>' in text


def test_the_command_writes_it_beside_the_run(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(knn={0: 20.0, 100: 60.0})
    assert main(["report", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert Path(said["path"]) == run / "report.html"
    assert said["bytes"] == (run / "report.html").stat().st_size
    assert "a: learning: k-NN 60.0" in err
    assert main(["report", str(run)]) == 0  # over its own page


KILLED = """
import os, signal, sys
from cmt_mae.core import files
from cmt_mae.core.cli import main
left = int(sys.argv[1])
def flush(number):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
files.flush = flush
main(["report", sys.argv[2]])
"""


@pytest.mark.parametrize("moment", [1, 2])
def test_a_killed_report_leaves_a_whole_page(write: Write, moment: int) -> None:
    """1: the new page is written aside and not yet in place; 2: it is in place. Never half a page."""
    run = write()
    assert main(["report", str(run)]) == 0
    before = (run / "report.html").read_text()
    (run / "bad_images.txt").write_text("new.jpg\tbroken\n")
    done = subprocess.run([sys.executable, "-c", KILLED, str(moment), str(run)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    after = (run / "report.html").read_text()
    assert (after == before) is (moment == 1)
    assert after.rstrip().endswith("</html>")
    assert main(["report", str(run)]) == 0
    assert "new.jpg" in (run / "report.html").read_text()
    assert list(run.glob(".*.tmp")) == [], "what the killed one left aside is gone"


def test_the_findings_of_the_doctor_are_on_the_page(write: Write) -> None:
    text, _ = made(write())
    (found,) = diagnose(read_run(write("b")))
    assert found.what == "too few images"
    assert f"warning: {found.what}</strong>" in text
    assert found.fix in text


def test_a_file_that_is_no_report_is_not_written_over(write: Write, tmp_path: Path) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>my own page</p>")
    with pytest.raises(InputError, match="is no report of cmt-mae"):
        make_report(ReportConfig(runs=[str(write())], out=str(mine)))
    assert mine.read_text() == "<p>my own page</p>"


def test_reports_start_without_torch() -> None:
    """The page of one run needs none of it: seconds on a laptop."""
    modules = "cmt_mae.tools.report.page.command, cmt_mae.tools.report.page.serve"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_pictures_are_chosen_from_every_kind(write: Write) -> None:
    run = write(pictures=20)
    for name in ("growth", "heads_teacher", "curves"):
        Image.new("RGB", (40, 30)).save(run / "pictures" / f"{name}.png")
    picked = chosen(read_run(str(run)), 6)
    assert [(kind, step) for _, kind, step in picked] == [
        ("attention", 50), ("attention", 56), ("attention", 63), ("attention", 69),
        ("growth", None), ("heads_teacher", None),
    ]  # fmt: skip
    text, _ = made(run)
    assert 'alt="heads teacher. The attention of each head by itself."' in text
