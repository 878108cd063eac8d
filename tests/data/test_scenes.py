"""Generated scenes: the same seed gives the same bytes; ground truth and picture agree."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cmt_mae.core.errors import InputError
from cmt_mae.data.scenes import (
    CLASSES,
    COCO_IDS,
    SEMANTIC_CLASSES,
    Scene,
    render_scene,
    render_video,
    write_ade20k,
    write_coco,
    write_davis,
    write_imagefolder,
)
from cmt_mae.data.scenes.outlines import polygons, run_lengths
from cmt_mae.data.scenes.shapes import Kind, Solid, hull, intersect, normals


def digest(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def fill(polygon_list: list[list[float]], height: int, width: int) -> np.ndarray:
    """Mask whose pixel centres lie in any polygon, drawn by PIL at eight times the size."""
    canvas = Image.new("L", (width * 8, height * 8))
    pen = ImageDraw.Draw(canvas)
    for polygon in polygon_list:
        pen.polygon([c * 8 for c in polygon], fill=1)
    return np.asarray(canvas)[4::8, 4::8].astype(bool)


def decode_rle(segment: dict[str, list[int]]) -> np.ndarray:
    """COCO's uncompressed RLE, from its description: runs of 0 and 1 in turn, down the columns."""
    values = [np.full(n, i % 2, dtype=bool) for i, n in enumerate(segment["counts"])]
    height, width = segment["size"]
    return np.concatenate(values).reshape(width, height).T


# --- solids -----------------------------------------------------------------------------------


def inside(kind: Kind, taper: float, p: np.ndarray) -> np.ndarray:
    """The definition of each unit solid, for points (3, N)."""
    x, y, z = p
    radius = np.hypot(x, z)
    if kind == "box":
        return np.abs(p).max(axis=0) <= 1
    if kind == "sphere":
        return radius**2 + y**2 <= 1
    if kind == "dome":
        return (radius**2 + y**2 <= 1) & (y >= 0)
    if kind == "tube":
        return (np.abs(y) <= 1) & (radius <= 1) & (radius >= taper)
    return (np.abs(y) <= 1) & (radius <= (1 + taper) / 2 + (taper - 1) / 2 * y)


@pytest.mark.parametrize(
    ("kind", "taper"),
    [("sphere", 1), ("dome", 1), ("box", 1), ("frustum", 1), ("frustum", 0.1), ("tube", 0.6)],
)
def test_rays_meet_the_solid_where_a_march_does(kind: Kind, taper: float) -> None:
    rng = np.random.default_rng(0)
    solid = Solid(kind, (1, 1, 1), taper=taper)
    steps = np.arange(0, 6, 4e-3)
    hits = 0
    for _ in range(40):
        origin = rng.normal(size=3)
        origin = (origin / np.linalg.norm(origin) * 2.5).astype(np.float32)
        rays = (rng.uniform(-1, 1, (3, 12)) - origin[:, None]).astype(np.float32)
        rays /= np.linalg.norm(rays, axis=0)
        t = intersect(solid, origin, rays)
        for ray, got in zip(rays.T, t, strict=True):
            marched = inside(kind, taper, origin[:, None] + ray[:, None] * steps)
            if marched.sum() < 3:  # a miss, or an edge too thin for the march to judge
                continue
            assert got == pytest.approx(steps[marched.argmax()], abs=5e-3)
            hits += 1
        seen = np.isfinite(t)
        points = origin[:, None] + rays[:, seen] * t[seen]
        normal = normals(solid, points)
        normal = normal / np.linalg.norm(normal, axis=0)
        # The normal points out: a step along it leaves the solid, one against it enters.
        assert not inside(kind, taper, points + 5e-3 * normal).any()
        assert inside(kind, taper, points - 5e-3 * normal).mean() > 0.95
    assert hits > 100


@pytest.mark.parametrize("kind", ["sphere", "dome", "box", "frustum", "tube"])
def test_hulls_hold_their_solids(kind: Kind) -> None:
    rng = np.random.default_rng(1)
    points = rng.uniform(-1, 1, (3, 4000))
    points = points[:, inside(kind, 0.5, points)]
    directions = rng.normal(size=(200, 3))
    reach = (directions @ hull(kind, 0.5)).max(axis=1)
    assert (reach >= (directions @ points).max(axis=1)).all()


# --- scenes -----------------------------------------------------------------------------------


