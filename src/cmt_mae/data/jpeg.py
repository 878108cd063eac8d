"""Ordinary JPEG files read fast: the size first, then only the rows that a crop needs.

`read_header` gives the size without decoding, so a crop can be drawn before the file is decoded. The
Huffman code has to be read from the top, but decoding may stop below the crop: `decode` writes a smaller
height into a copy of the frame header, which every libjpeg understands. The pixels are those of the
whole picture, bit for bit. Decoding at 1/2, 1/4 or 1/8 (libjpeg's scaled DCT) is the only thing here
that changes pixels, and it is chosen by `shrink`.

simplejpeg (libjpeg-turbo without detours) decodes where it is installed, else Pillow: equal pixels.
"""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

# A crop is decoded at 1/k only where 1/k of it is still so many times as large as wanted. On 60 photos
# the crop is then 0.7 to 1.0 grey levels on average (1.8 at worst) from the crop of the whole picture;
# with 1.5 it is 1.1 to 1.6 (3.4), with 1 it is 1.8 to 2.0 (6.5).
SHRINK_MARGIN = 2

# Orientation -> whether the stored rows are upside down, the columns reversed, both then exchanged.
_TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
MAX_SCANS = 100
# A row that no picture has.
_MARK = np.random.default_rng(0).integers(0, 256, 3 * 64, dtype=np.uint8)
_FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman code: baseline, extended, progressive
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)


@dataclass(frozen=True)
class Header:
    """What the header of a JPEG file says."""

    stored: tuple[int, int]
    """Height and width of the stored picture."""
    orientation: int
    """EXIF orientation, 1 to 8."""
    frame: int
    """Place of the frame header in the file."""
    step: int
    """Pixel rows that are coded together, 8 or 16 (32 at most)."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        height, width = self.stored
        return (width, height) if _TURNS[self.orientation][2] else (height, width)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation; 1 when there is none or the EXIF block, not the picture, is broken."""
    try:
        value = image.getexif().get(0x0112, 1)
        return value if value in _TURNS else 1
    except Exception:
        return 1


def read_header(raw: bytes, max_pixels: int) -> Header | None:
    """The header of a whole JPEG file of an ordinary kind: 8 bit, Huffman code, grey or three channels.

    None for every other file, for one that ends early and for one of over max_pixels: these are for
    `decode.decode_image`.
    """
    if raw[:2] != b"\xff\xd8":
        return None
    try:
        header = _walk(raw)
    except IndexError:  # ends within the header
        return None
    if header is None or header.stored[0] * header.stored[1] > max_pixels:
        return None
    return header


def too_many_scans(raw: bytes) -> bool:
    """Whether the file holds more than MAX_SCANS: cameras and programs write up to 20 for a picture, and a
    thousand empty ones, a few bytes each, would keep the decoder busy for minutes."""
    return raw.count(b"\xff\xda") > MAX_SCANS


def _walk(raw: bytes) -> Header | None:
    """Segment by segment up to the first scan."""
    place, frame, described = 2, 0, False
    while True:
        if raw[place] != 0xFF:
            return None
        marker = raw[place + 1]
        if marker == 0xDA:
            break
        if marker in _FRAMES and not frame:
            frame = place
        elif marker in _FRAMES or marker in _OTHER_FRAMES or not 0xC0 <= marker <= 0xFE:
            return None
        described = described or marker == 0xE1
        place += 2 + (raw[place + 2] << 8 | raw[place + 3])
    # The code never holds FF D9 but as its end: a file without it was cut off.
    if not frame or raw.rfind(b"\xff\xd9", place) < 0:
        return None
    precision, count = raw[frame + 4], raw[frame + 9]
    height = raw[frame + 5] << 8 | raw[frame + 6]
    width = raw[frame + 7] << 8 | raw[frame + 8]
    if precision != 8 or count not in (1, 3) or not height or not width:
        return None
    if raw[frame + 1] == 0xC2 and too_many_scans(raw):
        return None
    vertical = [raw[frame + 11 + 3 * one] & 15 for one in range(count)]
    return Header((height, width), _described(raw) if described else 1, frame, 8 * max(vertical))


