"""Image files that are broken on purpose: mutations of real files of every format, and bombs."""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MUTATIONS = ("cut", "bits", "bytes", "zeros", "gap", "twice", "numbers", "splice", "shuffle")


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """One file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def originals(shared: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """Name -> file: two real photos and a generated picture in all formats and variants that are read."""
    Image.init()
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((96, 72), 3)
    grey, alpha = small.convert("L"), small.convert("L").point(lambda v: 255 - v)
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    frames = [small.rotate(turn) for turn in (0, 90, 180)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo" * 20
    files = {
        "jpeg": encode(small, "JPEG", quality=92),
        "jpeg progressive": encode(small, "JPEG", progressive=True),
        "jpeg 4:4:4": encode(small, "JPEG", subsampling=0, restart_marker_rows=1),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(small.convert("CMYK"), "JPEG"),
        "jpeg exif": encode(small, "JPEG", exif=exif),
        "mpo": encode(small, "MPO", save_all=True, append_images=frames),
        "png": encode(small, "PNG"),
        "png exif": encode(small, "PNG", exif=exif),
        "png palette": encode(small.quantize(60), "PNG", transparency=3),
        "png alpha": encode(Image.merge("LA", [grey, alpha]), "PNG"),
        "png 16 bit": encode(wide, "PNG"),
        "png animated": encode(frames[0], "PNG", save_all=True, append_images=frames[1:]),
        "gif animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": encode(small, "WEBP"),
        "webp lossless": encode(small, "WEBP", lossless=True),
        "webp animated": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "bmp": encode(small, "BMP"),
        "bmp palette": encode(small.quantize(60), "BMP"),
        "tiff": encode(small, "TIFF"),
        "tiff lzw": encode(small, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(small, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(small, "TIFF", compression="jpeg"),
        "tiff fax": encode(grey.convert("1"), "TIFF", compression="group4"),
        "tiff 16 bit": encode(wide, "TIFF"),
        "tiff cmyk": encode(small.convert("CMYK"), "TIFF"),
        "ppm": encode(small, "PPM"),
        "pgm 16 bit": encode(wide, "PPM"),
        "tga": encode(small, "TGA", compression="tga_rle"),
        "npy": npy(np.asarray(small)),
        "npy 16 bit": npy(np.asarray(small).astype(np.uint16) * 257),
    }
    for name, kind in (("jpeg 2000", "JPEG2000"), ("avif", "AVIF")):
        if kind in Image.SAVE:
            files[name] = encode(small, kind)
    for path in sorted((shared / "data" / "photos").glob("*"))[:2]:
        with Image.open(path) as photo:
            files[f"photo {path.name[:9]}"] = encode(photo.resize((250, 190)), "JPEG", quality=85)
    return files


def mutate(raw: bytes, how: str, rng: np.random.Generator, other: bytes) -> bytes:
    """The file with one fault of the kind ``how``; ``other`` is another file, for splicing."""
    data, n = bytearray(raw), len(raw)
    at = int(rng.integers(n)) if rng.random() < 0.7 else int(rng.integers(min(n, 200)))
    length = int(rng.integers(1, 1 + min(n, 400)))
    if how == "cut":
        return bytes(data[:at])
    if how == "bits":
        for place in rng.integers(at, n, int(rng.integers(1, 30))):
            data[place] ^= 1 << int(rng.integers(8))
    elif how == "bytes":
        data[at : at + length] = rng.bytes(len(data[at : at + length]))
    elif how == "zeros":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif how == "gap":
        del data[at : at + length]
    elif how == "twice":
        data[at:at] = data[at : at + length]
    elif how == "numbers":  # sizes, counts and offsets at their limits
        extreme = (0, 1, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
        for _ in range(int(rng.integers(1, 4))):
            at, order = int(rng.integers(min(n, 300))), ("<", ">")[int(rng.integers(2))]
            number = extreme[int(rng.integers(len(extreme)))]
            data[at : at + 4] = struct.pack(order + "I", number)[: n - at]
    elif how == "splice":
        data[at:] = other[min(at, len(other)) :]
    elif how == "shuffle":
        parts = [bytes(data[i : i + length]) for i in range(at, n, length)]
        rng.shuffle(parts)
        data[at:] = b"".join(parts)
    return bytes(data)


def mutated(
    files: dict[str, bytes], count: int, rng: np.random.Generator
) -> Iterator[tuple[str, bytes]]:
    """(what, file) for ``count`` files: every format with every mutation in turn."""
    names = list(files)
    for number in range(count):
        how = MUTATIONS[number % len(MUTATIONS)]
        name = names[number // len(MUTATIONS) % len(names)]
        other = files[names[int(rng.integers(len(names)))]]
        yield f"{name}, {how}, {number}", mutate(files[name], how, rng, other)


def png(width: int, height: int, depth: int, kind: int, body: bytes, *more: Any) -> bytes:
    """A PNG of given header and data; more: (name, body) of chunks before the data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), *more, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def zeros(count: int) -> bytes:
    """So many zero bytes, deflated: about a thousandth."""
    packer, block = zlib.compressobj(9), bytes(2**20)
    parts = [packer.compress(block[: min(2**20, count - i)]) for i in range(0, count, 2**20)]
    return b"".join(parts) + packer.flush()