def assert_true_of_itself(scene: Scene, height: int, width: int) -> None:
    assert scene.image.shape == (height, width, 3)
    assert scene.image.dtype == scene.semantic.dtype == np.uint8
    assert scene.semantic.shape == (height, width)
    assert scene.semantic.max() <= len(SEMANTIC_CLASSES)
    lists = (scene.instance_masks, scene.boxes, scene.classes, scene.crowd)
    assert len({len(part) for part in lists}) == 1
    if scene.instance_masks:
        assert np.sum(scene.instance_masks, axis=0).max() == 1  # no pixel in two things
    for mask, box, kind in zip(scene.instance_masks, scene.boxes, scene.classes, strict=True):
        x, y, w, h = box
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height
        assert mask[y : y + h, x : x + w].sum() == mask.sum() >= 8
        for side in (mask[y, :], mask[y + h - 1, :], mask[:, x], mask[:, x + w - 1]):
            assert side.any()
        assert (scene.semantic[mask] == kind + 1).all()


def test_the_same_seed_gives_the_same_bytes() -> None:
    for crowd in (False, True):
        one, two = (render_scene([5, 7], 48, 3, crowd=crowd) for _ in range(2))
        assert one.image.tobytes() == two.image.tobytes()
        assert one.semantic.tobytes() == two.semantic.tobytes()
        assert one.boxes == two.boxes
    other = render_scene([5, 8], 48, 3)
    assert np.abs(other.image.astype(int) - one.image).mean() > 5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 85), (61, 45)])
def test_ground_truth_agrees_with_itself(height: int, width: int) -> None:
    kinds = set()
    for label in range(len(CLASSES)):
        scene = render_scene([1, label], height, label, width=width, crowd=label % 3 == 0)
        assert_true_of_itself(scene, height, width)
        assert scene.label == label
        assert label in scene.classes  # the main thing is seen and annotated
        assert sum(scene.crowd) == (label % 3 == 0)
        kinds.update(np.unique(scene.semantic).tolist())
    assert kinds >= {0, 11, 12, 13}  # clutter, ground, wall and sky are met


def test_without_things() -> None:
    scene = render_scene(3, 48, 2, objects=False)
    assert scene.label == -1
    assert scene.boxes == scene.instance_masks == scene.classes == []
    assert set(np.unique(scene.semantic)) <= {0, 11, 12, 13}


def test_masks_follow_the_picture() -> None:
    # The border of the main thing is where the picture changes: the mean step in colour across
    # it is far larger than between neighbours elsewhere.
    across, elsewhere = [], []
    for seed in range(12):
        scene = render_scene([2, seed], 64)
        image = scene.image.astype(float)
        step = np.abs(image[:, 1:] - image[:, :-1]).mean(axis=-1)
        border = scene.semantic[:, 1:] != scene.semantic[:, :-1]
        across.append(step[border].mean())
        elsewhere.append(step[~border].mean())
    assert np.mean(across) > 2.5 * np.mean(elsewhere)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((-1,), "seed"), ((0, 8), "16 x 16"), ((0, 48, 10), "label"), ((0, 48, -1), "label")],
)
def test_impossible_scenes(arguments: tuple[int, ...], word: str) -> None:
    with pytest.raises(InputError, match=word):
        render_scene(*arguments)


def test_structure_tells_classes_colour_does_not() -> None:
    """Pixels and colours are near chance (0.1); edges by orientation and place are far above it."""
    count, cut = 320, 220
    labels = np.arange(count) % 10
    images = np.stack([render_scene([4, i], 48, i % 10).image for i in range(count)]) / 255.0

    def knn(features: np.ndarray) -> float:
        flat = features.reshape(count, -1)
        near = KNeighborsClassifier(10).fit(flat[:cut], labels[:cut])
        return float(near.score(flat[cut:], labels[cut:]))

    assert knn(images) < 0.25
    assert knn(images.mean(axis=(1, 2))) < 0.2
    grey = images.mean(axis=-1)
    dx, dy = np.diff(grey, axis=2)[:, 1:], np.diff(grey, axis=1)[:, :, 1:]
    angle = np.arctan2(dy, dx) % np.pi
    edges = [np.hypot(dx, dy) * ((angle * 6 / np.pi).astype(int) == b) for b in range(6)]
    cells = np.stack(edges, -1)[:, :46, :46].reshape(count, 2, 23, 2, 23, 6)
    fine = np.stack(edges, -1)[:, :44, :44].reshape(count, 4, 11, 4, 11, 6)
    features = np.sqrt(
        np.concatenate([c.mean((2, 4)).reshape(count, -1) for c in (cells, fine)], 1)
    )
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    linear = LogisticRegression(C=100, max_iter=300).fit(features[:cut], labels[:cut])
    assert linear.score(features[cut:], labels[cut:]) > 0.3


