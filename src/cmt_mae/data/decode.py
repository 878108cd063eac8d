"""Bytes to pixels: one image file of any common kind becomes uint8 (H, W, C), or a BadImage.

Rules, the same for every source: EXIF orientation is applied; 16-bit samples are scaled to 8 bit,
not clipped; an animation gives its first frame; an alpha channel is dropped, not composited (what
Pillow's and torchvision's RGB loaders do); a file that ends early is refused, never half grey.
"""

import functools
import io
import warnings

import numpy as np
from PIL import Image

from cmt_mae.core.errors import InputError
from cmt_mae.data import jpeg
from cmt_mae.data.jpeg import orientation_of, read_header

# What Pillow refuses by itself (twice its MAX_IMAGE_PIXELS): one limit, and no global is changed.
MAX_PIXELS = 178_956_970

_SUFFIXES = ".jpg .jpeg .jpe .png .gif .webp .bmp .tif .tiff .ppm .pgm .pbm .jp2 .avif .tga .npy"
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
# Named one by one: EPS and the like would start other programs.
_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """One image cannot be read; str() is the reason. The run goes on without it."""


def decode_image(raw: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode one image file given as bytes to uint8 (H, W, channels).

    channels 1: grey (ITU-R 601 luma of colour images); 3: RGB; another n: multi-channel TIFF, or a
    NumPy .npy file of shape (H, W, n), uint8 or uint16 (also accepted for 1 and 3).
    Raises BadImage with the reason, and InputError only when multi-channel TIFF needs tifffile and
    it is not installed.
    """
    try:
        if not raw:
            raise BadImage("the file is empty")
        if raw[:6] == b"\x93NUMPY":
            return _fit_channels(_decode_npy(raw, max_pixels), channels)
        if channels not in (1, 3) and raw[:4] in (b"II*\0", b"MM\0*"):
            return _fit_channels(_decode_tiff(raw, max_pixels), channels)
        if channels == 3 and (picture := _decode_jpeg(raw, max_pixels)) is not None:
            return picture
        with warnings.catch_warnings():
            # Pillow warns of broken EXIF and of size; both are dealt with here.
            warnings.simplefilter("ignore")
            return _decode_pillow(raw, channels, max_pixels)
    except (BadImage, InputError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image that can be read (it begins with {raw[:8]!r})") from None
    except Exception as error:  # plug-ins raise SyntaxError, struct.error, ValueError, ... alike
        reason = " ".join(str(error).split())[:200]
        raise BadImage(f"{type(error).__name__}: {reason}") from None


def _decode_jpeg(raw: bytes, max_pixels: int) -> np.ndarray | None:
    """An ordinary JPEG by simplejpeg, with Pillow's pixels; None: for Pillow, or for it to refuse."""
    header = read_header(raw, max_pixels) if jpeg.simplejpeg is not None else None
    return None if header is None else jpeg.decode(raw, header)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The allowed formats that this build of Pillow has."""
    Image.init()
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
    """A loaded Pillow image of any mode as uint8 (H, W, channels)."""
    mode = image.mode
    if mode == "F":
        raise BadImage("float pixels have no known range; save the image as uint8 or uint16")
    if mode == "I" or mode.startswith("I;16"):
        wide = np.asarray(image)
        if wide.size and (wide.min() < 0 or wide.max() > 65535):
            raise BadImage("32-bit pixels have no known range; save the image as uint8 or uint16")
        return _fit_channels(_scale16(wide)[:, :, None], channels)
    if channels in (1, 3):
        # Transparency of a palette or a colour key: dropped like any alpha, without a warning.
        image.info.pop("transparency", None)
        wanted = "RGB" if channels == 3 else "L"
        array = np.asarray(image if mode == wanted else image.convert(wanted))
        return array[:, :, None] if channels == 1 else array
    array = np.asarray(image)
    return _fit_channels(array if array.ndim == 3 else array[:, :, None], channels)


def _scale16(wide: np.ndarray) -> np.ndarray:
    """Values 0..65535 to 0..255, rounded: 65535 / 255 = 257."""
    return ((wide.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _decode_npy(raw: bytes, max_pixels: int) -> np.ndarray:
    """A .npy file to uint8 (H, W, C). No pickles; shape and length are checked first."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise BadImage(f".npy format {version} is not supported")
    shape, fortran, dtype = read_header(file)
    if len(shape) not in (2, 3) or min(shape) < 1 or dtype not in (np.uint8, np.uint16):
        raise BadImage(f".npy holds {dtype} {shape}; wanted uint8 or uint16 (H, W[, C])")
    if shape[0] * shape[1] > max_pixels:
        raise BadImage(f"{shape[1]} x {shape[0]} pixels, over the limit of {max_pixels}")
    body = raw[file.tell() :]
    count = int(np.prod(shape, dtype=np.int64))
    if len(body) < count * dtype.itemsize:
        raise BadImage(".npy file ends early")
    array = np.frombuffer(body, dtype=dtype, count=count)
    array = array.reshape(shape, order="F" if fortran else "C")
    if array.ndim == 2:
        array = array[:, :, None]
    return array if array.dtype == np.uint8 else _scale16(array)


def _decode_tiff(raw: bytes, max_pixels: int) -> np.ndarray:
    """The first page of a TIFF with any number of channels to uint8 (H, W, C)."""
    try:
        import tifffile
    except ImportError:
        raise InputError("multi-channel TIFF needs tifffile: pip install tifffile") from None
    with tifffile.TiffFile(io.BytesIO(raw)) as tiff:
        page = tiff.pages.first
        if page.imagewidth * page.imagelength > max_pixels:
            raise BadImage(f"{page.imagewidth} x {page.imagelength} pixels, over the limit")
        if page.dtype not in (np.uint8, np.uint16) or page.axes not in ("YX", "YXS", "SYX"):
            raise BadImage(f"TIFF holds {page.dtype} with axes {page.axes}; wanted uint8 or uint16")
        array = page.asarray()
    if page.axes == "YX":
        array = array[:, :, None]
    elif page.axes == "SYX":
        array = array.transpose(1, 2, 0)
    return array if array.dtype == np.uint8 else _scale16(array)


def _fit_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """(H, W, C) to (H, W, channels): equal, or grey repeated to RGB; else a BadImage."""
    have = array.shape[2]
    if have == channels:
        return array
    if have == 1 and channels == 3:
        return np.repeat(array, 3, axis=2)
    raise BadImage(f"{have} channels where {channels} are wanted")
