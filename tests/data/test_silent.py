"""Nothing about the images is wrong silently: what is left out, held out, scaled or replaced, is said or seen."""

import importlib
import io
import multiprocessing
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.core.files import same_fingerprint
from cmt_mae.data import decode
from cmt_mae.data.ade20k import open_ade20k, read_image
from cmt_mae.data.centre import load_image
from cmt_mae.data.coco import open_coco
from cmt_mae.data.davis import open_davis
from cmt_mae.data.decode import decode_image
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.packed import read_meta
from cmt_mae.data.sample import write_ade20k, write_coco, write_davis, write_imagefolder
from cmt_mae.data.sources import _reported, open_source, open_split
from cmt_mae.tools.embed import embed
from cmt_mae.tools.inspect.images import Album

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(100)
GREY = np.add.outer(np.arange(40), np.arange(48)).astype(np.uint16)  # 0..86


def jpeg(seed: int = 0) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def put(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))
    return folder


def tar(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as file:
        for number, name in enumerate(names):
            data = b"7" if name.endswith(".cls") else jpeg(number)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


# --- left out --------------------------------------------------------------------------------------


def test_files_left_out_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = put(
        tmp_path, "1.jpg", "2.JPG", "3.jfif", "a.xyz", "b.xyz", "c", "d.jpg?w=1024", ".hidden.xyz"
    )
    for _ in range(2):
        source = open_source(str(folder))
    assert [source.name(i) for i in range(len(source))] == ["1.jpg", "2.JPG", "3.jfif"]
    (line,) = caplog.messages
    assert line == f"{folder}: 4 of 7 files left out: 2 .xyz, 1 without suffix, 1 .jpg?w=1024"
    with pytest.raises(InputError, match=r"no image found: 1 of 1 files left out: 1 \.xyz"):
        open_source(str(put(tmp_path / "none", "a.xyz")))


def test_a_tars_other_members_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tar(tmp_path / "a.tar", "1.left.jpg", "1.right.jpg", "1.cls", "2.jpg", "3.xyz")
    source = open_source(str(path))
    assert [source.label(i) for i in range(len(source))] == [7, None]
    assert caplog.messages == [f"{path}: 2 of 4 files left out: 1 .right.jpg, 1 .xyz"]


def test_names_with_dots_in_a_tar_are_samples_of_their_own(tmp_path: Path) -> None:
    for pattern in ("2024.05.01-{:03d}", "IMG_{0}.{0}", "a/b.1/frame.{:03d}"):
        names = [f"{pattern.format(i)}{suffix}" for i in range(12) for suffix in (".jpg", ".cls")]
        source = open_source(str(tar(tmp_path / "t.tar", *names)))
        assert len({source.read(i) for i in range(len(source))}) == 12
        assert [source.label(i) for i in range(12)] == [7] * 12
    frames = open_source(str(tar(tmp_path / "t.tar", "v.0.jpg", "v.1.jpg", "v.cls", "w.0.jpg")))
    assert [frames.label(i) for i in range(3)] == [7, 7, None], "a label that frames share"
    assert not frames.left_out


def test_litter_is_left_out_everywhere(tmp_path: Path) -> None:
    """What a Mac and Jupyter leave: in folders, tars, ADE20K, DAVIS."""
    folder = put(tmp_path / "f", "a/1.jpg", "b/2.jpg", ".ipynb_checkpoints/1-checkpoint.jpg")
    for name in ("a/._1.jpg", "__MACOSX/a/1.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(APPLE_DOUBLE)
    assert open_source(str(folder)).classes == ["a", "b"]
    path = tar(
        tmp_path / "t.tar",
        "x/1.jpg",
        "x/._1.jpg",
        "x/.ipynb_checkpoints/1-checkpoint.jpg",
        "__MACOSX/2.jpg",
    )
    assert len(open_source(str(path))) == 1
    write_ade20k(tmp_path / "ade", 2, 1)
    write_davis(tmp_path / "davis", 1, 3)
    for root in (tmp_path / "ade", tmp_path / "davis"):
        for file in [*root.rglob("*.jpg"), *root.rglob("*.png")]:
            (file.parent / f"._{file.name}").write_bytes(APPLE_DOUBLE)
            (file.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
            (file.parent / ".ipynb_checkpoints" / file.name).write_bytes(file.read_bytes())
    listed = tmp_path / "davis/ImageSets/2017/val.txt"
    listed.write_text("\ufeff" + listed.read_text())  # as Notepad writes it
    assert len(open_ade20k(tmp_path / "ade").train.images) == 2
    assert [len(video.frames) for video in open_davis(str(tmp_path / "davis"))] == [3]


def test_an_empty_class_folder_is_blamed_where_it_is(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/b/1.jpg")
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(
        InputError, match=r"val: class folder 'b' has no images in the training split"
    ):
        open_split(str(tmp_path), "val")


# --- held out --------------------------------------------------------------------------------------


def test_a_share_is_held_out_of_every_class_the_same_each_time(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "all", 50, 0, 16)
    path = str(tmp_path / "all" / "train")
    with pytest.raises(InputError, match=r"no val split.*--val_share 0.2"):
        open_split(path, "val")
    train, val = (open_split(path, split, val_share=0.2) for split in ("train", "val"))
    assert np.bincount(val.labels()).tolist() == [1] * 10
    assert np.bincount(train.labels()).tolist() == [4] * 10
    names = [[source.name(i) for i in range(len(source))] for source in (train, val)]
    assert not {*names[0]} & {*names[1]}
    again = open_split(path, "val", val_share=0.2)
    assert [again.name(i) for i in range(10)] == names[1]
    assert again.fingerprint() == val.fingerprint() != train.fingerprint()
    put(tmp_path, "own/train/a/1.jpg", "own/val/a/2.jpg")
    assert len(open_split(str(tmp_path / "own"), "val", val_share=0.5)) == 1, (
        "a val split goes first"
    )
    with pytest.raises(InputError, match="give a share"):
        open_split(path, "val", val_share=1.0)


# --- more than 8 bits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "white"),
    [(GREY * 40, 4095), (GREY * 11, 1023), (GREY * 700, 65535), (GREY.astype(np.int32), 255),
     ((GREY / 100).astype(np.float32), 1.0), ((GREY * 4).astype(np.float32), 511)],
)  # fmt: skip
def test_values_beyond_8_bits_are_scaled_by_what_they_fill(
    tmp_path: Path, values: np.ndarray, white: float, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(3):
        tifffile.imwrite(tmp_path / f"{number}.tif", values)
        np.save(tmp_path / f"{number}.npy", values)
    source = open_source(str(tmp_path))
    for index in range(6):
        image = load_image(source, index, 1)[:, :, 0].astype(float)
        np.testing.assert_allclose(image, values / white * 255, atol=0.51)
    if white == 65535:
        assert (source.limits, caplog.messages) == (None, []), "as it always was"
    else:
        assert source.limits == (0, white)
        assert f"0 becomes black, {white:g} white" in caplog.text


def test_limits_given_or_of_train_hold_for_val_packs_and_colours(tmp_path: Path) -> None:
    for split, gain in (("train", 40), ("val", 2)):
        (tmp_path / split).mkdir()
        colour = np.stack([GREY * gain, GREY, GREY], 2).astype(np.uint16)
        for number in range(3):
            tifffile.imwrite(tmp_path / split / f"{number}.tif", colour, photometric="rgb")
    train, val = (open_split(str(tmp_path), split) for split in ("train", "val"))
    assert train.limits == val.limits == (0, 4095)
    assert load_image(val, 0, 3).max() == round(86 * 2 / 4095 * 255)
    given = open_split(str(tmp_path), "val", [0, 172])
    assert load_image(given, 0, 3).max() == 255
    with pytest.raises(InputError, match="give the values of black and white"):
        open_split(str(tmp_path), "val", [4095, 0])
    pack(
        PackConfig(data=str(tmp_path), out=str(tmp_path / "p"), size=32, workers=0, range=[0, 172])
    )
    assert read_meta(tmp_path / "p" / "val")["range"] == [0, 172]
    assert open_split(str(tmp_path / "p"), "val").read(0).max() > 240  # type: ignore[union-attr]


def test_images_of_ade20k_that_are_left_out_are_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_ade20k(tmp_path, 3, 1)
    image = sorted((tmp_path / "images" / "training").iterdir())[0]
    image.rename(image.with_suffix(".xyz"))
    assert len(open_ade20k(tmp_path).train) == 2
    assert "training: 1 of 3 files left out: 1 .xyz" in caplog.text


def test_a_class_called_train_is_not_taken_for_a_split_unseen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "car/1.jpg", "bus/1.jpg", "train/1.jpg", "train/2.jpg")
    assert len(open_split(str(tmp_path), "train")) == 2
    assert "train/ alone is read, as its name is that of a split; beside it: bus, car" in caplog.text
    caplog.clear()
    put(tmp_path / "usual", "train/a/1.jpg", "val/a/1.jpg", "test/a/1.jpg")
    open_split(str(tmp_path / "usual"), "val")
    assert not caplog.text


def test_12_bits_are_not_black_where_files_are_listed_one_by_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ADE20K, COCO, `embed` of paths, `explain --images FILE`: 0..1952 in 16 bits, as from a camera."""
    write_ade20k(tmp_path / "ade", 2, 1)
    write_coco(tmp_path / "coco", 3, 2)
    for jpg in [*tmp_path.rglob("*.jpg")]:
        grey = np.asarray(Image.open(jpg).convert("L")).astype(np.uint16) * 8
        Image.fromarray(grey).save(jpg.with_suffix(".png"))
        jpg.unlink()
    for notes in tmp_path.rglob("*.json"):
        notes.write_text(notes.read_text().replace(".jpg", ".png"))
    ade = open_ade20k(tmp_path / "ade")
    brightest = read_image(ade.train.images[0], 3, ade.limits).max()
    assert (ade.limits, brightest > 60) == ((0.0, 2047.0), True)
    coco = open_coco(tmp_path / "coco", "train")
    assert (coco.limits, coco.image(0).max() > 60) == ((0.0, 2047.0), True)
    files = sorted((tmp_path / "coco").rglob("*.png"))[:3]
    photos = list(Album([str(file) for file in files]).read(3, 3))
    assert max(photo.pixels.max() for photo in photos) > 60
    (tmp_path / "three").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "three")
    listed, whole = (embed("embedded", images).mean for images in (files, tmp_path / "three"))
    torch.testing.assert_close(listed, whole)
    assert "hold values from 0 to" in caplog.text


def test_a_page_a_channel_and_what_cannot_be_scaled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pages = np.stack([GREY, GREY * 2, GREY + 3, GREY], 0).astype(np.uint8)
    tifffile.imwrite(tmp_path / "1.tif", pages, photometric="minisblack")
    image = decode_image((tmp_path / "1.tif").read_bytes(), 4)
    np.testing.assert_array_equal(image, pages.transpose(1, 2, 0))
    open_source(str(tmp_path))
    assert "TIFFs of 4 pages: each is a channel where 4 are wanted, else the first" in caplog.text
    tifffile.imwrite(tmp_path / "3.tif", pages[:3], photometric="minisblack")
    three = decode_image((tmp_path / "3.tif").read_bytes(), 3)
    np.testing.assert_array_equal(three, pages[:3].transpose(1, 2, 0))
    cv2 = pytest.importorskip("cv2")
    (tmp_path / "png").mkdir()
    cv2.imwrite(str(tmp_path / "png" / "1.png"), np.stack([GREY * 40] * 3, 2))
    with pytest.raises(InputError, match="a colour PNG of 16 bits that fills 12 of them"):
        open_source(str(tmp_path / "png"))
    holes = np.full((4, 4), np.nan, np.float32)
    tifffile.imwrite(tmp_path / "nan.tif", holes)
    with pytest.raises(decode.BadImage, match="not finite"):
        decode_image((tmp_path / "nan.tif").read_bytes(), 1, limits=(0, 1))


# --- replaced --------------------------------------------------------------------------------------


def test_content_of_the_same_size_changes_the_fingerprint(tmp_path: Path) -> None:
    """Folder, tar, parquet and pack; the half that older versions recorded stays."""
    datasets = pytest.importorskip("datasets")
    prints: dict[str, list[str]] = {}
    for value in (0, 9):
        root = tmp_path / str(value)
        root.mkdir()
        image = np.full((9, 9, 3), value, np.uint8)
        bmp = io.BytesIO()
        Image.fromarray(image).save(bmp, "BMP")
        (root / "f").mkdir()
        (root / "f" / "1.bmp").write_bytes(bmp.getvalue())
        with tarfile.open(root / "t.tar", "w") as file:
            info = tarfile.TarInfo("1.bmp")
            info.size = len(bmp.getvalue())
            file.addfile(info, io.BytesIO(bmp.getvalue()))
        rows = datasets.Dataset.from_dict({"image": [bmp.getvalue()]})
        rows.to_parquet(str(root / "p.parquet"))
        pack(PackConfig(data=str(root / "f"), out=str(root / "pack"), size=8, workers=0))
        for name in ("f", "t.tar", "p.parquet", "pack"):
            source = open_source(str(root / name))
            prints.setdefault(name, []).append(source.fingerprint())
            assert same_fingerprint(source.names_fingerprint(), source.fingerprint())
            assert len(source.fingerprint()) == 64
    for name, (one, other) in prints.items():
        assert one[:32] == other[:32], name
        assert not same_fingerprint(one, other), name


# --- two at once -----------------------------------------------------------------------------------


def _pack(data: str, out: str, results: "multiprocessing.Queue[str]") -> None:
    try:
        results.put(str(pack(PackConfig(data=data, out=out, size=16, workers=0))["all"]["count"]))
    except InputError as error:
        results.put(str(error))


def test_two_packs_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one makes it whole, the second is told who is at it; afterwards both see the same."""
    sets = [str(put(tmp_path / name, *(f"{i}.jpg" for i in range(40)))) for name in ("one", "two")]
    Path(sets[1], "0.jpg").write_bytes(jpeg(99))
    out, context = str(tmp_path / "out"), multiprocessing.get_context("fork")
    results: multiprocessing.Queue[str] = context.Queue()
    module = importlib.import_module("cmt_mae.data.pack")
    plain = module.center_crop

    told = context.Event()

    def waiting(*args: object, **more: object) -> object:
        told.wait(20)  # the first is at it until the second has had its answer
        return plain(*args, **more)

    def packing(data: str) -> None:
        _pack(data, out, results)
        told.set()

    monkeypatch.setattr(module, "center_crop", waiting)
    processes = [context.Process(target=packing, args=(data,)) for data in sets]
    for process in processes:
        process.start()
    said = sorted(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert said[1] == "40"
    assert "is in use by pid" in said[0]
    assert said[0].endswith("wait for it, or choose another --out")
    made = open_source(out)
    whole = {name: open_source(name).names_fingerprint() for name in sets}
    assert read_meta(Path(out))["source_fingerprint"] in whole.values()
    assert len(made) == 40
    assert not list(tmp_path.glob(".out*")), "nothing is left aside"


def test_text_labels_are_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for split, texts in (("train", ["dog", "cat", None, "dog"]), ("val", ["dog"])):
        rows = {"image": [jpeg(i) for i in range(len(texts))], "label": texts}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{split}.parquet"))
    train, val = (open_split(str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog"]
    assert [train.label(i) for i in range(4)] == [1, 0, None, 1]
    assert val.label(0) == 1
    datasets.Dataset.from_dict({"image": [jpeg()], "label": ["owl"]}).to_parquet(
        str(tmp_path / "val.parquet")
    )
    with pytest.raises(InputError, match="class 'owl' is not in the training split"):
        open_split(str(tmp_path), "val")


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    """Each line is said once a process and path: tests begin anew."""
    _reported.clear()