def scans(side: int, count: int) -> bytes:
    """A progressive JPEG with so many empty scans, each of which costs the time of a whole picture."""
    raw = encode(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = raw.rfind(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * count + raw[-2:]


def bombs(large: bool) -> Iterator[tuple[str, bytes, str]]:
    """(what, file, fate): small files that become large. fate: picture | refused.

    large: also those at the limit of pixels, which are read and take gigabytes.
    """
    dot, packed = zeros(8 * 25), zeros(10**9 if large else 10**7)
    yield "png, 30000 x 30000", png(30000, 30000, 8, 2, zeros(10**6)), "refused"
    yield "png, 2^31 x 2^31", png(2**31 - 1, 2**31 - 1, 16, 6, zeros(10**6)), "refused"
    yield "png, long text", png(8, 8, 8, 2, dot, (b"zTXt", b"a\0\0" + packed)), "refused"
    profile = (b"iCCP", b"a\0\0" + packed)
    yield "png, long profile", png(8, 8, 8, 2, dot, profile), "refused"
    texts = [(b"zTXt", b"a%d\0\0" % i + zeros(10**6)) for i in range(90)]
    yield "png, 90 texts of 1 MB", png(8, 8, 8, 2, dot, *texts), "refused"
    yield "jpeg, 1000 scans", scans(2000, 1000), "refused"
    rows = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (2**40, 9, 3)}
    np.lib.format.write_array_header_1_0(rows, header)
    yield "npy, 2^40 rows", rows.getvalue() + bytes(243), "refused"
    yield "ppm, 60000 x 60000", b"P6 60000 60000 255\n" + bytes(10**6), "refused"
    tall = struct.pack("<ii", 9, 2**31 - 1)
    bmp = encode(Image.new("RGB", (9, 9)), "BMP").replace(struct.pack("<ii", 9, 9), tall)
    yield "bmp, 2^31 rows", bmp, "refused"
    many = [Image.new("P", (300, 300), i % 7) for i in range(1000)]
    yield "gif, 1000 frames", encode(many[0], "GIF", save_all=True, append_images=many[1:]), "picture"  # fmt: skip
    strip = png(8_000_000, 1, 8, 2, zeros(3 * 8_000_000 + 1))
    yield "png, 8000000 x 1", strip, "picture"
    if not large:
        return
    side = 13377  # 178,944,129 pixels: the largest square below the limit
    for what, depth, colours, size in (
        ("rgb", 8, 2, 3), ("rgba", 8, 6, 4), ("rgba of 16 bit", 16, 6, 8), ("grey of 16 bit", 16, 0, 2),
    ):  # fmt: skip
        body = zeros(side * (size * side + 1))
        yield f"png, {side} x {side}, {what}", png(side, side, depth, colours, body), "picture"
    full = Image.new("RGB", (side, side))
    for kind in ("JPEG", "WEBP", "GIF", "TIFF"):
        options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
        yield f"{kind.lower()}, {side} x {side}", encode(full, kind, **options), "picture"
    yield f"jpeg, {side} x {side}, cmyk", encode(Image.new("CMYK", full.size), "JPEG"), "picture"
    yield f"jpeg, {side} x {side}, 90 scans", scans(side, 80), "picture"
