"""Every kind of image file against what Pillow itself says of it, and hostile bytes."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cmt_mae.data.decode import decode_image
from cmt_mae.data.source import BadImage

RNG = np.random.default_rng(0)
COLOUR = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((31, 22), 2)
)
GREY = COLOUR[:, :, 0]


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture_or_reason(raw: bytes) -> np.ndarray | None:
    """The picture, or None after a BadImage with one line of reason. Nothing else may be raised."""
    try:
        return decode_image(raw)
    except BadImage as error:
        reason = str(error)
    assert reason
    assert "\n" not in reason
    return None


def as_rgb(raw: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "JPEG", "WEBP"])
def test_colour_formats(kind: str) -> None:
    raw = encode(Image.fromarray(COLOUR), kind)
    array = decode_image(raw)
    assert array.dtype == np.uint8
    assert array.shape == (22, 31, 3)
    assert np.array_equal(array, as_rgb(raw))
    if kind in ("PNG", "BMP", "TIFF", "PPM", "TGA"):
        assert np.array_equal(array, COLOUR)


def test_grey_both_ways() -> None:
    raw = encode(Image.fromarray(GREY), "PNG")
    assert np.array_equal(decode_image(raw), np.repeat(GREY[:, :, None], 3, 2))
    assert np.array_equal(decode_image(raw, channels=1)[:, :, 0], GREY)
    luma = decode_image(encode(Image.fromarray(COLOUR), "PNG"), channels=1)[:, :, 0]
    assert np.abs(luma - COLOUR @ [0.299, 0.587, 0.114]).max() <= 1


def test_one_bit() -> None:
    raw = encode(Image.fromarray(GREY > 128), "PNG")
    assert np.array_equal(decode_image(raw)[:, :, 1], np.where(GREY > 128, 255, 0))


def test_alpha_is_dropped_not_composited() -> None:
    alpha = np.linspace(0, 255, GREY.size).reshape(GREY.shape).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([COLOUR, alpha]))
    assert np.array_equal(decode_image(encode(rgba, "PNG")), COLOUR)
    la = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    assert np.array_equal(decode_image(encode(la, "PNG"))[:, :, 2], GREY)
    four = decode_image(encode(rgba, "PNG"), channels=4)
    assert np.array_equal(four[:, :, 3], alpha)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 256, 2))])
def test_palette(transparency: Any) -> None:
    image = Image.fromarray(COLOUR).quantize(64)
    options = {} if transparency is None else {"transparency": transparency}
    raw = encode(image, "PNG", **options)
    assert np.array_equal(decode_image(raw), np.asarray(image.convert("RGB")))


def test_cmyk() -> None:
    cmyk = Image.fromarray(COLOUR).convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        array = decode_image(encode(cmyk, kind, quality=100))
        # CMYK made of RGB without a profile goes back to the same colours.
        assert np.abs(array.astype(int) - COLOUR).mean() < 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(kind: str) -> None:
    wide = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    array = decode_image(encode(Image.fromarray(wide), kind))
    assert np.array_equal(array[:, :, 0], np.round(wide / 257).astype(np.uint8))
    assert array.min() == 0
    assert array.max() == 255


def test_16_bit_colour_png_is_scaled() -> None:
    wide = RNG.integers(0, 65536, (6, 7, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", 7, 6, 16, 2, 0, 0, 0)
    array = decode_image(png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    assert np.abs(array - wide / 257).max() <= 1


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        crc = struct.pack(">I", zlib.crc32(name + body))
        out += struct.pack(">I", len(body)) + name + body + crc
    return out


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = encode(Image.fromarray(COLOUR), kind, exif=exif)
    with Image.open(io.BytesIO(raw)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode_image(raw), expected)
    assert decode_image(raw).shape[:2] == ((31, 22) if orientation > 4 else (22, 31))


def test_broken_exif_does_not_lose_the_picture() -> None:
    good = encode(Image.fromarray(COLOUR), "JPEG")
    junk = b"Exif\0\0II*\0" + b"\xff" * 40
    raw = good[:2] + b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk + good[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(decode_image(raw), as_rgb(good))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (9, 8), c) for c in ("red", "green", "blue")]
    raw = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    array = decode_image(raw)
    assert array.shape == (8, 9, 3)
    assert np.abs(array.astype(int) - [255, 0, 0]).max() <= 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_truncated_is_never_half_a_picture(kind: str) -> None:
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    raw = encode(Image.fromarray(noise), kind)
    whole = decode_image(raw)
    for length in range(0, len(raw) - 2, max(1, len(raw) // 60)):
        array = picture_or_reason(raw[:length])
        if array is not None:  # all that was cut off is a trailer
            assert np.array_equal(array, whole)
            assert length > 0.9 * len(raw)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"this is a text\nnamed x.jpg", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (b"\x93NUMPY\x01\x00", "ValueError"),
    ],
)
def test_no_image(raw: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode_image(raw)


def test_pixel_limits() -> None:
    raw = encode(Image.fromarray(COLOUR), "PNG")
    with pytest.raises(BadImage, match="over the limit"):
        decode_image(raw, max_pixels=681)
    decode_image(raw, max_pixels=682)
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    bomb = png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10_000_000)), (b"IEND", b""))
    with pytest.raises(BadImage, match=r"[Bb]omb"):
        decode_image(bomb)


def test_a_jpeg_of_a_thousand_scans() -> None:
    """Each takes a few bytes of the file and the time of a whole picture."""
    raw = encode(Image.fromarray(COLOUR), "JPEG", progressive=True)
    last = raw.rfind(b"\xff\xda")
    assert decode_image(raw[:-2] + raw[last:-2] * 50 + raw[-2:]).shape == (22, 31, 3)
    with pytest.raises(BadImage, match="over 100 scans"):
        decode_image(raw[:-2] + raw[last:-2] * 1000 + raw[-2:])


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_npy_with_any_channels() -> None:
    seven = RNG.integers(0, 256, (5, 6, 7), dtype=np.uint8)
    assert np.array_equal(decode_image(npy(seven), channels=7), seven)
    assert np.array_equal(decode_image(npy(np.asfortranarray(seven)), channels=7), seven)
    wide = seven.astype(np.uint16) * 257
    assert np.array_equal(decode_image(npy(wide), channels=7), seven)
    assert np.array_equal(decode_image(npy(seven[:, :, 0]), channels=1)[:, :, 0], seven[:, :, 0])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.array([[{}]], dtype=object),
    ],
)
def test_npy_that_is_no_image(array: np.ndarray) -> None:
    with pytest.raises(BadImage):
        decode_image(npy(array))


def test_npy_with_a_false_shape() -> None:
    raw = npy(np.zeros((100, 100, 3), np.uint8))
    with pytest.raises(BadImage, match="ends early"):
        decode_image(raw[:-1])
    with pytest.raises(BadImage, match="limit"):
        decode_image(raw.replace(b"(100, 100, 3)", b"(99999,99999,3)".ljust(13)[:15]))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_multi_channel_tiff(planar: str, dtype: type) -> None:
    tifffile = pytest.importorskip("tifffile")
    six = RNG.integers(0, 256, (8, 9, 6)).astype(np.uint8)
    data = six if dtype == np.uint8 else six.astype(np.uint16) * 257
    file = io.BytesIO()
    stored = data if planar == "contig" else data.transpose(2, 0, 1)
    tifffile.imwrite(file, stored, photometric="minisblack", planarconfig=planar)
    assert np.array_equal(decode_image(file.getvalue(), channels=6), six)
    with pytest.raises(BadImage, match="6 channels where 5"):
        decode_image(file.getvalue(), channels=5)


def test_float_and_32_bit_are_refused() -> None:
    for array in (np.zeros((3, 3), np.float32), np.full((3, 3), 70000, np.int32)):
        with pytest.raises(BadImage, match="no known range"):
            decode_image(encode(Image.fromarray(array), "TIFF"))


SEEDS = [
    encode(Image.fromarray(COLOUR), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
] + [npy(COLOUR), encode(Image.fromarray(COLOUR).convert("CMYK"), "JPEG")]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_give_a_picture_or_a_reason(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    array = picture_or_reason(bytes(raw))
    if array is not None:
        assert array.dtype == np.uint8
        assert array.ndim == 3
        assert array.shape[2] == 3


def test_heic_and_jxl_through_other_libraries() -> None:
    """Lossy codecs at high quality: the picture, within a few grey levels on average."""
    smooth = np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)[:, :, None].repeat(3, 2)
    heif = pytest.importorskip("pillow_heif")
    pytest.importorskip("pillow_jxl")
    file = io.BytesIO()
    heif.from_pillow(Image.fromarray(smooth)).save(file, quality=95)
    for raw in (file.getvalue(), encode(Image.fromarray(smooth), "JXL", quality=95)):
        assert abs(decode_image(raw).astype(int) - smooth).mean() < 2


@pytest.mark.parametrize(
    ("kind", "limits"), [("MONOCHROME2", (-1024, 3071)), ("MONOCHROME1", (-3071, 1024))]
)
def test_dicom_by_its_modality_values(kind: str, limits: tuple[float, float]) -> None:
    """Stored 12 bits, Hounsfield units by slope and intercept; MONOCHROME1 has white lowest."""
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    stored = (np.add.outer(np.arange(64), np.arange(48)) * 36).astype(np.uint16)
    picture = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    picture.Rows, picture.Columns, picture.SamplesPerPixel = 64, 48, 1
    picture.PhotometricInterpretation, picture.PixelRepresentation = kind, 0
    picture.BitsAllocated, picture.BitsStored, picture.HighBit = 16, 12, 11
    picture.RescaleSlope, picture.RescaleIntercept = 1, -1024
    picture.PixelData = stored.tobytes()
    file = io.BytesIO()
    picture.save_as(file, enforce_file_format=True)
    shown = decode_image(file.getvalue(), 1, limits=limits)[:, :, 0].astype(float)
    right = stored / 4095 * 255
    np.testing.assert_allclose(shown, right if kind[-1] == "2" else 255 - right, atol=0.51)
