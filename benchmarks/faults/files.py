"""Hostile and broken files: images, shards, tables, annotations, pickles, names."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.faults.lab import Broken, Lab, Row, tree
from benchmarks.faults.launch import in_fork, judged

# --- images --------------------------------------------------------------------------------------------------

MUTATIONS = ("cut", "bits", "bytes", "gap", "twice", "numbers")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """One file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def mutate(raw: bytes, how: str, rng: random.Random) -> bytes:
    """The file with one fault of the kind ``how``."""
    data, n = bytearray(raw), len(raw)
    at = rng.randrange(n) if rng.random() < 0.7 else rng.randrange(min(n, 200))
    length = rng.randrange(1, 1 + min(n, 400))
    if how == "cut":
        return bytes(data[:at])
    if how == "bits":
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(at, n)] ^= 1 << rng.randrange(8)
    elif how == "bytes":
        data[at : at + length] = rng.randbytes(len(data[at : at + length]))
    elif how == "gap":
        del data[at : at + length]
    elif how == "twice":
        data[at:at] = data[at : at + length]
    else:  # sizes, counts and offsets at their limits
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(min(n, 300))
            number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF))
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", number)[: n - at]
    return bytes(data)


def png(width: int, height: int, depth: int, kind: int, body: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """A PNG of given header and data; more: (name, body) of chunks before the data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def bombs() -> dict[str, bytes]:
    """Small files that would become large: all are to be refused."""
    zeros = zlib.compress(bytes(10**7), 9)
    rows = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        rows, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 9, 3)}
    )
    progressive = encode(Image.new("L", (2000, 2000), 128), "JPEG", progressive=True)
    last = progressive.rfind(b"\xff\xda")
    tall = struct.pack("<ii", 9, 2**31 - 1)
    return {
        "png, 60000 x 60000": png(60000, 60000, 8, 2, zeros),
        "png, 2^31 x 2^31": png(2**31 - 1, 2**31 - 1, 16, 6, zeros),
        "png, long text": png(8, 8, 8, 2, zlib.compress(bytes(200)), (b"zTXt", b"a\0\0" + zeros)),
        "jpeg, 1000 scans": progressive[:-2] + progressive[last:-2] * 1000 + progressive[-2:],
        "npy, 2^40 rows": rows.getvalue() + bytes(243),
        "ppm, 60000 x 60000": b"P6 60000 60000 255\n" + bytes(10**6),
        "bmp, 2^31 rows": encode(Image.new("RGB", (9, 9)), "BMP").replace(struct.pack("<ii", 9, 9), tall),
    }  # fmt: skip


def exploding_images(lab: Lab, _: random.Random) -> None:
    """Bombs among good images: named in training, refused by explain (and so by the app's upload), in seconds."""
    folder = lab.fresh()
    shutil.copytree(Path(lab.photos) / "train", folder / "photos")
    for number, raw in enumerate(bombs().values()):
        (folder / "photos" / f"bomb{number}.{('png', 'jpg', 'npy', 'ppm', 'bmp')[number % 5]}").write_bytes(raw)
    begin = time.monotonic()
    ended = judged(lab.pretrain(folder / "run", data=str(folder / "photos")), lab.folder, 90)
    if ended.status != 0 or ended.fault():
        raise Broken(f"pretrain: {ended.fault() or ended.line()}")
    named = (folder / "run" / "bad_images.txt").read_text()
    if missing := [n for n in range(len(bombs())) if f"bomb{n}." not in named]:
        raise Broken(f"trained on bombs {missing}")
    run = lab.finished("pretrain", lab.pretrain)
    (folder / "one.png").write_bytes(bombs()["png, 60000 x 60000"])
    lab.refused(["explain", f"--run={run}", f"--images={folder / 'one.png'}", f"--out={folder / 'x'}"], "one.png")
    if time.monotonic() - begin > 120:
        raise Broken(f"{time.monotonic() - begin:.0f} s")


# --- shards, tables, annotations ----------------------------------------------------------------------------


def write_shards(folder: Path, photos: Path) -> dict[str, Path]:
    """The same images as a tar, a parquet table and a pack, in files of one folder each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = sorted((photos / "train").rglob("*.jpg"))
    (folder / "tar").mkdir(parents=True)
    with tarfile.open(folder / "tar" / "0.tar", "w") as tar:
        for path in found:
            tar.add(path, path.name)
    (folder / "parquet").mkdir()
    table = pa.table({"image": [p.read_bytes() for p in found], "label": [n % 4 for n in range(len(found))]})
    pq.write_table(table, folder / "parquet" / "0.parquet")
    return {"tar": folder / "tar" / "0.tar", "parquet": folder / "parquet" / "0.parquet"}


def mutated_shards(lab: Lab, rng: random.Random) -> None:
    """Damaged tars, tables and packs under a short training: 0 or 2 with one line, in bounded time and memory."""
    folder = lab.fresh()
    in_fork(lambda: write_shards(folder / "whole", Path(lab.photos)) and None, folder / "log")
    kinds = {"tar": "0.tar", "parquet": "0.parquet", "packed": "train/images.npy", "packed ": "train/meta.json"}
    shutil.copytree(lab.packed, folder / "whole" / "packed")
    for kind, file in kinds.items():
        for how in MUTATIONS * lab.count(4, 1):
            root = folder / "hurt"
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(folder / "whole" / kind.strip(), root)
            (root / file).write_bytes(mutate((root / file).read_bytes(), how, rng))
            words = lab.pretrain(folder / "out", "--epochs=0.4", "--optim.warmup_epochs=0.1", data=str(root))
            ended = judged(words, lab.folder, 60)
            shutil.rmtree(folder / "out", ignore_errors=True)
            if fault := ended.fault():
                raise Broken(f"{kind}{file}, {how}: {fault}")


def mutated_annotations(lab: Lab, rng: random.Random) -> None:
    """COCO files with parts exchanged or cut, ADE20K masks and names damaged: 0 or 2 with one line."""
    from benchmarks.faults.inputs import exchanged

    folder = lab.fresh()
    whole = {"images": [{"id": 1, "file_name": "1.jpg", "width": 64, "height": 48}],
             "annotations": [{"id": 5, "image_id": 1, "category_id": 2, "bbox": [3, 4, 20, 20], "area": 400,
                              "iscrowd": 0, "segmentation": [[3, 4, 23, 4, 23, 24, 3, 24]]}],
             "categories": [{"id": 2, "name": "box"}]}  # fmt: skip
    for part in ("train2017", "val2017"):
        (folder / "coco" / part).mkdir(parents=True)
        Image.new("RGB", (64, 48), (90, 20, 200)).save(folder / "coco" / part / "1.jpg")
    (folder / "coco" / "annotations").mkdir()
    common = [f"--backbone={lab.backbone}", f"--out={folder / 'out'}", "--device=cpu", "--preset=quick"]
    for _ in range(lab.count(60, 3)):
        for part in ("train", "val"):
            made = json.dumps(exchanged(whole, rng) if rng.random() < 0.7 else whole)
            cut = made if rng.random() < 0.8 else made[: rng.randrange(len(made))]
            (folder / "coco" / "annotations" / f"instances_{part}2017.json").write_text(cut)
        ended = judged(
            ["evaluate", "coco", f"--data={folder / 'coco'}", *common, "--iterations=1"], lab.folder, 90
        )
        shutil.rmtree(folder / "out", ignore_errors=True)
        if fault := ended.fault():
            raise Broken(f"coco {cut[:200]}: {fault}")
    for how in MUTATIONS:
        shutil.rmtree(folder / "segments", ignore_errors=True)
        shutil.copytree(lab.files / "segments", folder / "segments")
        victims = [folder / "segments" / "objectInfo.txt", *(folder / "segments/annotations/training").iterdir()]
        victim = rng.choice(victims)
        victim.write_bytes(mutate(victim.read_bytes(), how, rng))
        words = [w for w in lab.segmentation(folder / "out") if not w.startswith("--data=")]
        ended = judged([*words, f"--data={folder / 'segments'}"], lab.folder, 90)
        shutil.rmtree(folder / "out", ignore_errors=True)
        if fault := ended.fault():
            raise Broken(f"ade20k, {victim.name}, {how}: {fault}")


# --- code in files -------------------------------------------------------------------------------------------


class Payload:
    """Unpickled without care, it calls a function of the system."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def containers(folder: Path, marker: Path) -> Iterator[Path]:
    """A pickle that creates ``marker``, in every kind of file that holds weights."""
    payload = Payload(os.system, f"touch {marker}")
    model = {"cls_token": torch.zeros(1, 1, 8), "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
    content = {"model": model, "args": payload, "step": 4}
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("plain.ckpt", "plain.bin", "plain.safetensors"):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    with zipfile.ZipFile(folder / "script.pt", "w") as archive:
        for name, raw in (("data.pkl", pickle.dumps(payload, protocol=2)), ("constants.pkl", b"]q\0."),
                          ("version", b"3\n"), ("code/__torch__.py", b"import os\n")):  # fmt: skip
            archive.writestr(f"archive/{name}", raw)
    yield from sorted(folder.iterdir())


def code_in_weights(lab: Lab, _: random.Random) -> None:
    """Pickles with code at every place that reads weights: refused, never run (a control shows they would)."""
    folder = lab.fresh()
    marker = folder / "payload_was_here"
    (folder / "files").mkdir()
    in_fork(lambda: list(containers(folder / "files", marker)) and None, folder / "log")
    pickle.loads((folder / "files" / "plain.ckpt").read_bytes())
    if not marker.exists():
        raise Broken("the payload does nothing: this row proves nothing")
    marker.unlink()
    for number, file in enumerate(sorted((folder / "files").iterdir())):
        out = folder / "out"
        places = {
            "teacher": lab.pretrain(out, f"--teacher.name={file}"),
            "init_from": lab.pretrain(out, f"--init_from={file}"),
            "export": ["export", f"--backbone={file}", f"--out={folder / 'x.safetensors'}"],
            "knn": ["evaluate", "knn", f"--backbone={file}", f"--data={lab.packed}", f"--out={out}"],
            "embed": ["embed", f"--backbone={file}", f"--images={lab.photos}", f"--out={folder / 'x.npz'}"],
        }  # fmt: skip
        for at, (place, words) in enumerate(places.items()):
            if lab.quick and at != number % len(places):
                continue
            lab.refused(words)
            if marker.exists():
                raise Broken(f"{place}, {file.name}: the payload ran")
            shutil.rmtree(out, ignore_errors=True)


# --- names ----------------------------------------------------------------------------------------------------

NASTY = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a|b||c", "new\nline | row", "[red]x[/red]",
    "[link=https://x]y[/link]", "\x1b[2J\x1b]0;owned\x07", "`code` *b* ~~d~~", "](javascript:alert(1))",
    "$\\frac{", "{0} %s", "\u202eevil\u202c", "# head", "<!-- x", "</table>", "x" * 300, "'\"`",
)  # fmt: skip


def nasty_files(lab: Lab, _: random.Random) -> None:
    """Images, classes and tar members with such names, and members that climb or are links: nothing gets out."""
    folder = lab.fresh()
    picture = encode(Image.new("RGB", (40, 40), (90, 120, 60)), "JPEG")
    (folder / "cell").mkdir()
    names = [n.replace("/", "_")[:100] for n in NASTY]
    for split in ("train", "val"):
        for number, name in enumerate(names):
            place = folder / "cell" / "photos" / split / name
            place.mkdir(parents=True)
            (place / f"{name}{number}.jpg").write_bytes(picture)
            (place / f"broken{name}.jpg").write_bytes(picture[:60])
    with tarfile.open(folder / "cell" / "x.tar", "w") as tar:
        climbing = ("../../climbs", "/abs/olute", "a/../../b", "..", "new\nline", "\x1b[2J", "~/x")
        for number, name in enumerate(climbing * 3):
            info = tarfile.TarInfo(f"{name}{number}.jpg")
            info.size = len(picture)
            tar.addfile(info, io.BytesIO(picture))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    before = tree(folder)
    short = ("--epochs=0.5", "--optim.warmup_epochs=0.1", "--data.max_bad=0.9")
    knn = ["evaluate", "knn", f"--backbone={lab.backbone}", f"--data={folder / 'cell/photos'}", "--device=cpu"]
    for number, words in enumerate((
        lab.pretrain(folder / "out0", *short, data=str(folder / "cell/photos/train")),
        lab.pretrain(folder / "out1", *short, data=str(folder / "cell/x.tar")),
        ["pack", f"--data={folder / 'cell/x.tar'}", f"--out={folder / 'out2'}", "--size=16", "--workers=0"],
        [*knn, f"--out={folder / 'out3'}"],
    )):  # fmt: skip
        ended = judged(words, lab.folder, 90)
        if fault := ended.fault():
            raise Broken(f"{words[0]} {number}: {fault}")
        if "root:" in ended.out + ended.err:
            raise Broken("the content of another file was shown")
    after = {k: v for k, v in tree(folder).items() if not k.startswith("out")}
    if after != before:
        raise Broken(f"written outside: {sorted(set(after) ^ set(before))[:4]}")
    report = judged(["report", str(folder / "out0")], lab.folder, 60)
    if report.fault():
        raise Broken(f"report: {report.fault()}")


def linked_run(lab: Lab, _: random.Random) -> None:
    """Files of a run directory that are links: what they lead to is not written."""
    for name in ("run.lock", "metrics.jsonl", "run.json", "backbone.safetensors", "bad_images.txt"):
        run = lab.copy_of_finished()
        thesis = run.parent / "thesis.txt"
        thesis.write_bytes((run / name).read_bytes() if name == "run.json" else b"years of work")
        kept = thesis.read_bytes()
        for path in sorted((run / "checkpoints").glob("step_*"))[-2:]:
            path.unlink()  # so that there are steps to do, and lines to write
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(thesis)
        lab.refused(lab.pretrain(run), statuses=(0, 2))
        if thesis.read_bytes() != kept:
            raise Broken(f"{name}: the file that it leads to was changed")


def devices(lab: Lab, _: random.Random) -> None:
    """Pipes and devices where a file is read: one line, at once."""
    folder = lab.fresh()
    for number, target in enumerate(("pipe", "/dev/zero", "/dev/stdin", "/etc/passwd")):
        for suffix in ("pth", "safetensors", "json"):
            path = folder / f"{number}.{suffix}"
            os.mkfifo(path) if target == "pipe" else path.symlink_to(target)
            export = ["export", f"--backbone={path}", f"--out={folder / 'out.safetensors'}"]
            lab.refused(["compare", str(path)] if suffix == "json" else export, limit_s=30)


LINE = "status 0, or 2 with one line; bounded time and memory"
ROWS = [
    Row("exploding images", "refused or named in one line, in seconds", exploding_images),
    Row("mutated shards, tables and packs", LINE, mutated_shards),
    Row("mutated annotations", LINE, mutated_annotations),
    Row("code in weights", "refused with one line at every place, never run", code_in_weights),
    Row("hostile names of files and members", "nothing is written or read outside the folders", nasty_files),
    Row("links in a run directory", "what they lead to is not changed", linked_run),
    Row("pipes and devices as files", "one line, at once", devices),
]  # fmt: skip