def _described(raw: bytes) -> int:
    """The orientation in the EXIF or XMP block, as Pillow reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken EXIF
        try:
            with Image.open(io.BytesIO(raw), formats=("JPEG", "MPO")) as image:
                return orientation_of(image)
        except Exception:
            return 1


def choose_shrink(box: Box, sizes: list[tuple[int, int]]) -> int:
    """The largest k of 8, 4, 2, 1 with which 1/k of the box is large enough for all sizes."""
    height, width = box[2:]
    for k in (8, 4, 2):
        least = k * SHRINK_MARGIN
        if all(height >= least * h and width >= least * w for h, w in sizes):
            return k
    return 1


def stored_box(header: Header, box: Box, shrink: int = 1) -> Box:
    """A box of the upright picture as one of the stored picture at 1/shrink, to the nearest pixel."""
    down, back, swap = _TURNS[header.orientation]
    top, left, h, w = box
    if swap:
        top, left, h, w = left, top, w, h
    height, width = header.stored
    if down:
        top = height - top - h
    if back:
        left = width - left - w
    if shrink == 1:
        return top, left, h, w
    # A last row or column of which the picture has only a part is left out.
    height, width = max(1, height // shrink), max(1, width // shrink)
    h, w = min(max(1, round(h / shrink)), height), min(max(1, round(w / shrink)), width)
    return min(round(top / shrink), height - h), min(round(left / shrink), width - w), h, w


def decode(
    raw: bytes,
    header: Header,
    box: Box | None = None,
    shrink: int = 1,
    scratch: np.ndarray | None = None,
) -> np.ndarray | None:
    """The box (None: all) of the upright picture as uint8 (h, w, 3); with shrink k 1/k as large.

    None where the decoder refuses the file: `decode.decode_image` then says why. Damage below the box
    goes unnoticed. scratch: flat uint8 memory in which the result may lie, for a result that is copied
    before the next call: the memory of a new array would have to be fetched page by page.
    """
    height, width = header.stored
    place = (0, 0, -(-height // shrink), -(-width // shrink))
    if box is not None:
        place = stored_box(header, box, shrink)
    top, left, h, w = place
    # The rows after the last one needed bear on it where colour has half the rows: one step more.
    rows = (-(-((top + h) * shrink) // header.step) + 1) * header.step
    try:
        if rows < height:
            array = _decode(
                _shortened(raw, header.frame, rows), rows, width, shrink, False, scratch
            )
        else:
            array = _decode(raw, height, width, shrink, True, scratch)
    except (
        Exception
    ):  # ValueError, OSError, SyntaxError, struct.error, ...: the plain path reports it
        return None
    down, back, swap = _TURNS[header.orientation]
    piece = array[top : top + h, left : left + w]
    piece = piece[:: -1 if down else 1, :: -1 if back else 1]
    return piece.swapaxes(0, 1) if swap else piece


def _shortened(raw: bytes, frame: int, rows: int) -> bytearray:
    """The file with another height in its frame header."""
    data = bytearray(raw)
    data[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
    return data


def _decode(
    raw: bytes | bytearray,
    height: int,
    width: int,
    shrink: int,
    strict: bool,
    scratch: np.ndarray | None,
) -> np.ndarray:
    """The stored picture, height x width, at 1/shrink, rounded up. Exceptions pass through.

    strict: what libjpeg warns of is an error (with Pillow it never is).
    """
    wanted = (-(-height // shrink), -(-width // shrink), 3)
    if simplejpeg is not None:
        array = _decode_turbo(raw, wanted, shrink, strict, scratch)
    else:
        with Image.open(io.BytesIO(raw), formats=("JPEG", "MPO")) as image:
            image.draft("RGB", (width // shrink, height // shrink))
            array = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    if array.shape != wanted:
        raise ValueError(f"decoded to {array.shape} where the header says {wanted}")
    return array


def _decode_turbo(
    raw: bytes | bytearray,
    wanted: tuple[int, int, int],
    shrink: int,
    strict: bool,
    scratch: np.ndarray | None,
) -> np.ndarray:
    """As `_decode`, by simplejpeg.

    Of a shortened file libjpeg warns, for bytes are left over; and where simplejpeg lets warnings pass
    it lets an error pass that comes after one. But rows are written from the top: once the last one
    has been, there was no error.
    """
    count = wanted[0] * wanted[1] * wanted[2]
    if scratch is None or scratch.size < count:
        scratch = np.empty(count, dtype=np.uint8)
    array = scratch[:count].reshape(wanted)
    mark = np.resize(_MARK, wanted[1:])
    array[-1] = mark
    found: np.ndarray = simplejpeg.decode_jpeg(
        raw, "RGB", min_height=wanted[0], min_width=wanted[1], min_factor=shrink, buffer=array,
        strict=strict,
    )  # fmt: skip
    if found.shape == wanted and np.array_equal(found[-1], mark):
        raise ValueError("the code breaks off")
    return found
