"""Tar shards against the webdataset package, and broken ones."""

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data.decode import decode_image
from cmt_mae.data.source import BadImage
from cmt_mae.data.sources import open_source, open_split

wds = pytest.importorskip("webdataset")


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (value, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    with wds.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def shard(path: Path, start: int = 0, count: int = 4) -> Path:
    keys = range(start, start + count)
    return write(path, [{"__key__": f"{i:04d}", "jpg": jpeg(i), "cls": i % 3} for i in keys])


def raw_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def reference(path: Path) -> list[dict[str, Any]]:
    return list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))


def test_as_webdataset_reads_it(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", count=7)
    source = open_source(str(path))
    theirs = reference(path)
    assert len(source) == len(theirs) == 7
    for i, sample in enumerate(theirs):
        assert source.read(i) == sample["jpg"]
        assert source.label(i) == int(sample["cls"])
        assert sample["__key__"] in source.name(i)
    assert source.classes is None


def test_keys_with_dots_folders_and_long_names(tmp_path: Path) -> None:
    names = ["a/b.c/x1.seg.png", "a/b.c/x1.jpg", "a/x1.JPG", "y" * 150 + ".jpg", "ü.jpg", "noext"]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = raw_tar(tmp_path / "a.tar", [(n, jpeg(i)) for i, n in enumerate(names)], kind)
        source = open_source(str(path))
        keys = {sample["__key__"] for sample in reference(path)}
        assert len(source) == len(keys) == 4
        assert source.read(0) == jpeg(0)  # the first image of a sample
        assert [source.read(i) for i in (1, 2, 3)] == [jpeg(2), jpeg(3), jpeg(4)]


def test_labels_of_json_and_none(tmp_path: Path) -> None:
    members = [
        ("0.jpg", jpeg(0)),
        ("0.json", json.dumps({"label": 5, "caption": "x"}).encode()),
        ("1.json", b"{broken"),
        ("1.jpg", jpeg(1)),
        ("2.jpg", jpeg(2)),
        ("2.npy", b"features, not an image"),
        ("3.json", b"[" * 100_000),
        ("3.jpg", jpeg(3)),
        ("4.txt", b"a caption without image"),
    ]
    source = open_source(str(raw_tar(tmp_path / "a.tar", members)))
    assert [source.label(i) for i in range(len(source))] == [5, None, None, None]
    assert source.read(2) == jpeg(2)


def test_folders_patterns_and_splits(tmp_path: Path) -> None:
    for i in range(3):
        shard(tmp_path / f"train-{i:02d}.tar", 10 * i)
    shard(tmp_path / "val-00.tar", 90, 2)
    assert len(open_source(str(tmp_path))) == 14
    for pattern in ("train-*.tar", "train-{00..02}.tar", "train-0[0-2].tar"):
        source = open_source(str(tmp_path / pattern))
        assert [source.read(i) for i in (0, 4, 11)] == [jpeg(0), jpeg(10), jpeg(23)]
    assert len(open_split(str(tmp_path), "train")) == 12
    assert len(open_split(str(tmp_path), "val")) == 2


def test_fingerprint_and_pickle(tmp_path: Path) -> None:
    source = open_source(str(shard(tmp_path / "a.tar")))
    again = pickle.loads(pickle.dumps(source))
    assert again.read(2) == source.read(2)
    assert again.fingerprint() == source.fingerprint()
    other = open_source(str(shard(tmp_path / "b.tar", count=5)))
    assert other.fingerprint() != source.fingerprint()


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    data_end = last.offset_data + last.size
    cut = tmp_path / "cut.tar"
    boundaries, messages = 0, set()
    for length in [*range(0, data_end, 200), data_end]:
        cut.write_bytes(whole[:length])
        try:
            source = open_source(str(cut))
        except InputError as error:
            messages.add(str(error))
            continue
        # A cut between two members looks like an archive without trailer.
        boundaries += 1
        for i in range(len(source)):
            assert source.read(i) == jpeg(i)
    assert all("cut.tar: broken" in m and "\n" not in m for m in messages)
    assert messages
    assert boundaries <= 2


def test_garbage_in_the_middle(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        header = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[header : header + 512] = bytes(range(256)) * 2
    path.write_bytes(data)
    assert len(reference(path)) < 4  # a reader that streams loses the rest without a word
    with pytest.raises(InputError, match=r"a\.tar: broken.*no valid header"):
        open_source(str(path))


def test_negative_sizes_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[1].offset
    data[offset + 124 : offset + 136] = b"\xff" * 10 + b"\xf6\x00"  # base 256: -2560
    data[offset + 148 : offset + 156] = b" " * 8
    checksum = sum(data[offset : offset + 512])
    data[offset + 148 : offset + 156] = f"{checksum:06o}\0 ".encode()
    path.write_bytes(data)
    with pytest.raises(InputError, match="broken"):
        open_source(str(path))


@pytest.mark.parametrize("content", [b"", b"text\n" * 400, b"\x1f\x8b" + b"\0" * 600])
def test_not_a_tar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.tar: broken or not a tar"):
        open_source(str(tmp_path))


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="class number"):
        open_source(str(raw_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("0.cls", b"cat")])))
    with pytest.raises(InputError, match="no image"):
        open_source(str(raw_tar(tmp_path / "b.tar", [("0.txt", b"cat")])))
    (tmp_path / "c.tar.gz").write_bytes(b"x")
    with pytest.raises(InputError, match="unpack"):
        open_source(str(tmp_path / "c.tar.gz"))


def test_links_and_traversal_are_only_names(tmp_path: Path) -> None:
    path = raw_tar(tmp_path / "a.tar", [("../../evil.jpg", jpeg(1))])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(str(path))
    assert len(source) == 2
    assert source.read(0) == jpeg(1)
    assert source.name(1) == "a.tar/link.jpg"
    with pytest.raises(BadImage, match="a link to another member"):
        source.read(1)


def test_archives_joined_and_cut_between_members(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shard(tmp_path / "a.tar")
    whole = path.read_bytes()
    path.write_bytes(whole * 2)
    with pytest.raises(InputError, match="more data after its end"):
        open_source(str(path))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        end = list(tar)[4].offset
    path.write_bytes(whole[:end])
    assert not caplog.records
    assert len(open_source(str(path))) == 2
    assert "does not end with zeros" in caplog.text


def test_headers_made_to_fill_the_memory_or_the_stack(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("long")
        info.type, info.size = kind, 2**30
        with open(path, "wb") as file:
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(2**30 + 4096)  # a sparse file
        with pytest.raises(InputError, match="a header of 1073741824 bytes"):
            open_source(str(path))
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    path.write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 5000)
    with pytest.raises(InputError, match="broken or not a tar file"):
        open_source(str(path))


def test_a_shard_that_shrinks_or_goes_during_the_run(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    source = open_source(str(path))
    with tarfile.open(path) as tar:
        first = next(member for member in tar if member.name.endswith("jpg"))
    path.write_bytes(path.read_bytes()[: first.offset_data + first.size])
    data = source.read(0)
    assert isinstance(data, bytes)
    assert np.array_equal(decode_image(data), decode_image(jpeg(0)))
    with pytest.raises(BadImage, match="shorter"):
        source.read(3)
    path.unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(0)