# --- outlines ---------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_outlines_of_any_mask(mask: np.ndarray) -> None:
    segments = polygons(mask)
    np.testing.assert_array_equal(fill(segments, *mask.shape), mask)
    areas = []
    for polygon in segments:
        x, y = polygon[::2], polygon[1::2]
        assert len(x) >= 4
        areas.append(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x))) / 2)
    assert sum(areas) == mask.sum()
    np.testing.assert_array_equal(decode_rle(run_lengths(mask)), mask)


def test_run_lengths_by_hand() -> None:
    mask = np.array([[1, 0], [1, 0], [0, 1]], dtype=bool)
    assert run_lengths(mask) == {"size": [3, 2], "counts": [0, 2, 3, 1]}
    assert run_lengths(np.zeros((2, 2), dtype=bool))["counts"] == [4]


# --- layouts ----------------------------------------------------------------------------------


def test_imagefolder(tmp_path: Path) -> None:
    write_imagefolder(tmp_path / "a", 20, 10, size=32, seed=3)
    write_imagefolder(tmp_path / "b", 20, 10, size=32, seed=3, workers=2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")  # workers change no byte
    for split, count in (("train", 2), ("val", 1)):
        folders = sorted(p.name for p in (tmp_path / "a" / split).iterdir())
        assert folders == list(CLASSES)
        for name in folders:
            files = list((tmp_path / "a" / split / name).glob("*.jpg"))
            assert len(files) == count  # balanced
            with Image.open(files[0]) as image:
                assert image.size == (32, 32)
                assert image.mode == "RGB"
    every = [v for k, v in digest(tmp_path / "a").items() if k.endswith(".jpg")]
    assert len(set(every)) == 30  # no scene twice, not across the splits either


def test_coco(tmp_path: Path) -> None:
    write_coco(tmp_path, 12, 4, size=64, seed=1)
    image_ids: set[int] = set()
    crowds = 0
    for split, count in (("train2017", 12), ("val2017", 4)):
        content = json.loads((tmp_path / "annotations" / f"instances_{split}.json").read_text())
        assert [c["id"] for c in content["categories"]] == list(COCO_IDS)
        assert [c["name"] for c in content["categories"]] == list(CLASSES)
        assert len(content["images"]) == len(list((tmp_path / split).glob("*.jpg"))) == count
        by_image = {image["id"]: image for image in content["images"]}
        assert not image_ids & set(by_image)
        image_ids |= set(by_image)
        ids = [a["id"] for a in content["annotations"]]
        assert len(set(ids)) == len(ids)
        for image in content["images"]:
            with Image.open(tmp_path / split / image["file_name"]) as opened:
                assert opened.size == (image["width"], image["height"])
        for note in content["annotations"]:
            image = by_image[note["image_id"]]
            assert note["category_id"] in COCO_IDS
            x, y, w, h = note["bbox"]
            assert 0 <= x < x + w <= image["width"]
            assert 0 <= y < y + h <= image["height"]
            if note["iscrowd"]:
                crowds += 1
                assert note["segmentation"]["size"] == [image["height"], image["width"]]
                mask = decode_rle(note["segmentation"])
            else:
                mask = fill(note["segmentation"], image["height"], image["width"])
            assert mask.sum() == note["area"] >= 8
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert [columns[0], rows[0]] == [x, y]
            assert [columns[-1] + 1, rows[-1] + 1] == [x + w, y + h]
        empty = set(by_image) - {a["image_id"] for a in content["annotations"]}
        assert len(empty) == 1  # the fourth picture
        assert len({(i["width"], i["height"]) for i in content["images"]}) == 3
    assert crowds == 4


def test_coco_gaps() -> None:
    assert len(COCO_IDS) == len(set(COCO_IDS)) == len(CLASSES)
    assert max(COCO_IDS) > len(CLASSES)
    assert list(CLASSES) == sorted(CLASSES)


def test_ade20k(tmp_path: Path) -> None:
    write_ade20k(tmp_path, 5, 3, size=48, seed=2)
    seen = np.zeros(len(SEMANTIC_CLASSES) + 1, dtype=int)
    pixels = np.zeros_like(seen)
    for split, count in (("training", 5), ("validation", 3)):
        images = sorted((tmp_path / "images" / split).glob("*.jpg"))
        masks = sorted((tmp_path / "annotations" / split).glob("*.png"))
        assert [p.stem for p in images] == [p.stem for p in masks]
        assert len(images) == count
        for image_path, mask_path in zip(images, masks, strict=True):
            with Image.open(image_path) as image, Image.open(mask_path) as mask:
                assert image.size == mask.size
                assert mask.mode == "L"
                values = np.asarray(mask)
            assert values.max() <= len(SEMANTIC_CLASSES)
            if split == "training":
                seen[np.unique(values)] += 1
                pixels += np.bincount(values.ravel(), minlength=len(pixels))
    table = [line.split("\t") for line in (tmp_path / "objectInfo.txt").read_text().splitlines()]
    assert table[0] == ["Idx", "Ratio", "Train", "Val", "Name"]
    assert [row[4] for row in table[1:]] == list(SEMANTIC_CLASSES)
    assert [int(row[0]) for row in table[1:]] == list(range(1, 14))
    assert [int(row[2]) for row in table[1:]] == seen[1:].tolist()
    shares = [float(row[1]) for row in table[1:]]
    np.testing.assert_allclose(shares, pixels[1:] / pixels[1:].sum(), atol=1e-4)


def test_davis(tmp_path: Path) -> None:
    write_davis(tmp_path / "a", 3, 5, size=48, seed=1)
    names = (tmp_path / "a" / "ImageSets" / "2017" / "val.txt").read_text().split()
    assert len(names) == len(set(names)) == 3
    for name in names:
        frames = sorted((tmp_path / "a" / "JPEGImages" / "480p" / name).glob("*.jpg"))
        truth = sorted((tmp_path / "a" / "Annotations" / "480p" / name).glob("*.png"))
        assert [p.stem for p in frames] == [p.stem for p in truth] == [f"{i:05d}" for i in range(5)]
        areas = []
        for frame_path, mask_path in zip(frames, truth, strict=True):
            with Image.open(frame_path) as frame, Image.open(mask_path) as mask:
                assert frame.size == mask.size == (85, 48)
                assert mask.mode == "P"
                colours = mask.getpalette()
                values = np.asarray(mask)
            areas.append(np.bincount(values.ravel(), minlength=4)[1:])
            # VOC's colours, as in DAVIS.
            assert colours is not None
            assert colours[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]
            assert colours[-3:] == [224, 224, 192]
        objects = name.count("-")  # ball-die-000 has two
        first = areas[0]
        assert objects in (2, 3)
        assert (first[:objects] > 0).all()
        assert not np.any(np.array(areas)[:, objects:])
        # Something is hidden in the middle of the video.
        assert (np.min(areas[1:-1], axis=0)[:objects] / first[:objects]).min() < 0.5
    write_davis(tmp_path / "b", 3, 5, size=48, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_videos_move_a_little_at_a_time() -> None:
    video = render_video(0, 12, 48)
    steps = [
        np.abs(a.astype(int) - b).mean()
        for a, b in zip(video.images[1:], video.images[:-1], strict=True)
    ]
    far = np.abs(video.images[0].astype(int) - video.images[-1]).mean()
    assert min(steps) > 0
    assert max(steps) < far
    assert len(render_video(0, 1, 48).images) == 1
    with pytest.raises(InputError, match="frame"):
        render_video(0, 0, 48)


def test_nothing_else_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "set"
    write_imagefolder(out, 2, 0, size=32, seed=0)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.jpg")}
    write_imagefolder(out, 2, 0, size=32, seed=0)  # the same again: nothing happens
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*.jpg")}
    for call in (
        lambda: write_imagefolder(out, 2, 0, size=32, seed=1),
        lambda: write_coco(out, 2, 0, size=32, seed=0),
        lambda: write_ade20k(out, 2, 0, size=32, seed=0),
        lambda: write_davis(out, 2, 1, size=32, seed=0),
    ):
        with pytest.raises(InputError, match="already holds something else"):
            call()
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "cat.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match="photos already holds"):
        write_imagefolder(mine, 1, 1, size=32)
    with pytest.raises(InputError, match="is a file"):
        write_coco(mine / "cat.jpg", 1, 1, size=32)
    assert [p.name for p in mine.iterdir()] == ["cat.jpg"]
    with pytest.raises(InputError, match="0 or more"):
        write_imagefolder(tmp_path / "new", -1, 1)
    assert not (tmp_path / "new").exists()


def test_an_unfinished_set_is_completed(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        write_imagefolder(tmp_path / name, 10, 0, size=32)
    marker = tmp_path / "cut" / "scenes.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "finished": False}))
    next((tmp_path / "cut").rglob("*.jpg")).unlink()
    write_imagefolder(tmp_path / "cut", 10, 0, size=32)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
