"""Bytes to pixels: one image file of any common kind becomes uint8 (H, W, C), or a BadImage.

Rules, the same for every source: EXIF orientation is applied; samples of more than 8 bits are scaled by
limits, measured over the data (`measure_limits`) or given; an animation gives its first frame; an alpha channel
is dropped, not composited (what Pillow's and torchvision's RGB loaders do); a file that ends early is refused,
never half grey.
"""

import functools
import io
import math
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

import numpy as np
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data import jpeg
from cmt_mae.data.jpeg import orientation_of, read_header
from cmt_mae.data.source import MAX_PIXELS, BadImage, Limits, Source, even

_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff .ppm .pgm .pbm .jp2 .avif .tga .npy"
)
_LIBRARIES = {
    ".heic": "pillow_heif",
    ".heif": "pillow_heif",
    ".jxl": "pillow_jxl",
    ".dcm": "pydicom",
}
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split()) | {
    suffix for suffix, library in _LIBRARIES.items() if find_spec(library) is not None
}
# Named one by one: EPS and the like would start other programs.
_FORMATS = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "HEIF", "JXL",
)  # fmt: skip
_TIFF_AXES = ("YX", "YXS", "SYX")
MEASURED, MEASURED_BYTES = 32, 2**28
"""Images, and bytes of them at most, whose values are looked at to find how many bits they fill."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    raw: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS, limits: Limits | None = None
) -> np.ndarray:
    """Decode one image file given as bytes to uint8 (H, W, channels).

    channels 1: grey (ITU-R 601 luma of colour images); 3: RGB; another n: multi-channel TIFF (a page a channel
    too), or a NumPy .npy file of shape (H, W, n) (also accepted for 1 and 3).
    limits: values that become 0 and 255 in samples of more than 8 bits; None: all that 16 bits hold.
    Raises BadImage with the reason, and InputError only when multi-channel TIFF needs tifffile and
    it is not installed.
    """
    try:
        if channels == 3 and (picture := _decode_jpeg(raw, max_pixels)) is not None:
            return picture
        return _fit_channels(_to_bytes(_decode(raw, channels, max_pixels), limits), channels)
    except (BadImage, InputError):
        raise
    except Image.UnidentifiedImageError:
        more = "; pip install tifffile reads more kinds of TIFF" if _is_tiff(raw) else ""
        raise BadImage(
            f"not an image that can be read (it begins with {raw[:8]!r}){more}"
        ) from None
    except Exception as error:  # plug-ins raise SyntaxError, struct.error, ValueError, ... alike
        reason = " ".join(str(error).split())[:200]
        raise BadImage(f"{type(error).__name__}: {reason}") from None


def _decode(raw: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """(H, W, C) as the file has it, of any kind of number; exceptions pass through."""
    if not raw:
        raise BadImage("the file is empty")
    if raw[:6] == b"\x93NUMPY":
        return _decode_npy(raw, max_pixels)
    if raw[128:132] == b"DICM" and find_spec("pydicom") is not None:
        return _decode_dicom(raw, max_pixels)
    with warnings.catch_warnings():
        # Pillow warns of broken EXIF and of size; both are dealt with here.
        warnings.simplefilter("ignore")
        paged = channels == 3 == _grey_pages(raw) and find_spec("tifffile") is not None
        if _is_tiff(raw) and (channels not in (1, 3) or _is_wide_tiff(raw) or paged):
            return _decode_tiff(raw, channels, max_pixels)
        return _decode_pillow(raw, channels, max_pixels)


def measure_limits(source: Source) -> tuple[Limits | None, str]:
    """Limits of images of more than 8 bits, from the values of some of them, and a line about it for people.

    The line also says where TIFFs have several pages, which are channels only for a network of as many.
    Of 99.9 % of the values the largest, rounded up to all ones in binary (4095, 65535), or to 1 for fractions; 0,
    or below it the same for negative ones. None: no such images, or they fill 16 bits.
    """
    low, high, whole, size, pages = 0.0, 0.0, True, 0, 1
    for index in even(len(source), MEASURED):
        try:
            raw = source.read(index)
            if not isinstance(raw, bytes) or raw[:2] == b"\xff\xd8" or size > MEASURED_BYTES:
                continue
            size += len(raw)
            pages = max(pages, _grey_pages(raw))
            values = _decode(raw, 0 if raw[:2] in (b"II", b"MM") else 3, MAX_PIXELS)
        except Exception:  # it is named where it is used
            continue
        if values.dtype == np.uint8 and not _is_colour_png16(raw):
            continue
        if _is_colour_png16(raw) and values.max() < 32:
            raise InputError(
                f"{source.name(index)}: a colour PNG of 16 bits that fills {8 + _bits(float(values.max()))} "
                "of them; Pillow reads 8 bits of it: save such images as TIFF or .npy"
            )
        if values.dtype == np.uint8 or not np.isfinite(values).all():
            continue
        whole = whole and values.dtype.kind != "f"
        part = np.nanquantile(values[:: max(1, len(values) // 256)], (0.001, 0.999))
        low, high = min(low, float(part[0])), max(high, float(part[1]))
    said = []
    if pages > 1:
        said.append(
            f"TIFFs of {pages} pages: each is a channel where {pages} are wanted, else the first is read"
        )
    if high == low:
        return None, "".join(said)
    limits = (-_ones(-low, whole) if low < 0 else 0.0, _ones(high, whole))
    if limits == (0.0, 65535.0):
        return None, "".join(said)
    said.append(
        f"images of more than 8 bits hold values from {low:g} to {high:g}: {limits[0]:g} becomes black, "
        f"{limits[1]:g} white (the setting range says otherwise)"
    )
    return limits, "; ".join(said)


def _bits(value: float) -> int:
    return max(1, math.ceil(math.log2(value + 1)))


def _ones(value: float, whole: bool) -> float:
    """1 for fractions up to 1, else the next 2^k - 1, 255 at least."""
    return 1.0 if not whole and value <= 1 else float(2 ** max(8, _bits(value)) - 1)


def _decode_jpeg(raw: bytes, max_pixels: int) -> np.ndarray | None:
    """An ordinary JPEG by simplejpeg, with Pillow's pixels; None: for Pillow, or for it to refuse."""
    header = read_header(raw, max_pixels) if jpeg.simplejpeg is not None else None
    return None if header is None else jpeg.decode(raw, header)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The allowed formats that this build of Pillow and the libraries beside it have."""
    Image.init()
    if find_spec("pillow_heif") is not None:
        import_module("pillow_heif").register_heif_opener()
    if find_spec("pillow_jxl") is not None:
        import_module("pillow_jxl")
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _decode_pillow(raw: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """Decode through Pillow; its exceptions pass through."""
    if raw[:2] == b"\xff\xd8" and jpeg.too_many_scans(raw):
        raise BadImage(f"JPEG of over {jpeg.MAX_SCANS} scans, which would take minutes")
    with Image.open(io.BytesIO(raw), formats=_formats()) as image:
        if image.width * image.height > max_pixels:
            raise BadImage(f"{image.width} x {image.height} pixels, over the limit of {max_pixels}")
        image.load()
        turn = _TURNS.get(orientation_of(image))
        upright = image.transpose(turn) if turn is not None else image
        return _to_array(upright, channels)


def _to_array(image: Image.Image, channels: int) -> np.ndarray:
    """A loaded Pillow image of any mode as (H, W, C)."""
    mode = image.mode
    if mode in ("F", "I") or mode.startswith("I;16"):
        return np.asarray(image)[:, :, None]
    if channels in (1, 3):
        # Transparency of a palette or a colour key: dropped like any alpha, without a warning.
        image.info.pop("transparency", None)
        wanted = "RGB" if channels == 3 else "L"
        array = np.asarray(image if mode == wanted else image.convert(wanted))
        return array[:, :, None] if channels == 1 else array
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def _to_bytes(array: np.ndarray, limits: Limits | None) -> np.ndarray:
    """Values of any kind as uint8, rounded; beyond the limits they are clipped."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadImage("some pixels are not finite numbers; save them as numbers")
    if limits is None:
        if array.dtype.kind == "f" or array.min() < 0 or array.max() > 65535:
            raise BadImage(
                f"{array.dtype} pixels have no known range; give the setting range, or save uint8 or uint16"
            )
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = limits
    scaled = (array.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    return (scaled.clip(0, 255) + np.float32(0.5)).astype(np.uint8)


def _decode_npy(raw: bytes, max_pixels: int) -> np.ndarray:
    """A .npy file as (H, W, C). No pickles; shape and length are checked first."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise BadImage(f".npy format {version} is not supported")
    shape, fortran, dtype = read_header(file)
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype.kind not in "uif":
        raise BadImage(f".npy holds {dtype} {shape}; wanted numbers (H, W[, C])")
    if shape[0] * shape[1] > max_pixels:
        raise BadImage(f"{shape[1]} x {shape[0]} pixels, over the limit of {max_pixels}")
    body = raw[file.tell() :]
    count = int(np.prod(shape, dtype=np.int64))
    if len(body) < count * dtype.itemsize:
        raise BadImage(".npy file ends early")
    array = np.frombuffer(body, dtype=dtype, count=count)
    array = array.reshape(shape, order="F" if fortran else "C")
    return array[:, :, None] if array.ndim == 2 else array


def _is_tiff(raw: bytes) -> bool:
    return raw[:4] in (b"II*\0", b"MM\0*")


def _grey_pages(raw: bytes) -> int:
    """Pages of a TIFF of one channel; 1 for all else."""
    if not _is_tiff(raw):
        return 1
    with suppress(Exception), Image.open(io.BytesIO(raw), formats=("TIFF",)) as image:
        if len(image.getbands()) == 1 and image.mode != "P":
            return int(getattr(image, "n_frames", 1))
    return 1


def _is_wide_tiff(raw: bytes) -> bool:
    """Whether a TIFF has several samples of more than 8 bits a pixel, of which Pillow would read 8, or floats."""
    try:
        with Image.open(io.BytesIO(raw), formats=("TIFF",)) as image:
            bits = image.tag_v2.get(258, (8,))  # type: ignore[attr-defined]
            wide = len(bits) > 1 and max(bits) > 8
    except Image.UnidentifiedImageError:
        wide = True
    return wide and find_spec("tifffile") is not None


def _is_colour_png16(raw: bytes) -> bool:
    return raw[:8] == b"\x89PNG\r\n\x1a\n" and raw[24:25] == b"\x10" and raw[25] & 2 > 0


def _decode_tiff(raw: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """The first page of a TIFF with any number of channels, or so many grey pages, as (H, W, C)."""
    try:
        import tifffile
    except ImportError:
        raise InputError("multi-channel TIFF needs tifffile: pip install tifffile") from None
    with tifffile.TiffFile(io.BytesIO(raw)) as tiff:
        page = tiff.pages.first
        count = len(tiff.pages)
        stacked = page.axes == "YX" and count > 1 and channels in (0, count)
        if page.imagewidth * page.imagelength * (count if stacked else 1) > max_pixels:
            raise BadImage(f"{page.imagewidth} x {page.imagelength} pixels, over the limit")
        if page.dtype is None or page.dtype.kind not in "uif" or page.axes not in _TIFF_AXES:
            raise BadImage(
                f"TIFF holds {page.dtype} with axes {page.axes}; wanted numbers, YX or YXS"
            )
        if stacked:
            pages = [one.asarray() for one in tiff.pages]
            if any(one.shape != pages[0].shape or one.ndim != 2 for one in pages):
                raise BadImage(f"a TIFF of {count} pages that are no channels of one picture")
            return np.stack(pages, axis=2)
        array = page.asarray()
    if page.axes == "YX":
        return array[:, :, None]
    array = array.transpose(1, 2, 0) if page.axes == "SYX" else array
    return array[:, :, :3] if channels in (1, 3) else array  # alpha is dropped


def _decode_dicom(raw: bytes, max_pixels: int) -> np.ndarray:
    """The first frame of a DICOM file as (H, W, C): modality values (Hounsfield units), or colours."""
    import pydicom
    from pydicom.pixels import apply_modality_lut

    file = pydicom.dcmread(io.BytesIO(raw))
    if int(file.Rows) * int(file.Columns) > max_pixels:
        raise BadImage(f"{file.Columns} x {file.Rows} pixels, over the limit")
    array = file.pixel_array
    if int(getattr(file, "NumberOfFrames", 1) or 1) > 1:
        array = array[0]
    if array.ndim == 3:
        return array
    array = np.asarray(apply_modality_lut(array, file))
    if array.dtype.kind == "f" and (array == np.rint(array)).all():
        array = array.astype(np.int32)
    if file.PhotometricInterpretation == "MONOCHROME1":
        array = -array.astype(np.int32)
    return array[:, :, None]


def _fit_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) to (H, W, channels): equal, or grey repeated to RGB; else a BadImage."""
    have = array.shape[2]
    if have == channels:
        return array
    if have == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    if have == 3 and channels == 1:
        return np.asarray(Image.fromarray(array).convert("L"))[:, :, None]
    raise BadImage(f"{have} channels where {channels} are wanted")
