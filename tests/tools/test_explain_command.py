"""`cmt-mae explain`: which pictures come out of what, in every format; one line for what cannot be."""

import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.tools.inspect import canvas
from cmt_mae.tools.inspect.command import explain
from cmt_mae.tools.inspect.images import Album
from cmt_mae.tools.inspect.settings import ExplainConfig


def names(folder: Path) -> set[str]:
    """Of the files in it."""
    return {path.name for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few dots an inch, for speed."""
    monkeypatch.setattr(canvas, "DPI", 50)


def test_a_run_of_two_stages(
    cmt_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, all that is made without asking; SVG on request; files that can be opened."""
    words = ["explain", "--run", str(cmt_run), "--images", str(photos), "--out", str(tmp_path)]
    words += ["--formats=png,svg"]
    assert main([*words, "--count", "2", "--columns", "3", "--progress=false"]) == 0
    made = {
        "attention",
        "heads_teacher",
        "heads_student",
        "growth",
        "masks",
        "features",
        "predictions",
    }
    made |= {"neighbours_teacher", "neighbours_student"}
    assert names(tmp_path) == {f"{name}.{ending}" for name in made for ending in ("png", "svg")}
    for name in made:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert 100 < image.width <= 350
            assert image.convert("L").getextrema()[0] < 60  # ink
        root = ET.parse(tmp_path / f"{name}.svg").getroot()
        assert float(root.attrib["width"].removesuffix("pt")) <= 7.1 * 72
    said = capsys.readouterr().err
    assert "left out reconstruction: this run predicts no pixels" in said
    size = sum(path.stat().st_size for path in tmp_path.iterdir()) / 1e6
    assert f"wrote 18 pictures, {size:.1f} MB, in {tmp_path}: attention.png, attention.svg" in said


def test_a_run_of_mae(
    mae_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No teacher: its pictures are left out; one line says that checkpoints were rotated away."""
    what = ["attention", "heads", "growth", "reconstruction"]
    run = shutil.copytree(mae_run, tmp_path / "mae")
    config = ExplainConfig(run=str(run), images=[str(photos)], what=what, count=2, progress=False)
    written = explain(config)["written"]
    assert {Path(path).name for path in written} == {
        "attention.png", "heads_student.png", "growth.png", "reconstruction.png",
    }  # fmt: skip
    assert all(Path(path).parent == run / "pictures" for path in written)
    assert "keeps 2 checkpoint(s)" in capsys.readouterr().err
    config.what = ["predictions"]
    with pytest.raises(InputError, match="--what predictions: no features are predicted here"):
        explain(config)


def test_the_same_picture_is_the_same_file(cmt_run: Path, photos: Path, tmp_path: Path) -> None:
    config = ExplainConfig(
        run=str(cmt_run), images=[str(photos)], what=["masks"], count=1, progress=False
    )
    config.formats = ["png", "svg"]
    for place in ("one", "two"):
        config.out = str(tmp_path / place)
        explain(config)
    for name in ("masks.png", "masks.svg"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_images_files_all_and_folders_evenly(photos: Path, tmp_path: Path) -> None:
    """A broken image of a folder makes place for the next; a broken file that was named is refused."""
    files = sorted(photos.rglob("*.png")) or sorted(photos.rglob("*.webp"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, file in enumerate(files[:5]):
        shutil.copy(file, folder / f"{number}{file.suffix}")
    (folder / f"0{files[0].suffix}").write_bytes(b"no image")
    album = Album([str(files[7]), str(folder), str(files[9])])
    found = [photo.name for photo in album.read(3, 2)]
    assert found == [files[7].name, files[9].name, f"1{files[0].suffix}", f"4{files[0].suffix}"]
    with pytest.raises(InputError, match="give another image"):
        list(Album([str(folder / f"0{files[0].suffix}")]).read(3, 2))
    kinds = [photo.kind for photo in Album([str(photos)]).read(3, 4)]
    assert len(set(kinds)) == 4, "one of each class while there are as many classes"
    with pytest.raises(InputError, match="no such file or folder"):
        Album([str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--what", "atention", "--run", "x"], "unknown (did you mean attention?)"),
        (["--run", "x", "--backbone", "y"], "leave one out"),
        ([], "nothing to look at"),
        (["--backbone", "embedded"], "no images: give --images"),
        (["--run", "x", "--what", "masks"], "needs images"),
        (["--run", "x", "--alpha", "2"], "give a number from 0 to 1"),
        (["--run", "x", "--formats", "gif"], "use png, svg, pdf"),
        (["--run", "x", "--size", "1", "2", "3"], "give one side, or height and width"),
        (["--run", "no/such/run", "--images", "x"], "is no run directory"),
        (["--run", "x", "--what", "aim"], "give images with known objects"),
    ],
)
def test_one_line_for_what_cannot_be(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *words, "--progress=false"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert line in said[-1]
    assert said[-1].startswith("cmt-mae: ")
    assert names(tmp_path) == set()
