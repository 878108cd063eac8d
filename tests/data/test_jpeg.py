"""The fast JPEG path against Pillow: equal bit for bit, and near at 1/2, 1/4 and 1/8."""

import io
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cmt_mae.data import jpeg
from cmt_mae.data.centre import resize
from cmt_mae.data.crops import crop_box, cut, sample_rng
from cmt_mae.data.decode import decode_image
from cmt_mae.data.folder import open_folder
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.source import MAX_PIXELS, BadImage
from cmt_mae.data.steps import order

pytestmark = pytest.mark.filterwarnings("error")
DECODERS = ["simplejpeg", "Pillow"]


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both decoders in turn."""
    if request.param == "Pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    elif jpeg.simplejpeg is None:
        pytest.skip("needs simplejpeg, which is not installed")
    return str(request.param)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (2 + height // 9, 2 + width // 9, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height))).astype(int)
    noisy = smooth + rng.integers(-30, 30, smooth.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encode(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, **options)
    return file.getvalue()


def header_of(raw: bytes) -> jpeg.Header:
    header = jpeg.read_header(raw, MAX_PIXELS)
    assert header is not None
    return header


def by_pillow(raw: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


KINDS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "progressive 4:4:4": {"progressive": True, "subsampling": 0},
    "restart markers": {"restart_marker_blocks": 3},
    "stored as RGB": {"keep_rgb": True},
    "low quality": {"quality": 5},
}


@pytest.mark.parametrize("kind", [*KINDS, "grey"])
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 8), st.tuples(*[st.floats(0, 0.99)] * 4)
)
@settings(max_examples=25, deadline=None)
def test_every_box_is_pillows(
    kind: str, height: int, width: int, orientation: int, u: tuple[float, ...]
) -> None:
    image = picture(height, width)
    raw = encode(
        image.convert("L") if kind == "grey" else image, orientation, **KINDS.get(kind, {})
    )
    header, expected = header_of(raw), by_pillow(raw)
    height, width = header.size
    assert (height, width, 3) == expected.shape
    top, left = int(u[0] * height), int(u[1] * width)
    h, w = 1 + int(u[2] * (height - top)), 1 + int(u[3] * (width - left))
    present = jpeg.simplejpeg
    try:
        for jpeg.simplejpeg in {id(one): one for one in (present, None)}.values():
            found = jpeg.decode(raw, header, (top, left, h, w))
            assert np.array_equal(found, expected[top : top + h, left : left + w])
            assert np.array_equal(jpeg.decode(raw, header), expected)
            for count in (100, 90 * 90 * 3):  # too small, and large enough
                scratch = np.empty(count, np.uint8)
                found = jpeg.decode(raw, header, (top, left, h, w), 1, scratch)
                assert np.array_equal(found, expected[top : top + h, left : left + w])
    finally:
        jpeg.simplejpeg = present


def test_files_for_the_plain_path() -> None:
    image = picture(40, 30)
    raw = encode(image)
    frame = header_of(raw).frame
    other = {
        "cmyk": encode(image.convert("CMYK")),
        "png": b"\x89PNG" + raw[4:],
        "cut in the header": raw[: frame + 8],
        "cut in the code": raw[:-2],
        "nothing": b"",
        "12 bit": raw[: frame + 4] + b"\x0c" + raw[frame + 5 :],
        "arithmetic code": raw[: frame + 1] + b"\xc9" + raw[frame + 2 :],
        "height at the end": raw[: frame + 5] + b"\0\0" + raw[frame + 7 :],
        "two frames": raw[:frame] + raw[frame : frame + 19] + raw[frame:],
    }
    for name, data in other.items():
        assert jpeg.read_header(data, MAX_PIXELS) is None, name
    assert jpeg.read_header(raw, 1199) is None
    assert jpeg.read_header(raw, 1200) is not None
    trailer = raw + b"what a camera appends"
    assert np.array_equal(jpeg.decode(trailer, header_of(trailer)), by_pillow(raw))


def test_any_length_but_the_whole_is_for_the_plain_path() -> None:
    raw = encode(picture(40, 30), orientation=6)
    assert not any(jpeg.read_header(raw[:n], MAX_PIXELS) for n in range(len(raw)))


def damaged(seed: int, progressive: bool) -> bytes:
    """A file with a few bytes changed behind its header."""
    rng = np.random.default_rng(seed)
    raw = bytearray(encode(picture(80, 64, seed), quality=80, progressive=progressive))
    for _ in range(rng.integers(1, 5)):
        raw[rng.integers(30, len(raw) - 2)] = rng.integers(0, 256)
    return bytes(raw)


def test_damaged_files_never_show_what_lay_in_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """simplejpeg returns without an error where one came after a warning: rows nobody wrote."""
    pictures = refused = 0
    for seed in range(400):
        raw = damaged(seed, progressive=seed % 3 == 0)
        header = jpeg.read_header(raw, 10**6)
        if header is None:
            continue
        h, w = header.size
        found = []
        for value in (3, 201):
            monkeypatch.setattr(
                jpeg.np, "empty", lambda shape, dtype, value=value: np.full(shape, value, dtype)
            )
            found.append(jpeg.decode(raw, header, (0, 0, (h + 1) // 2, w)))
        monkeypatch.undo()
        assert (found[0] is None) == (found[1] is None)
        refused += found[0] is None
        if found[0] is not None:
            pictures += 1
            assert np.array_equal(found[0], found[1])
    assert min(pictures, refused) > 20


def test_whole_pictures_are_refused_as_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """decode_image of a damaged file: with simplejpeg the same picture or reason as without it."""

    def outcome(raw: bytes) -> Any:
        try:
            return decode_image(raw, max_pixels=10**6).tobytes()
        except BadImage as error:
            return str(error)

    files = [damaged(seed, progressive=seed % 3 == 0) for seed in range(150)]
    fast = [outcome(raw) for raw in files]
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    assert fast == [outcome(raw) for raw in files]
    assert 10 < sum(isinstance(one, str) for one in fast) < 140


def test_choosing_a_scale() -> None:
    """By hand: 8 wants 2 x 8 x 16 = 256 pixels a side."""
    sizes = [(16, 16)]
    sides = {256: 8, 255: 4, 128: 4, 127: 2, 64: 2, 63: 1, 1: 1}
    for side, k in sides.items():
        assert jpeg.choose_shrink((0, 0, side, 256), sizes) == k
        assert jpeg.choose_shrink((0, 0, 256, side), sizes) == k
    assert jpeg.choose_shrink((0, 0, 256, 256), [(16, 16), (33, 20)]) == 2


@given(
    st.integers(64, 900), st.integers(64, 900), st.integers(0, 99), st.integers(1, 8), st.sampled_from([2, 4, 8])
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_boxes_at_a_scale_are_the_nearest(
    height: int, width: int, seed: int, orientation: int, k: int
) -> None:
    header = jpeg.Header((height, width), orientation, 0, 8)
    box = crop_box(sample_rng(seed, 0, 0), *header.size)
    assume(min(box[2:]) >= 4 * k)
    exact = jpeg.stored_box(header, box)
    scaled = jpeg.stored_box(header, box, k)
    assert scaled[0] + scaled[2] <= height // k
    assert scaled[1] + scaled[3] <= width // k
    for a, b in zip(exact, scaled, strict=True):
        assert abs(a - k * b) <= k / 2 + k  # half a pixel of the scale, and one more at the edge
    if exact[0] + exact[2] + k < height and exact[1] + exact[3] + k < width:
        assert all(abs(a - k * b) <= k / 2 for a, b in zip(exact, scaled, strict=True))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_scaled_pictures_are_the_same_from_both(
    k: int, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if jpeg.simplejpeg is None:
        pytest.skip("needs simplejpeg, which is not installed")
    for size in [(200, 300), (203, 301), (97, 64)]:
        for options in KINDS.values():
            raw = encode(picture(*size), orientation, **options)
            header = header_of(raw)
            boxes = [(8, 16, header.size[0] // 2, header.size[1] // 2), None]
            turbo = [jpeg.decode(raw, header, box, k) for box in boxes]
            with monkeypatch.context() as patch:
                patch.setattr(jpeg, "simplejpeg", None)
                for box, expected in zip(boxes, turbo, strict=True):
                    assert expected is not None
                    assert np.array_equal(jpeg.decode(raw, header, box, k), expected)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_scaled_crops_of_photos_are_near_the_reference(shared: Path, k: int) -> None:
    """Within 2 grey levels of Pillow's antialiased crop, at the largest size for which k is taken."""
    gaps = []
    for path in sorted((shared / "data/photos").iterdir())[::5]:
        raw = path.read_bytes()
        header = header_of(raw)
        height, width = header.size
        box = (height // 8, width // 9, height * 3 // 4, width * 3 // 4)
        size = (box[2] // (2 * k), box[3] // (2 * k))
        if min(size) < 12:
            continue
        assert jpeg.choose_shrink(box, [size]) == k
        piece = jpeg.decode(raw, header, box, k)
        assert piece is not None
        found = resize(cut(piece, (0, 0, *piece.shape[:2])), size).permute(1, 2, 0).numpy()
        # The box that was cut, in the picture's own pixels.
        top, left, h, w = (k * side for side in jpeg.stored_box(header, box, k))
        whole = Image.fromarray(by_pillow(raw)).crop((left, top, left + w, top + h))
        expected = np.asarray(whole.resize(size[::-1], Image.Resampling.BICUBIC))
        gaps.append(np.abs(found.astype(int) - expected).mean())
    assert len(gaps) >= 8
    assert np.mean(gaps) < 1.2
    assert max(gaps) < 2


def loader_batches(folder: Path, count: int, crops: CropSettings) -> list[Any]:
    stream = pretrain_batches(
        open_folder(folder), crops, noise_length=3, seed=4, batch_size=8, micro_batch=8
    )
    return list(islice(stream, count))


def same(a: Any, b: Any) -> bool:
    keys = [key for key in a if a[key] is not None and key != "bad"]
    return a["bad"] == b["bad"] and all(bool((a[key] == b[key]).all()) for key in keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve pictures of all orientations, two of them broken."""
    for number in range(12):
        size = (60 + 9 * number, 150 - 7 * number)
        image = picture(*size, number).resize((3 * size[1], 3 * size[0]))
        raw = encode(image, number % 8 + 1, subsampling=number % 3)
        if number == 3:
            raw = raw[: len(raw) // 2]
        if number == 7:
            raw = raw[: raw.rfind(b"\xff\xda")] + b"\xff\xd9"
        (tmp_path / f"{number:02d}.jpg").write_bytes(raw)
    return tmp_path


@pytest.mark.usefixtures("decoder")
def test_the_loader_draws_the_same_samples_either_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crops = CropSettings((24, 24), second_size=(30, 40))
    fast = loader_batches(folder, 4, crops)
    monkeypatch.setattr(jpeg, "read_header", lambda *_: None)
    monkeypatch.setattr("cmt_mae.data.decode.read_header", lambda *_: None)
    plain = loader_batches(folder, 4, crops)
    assert all(map(same, fast, plain))
    assert {index for batch in plain for index, _, _ in batch["bad"]} == {3, 7}


@pytest.mark.usefixtures("decoder")
def test_the_loader_shrinks_where_it_is_allowed(folder: Path) -> None:
    """Each crop is Pillow's of the box drawn for it, moved to the grid of the scale."""
    crops, compared = CropSettings((8, 8), shrink=True), 0
    for epoch, batch in enumerate(loader_batches(folder, 6, crops)):
        for row, index in enumerate(order(12, 4, epoch)[:8].tolist()):
            if index in (3, 7):
                continue
            assert int(batch["index"][row]) == index
            raw = (folder / f"{index:02d}.jpg").read_bytes()
            header, rng = header_of(raw), sample_rng(4, epoch, index)
            rng.random()
            box = crop_box(rng, *header.size, crops.scale, crops.ratio)
            k = jpeg.choose_shrink(box, [(8, 8)])
            assert k > 1
            if header.orientation == 1:
                top, left, h, w = (k * side for side in jpeg.stored_box(header, box, k))
                whole = Image.fromarray(by_pillow(raw)).crop((left, top, left + w, top + h))
                expected = np.asarray(whole.resize((8, 8), Image.Resampling.BICUBIC)).astype(int)
                found = batch["images"][row].permute(1, 2, 0).numpy()
                assert np.abs(found - expected).mean() < 2
                compared += 1
    assert compared > 3


@pytest.mark.usefixtures("decoder")
def test_the_loader_does_not_shrink_below_the_size_wanted(folder: Path) -> None:
    for size in [(150, 150), (100, 200)]:
        exact = loader_batches(folder, 2, CropSettings(size))
        assert all(map(same, exact, loader_batches(folder, 2, CropSettings(size, shrink=True))))
    small = loader_batches(folder, 2, CropSettings((8, 8), second_size=(150, 150), shrink=True))
    exact = loader_batches(folder, 2, CropSettings((8, 8), second_size=(150, 150)))
    assert all(map(same, exact, small))
