"""DAVIS end to end on small videos: numbers, files, resuming, processes, bad input; and the real sequences."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cmt_mae.evaluate.video.sequence as sequence_module
from cmt_mae.core.errors import InputError
from cmt_mae.data.davis import read_mask, write_mask
from cmt_mae.evaluate.result import Result
from cmt_mae.evaluate.video.evaluate import DavisConfig, evaluate_davis
from programs import start


def config(backbone, data, **more):
    settings = {
        "size": 64,
        "side_rule": "patch",
        "radius": 3,
        "device": "cpu",
        "pictures": 0,
        "progress": False,
    }
    return DavisConfig(str(backbone), str(data), **(settings | more))


def masks_folder(out):
    (folder,) = Path(out, "davis").iterdir()
    return folder / "masks"


def test_end_to_end(plain_vit, davis, tmp_path):
    """Squares on noise: even a random network follows them; vos-benchmark reads the masks and agrees."""
    result = evaluate_davis(config(plain_vit, davis, out=str(tmp_path / "o")))
    assert result.task == "davis"
    assert result.headline == result.metrics["J&F"]
    assert set(result.metrics) == {
        "J&F", "J_mean", "J_recall", "J_decay", "F_mean", "F_recall", "F_decay",
    }  # fmt: skip
    assert result.metrics["J&F"] == pytest.approx(
        (result.metrics["J_mean"] + result.metrics["F_mean"]) / 2
    )
    assert result.metrics["J_mean"] > 70
    assert (result.data["sequences"], result.data["objects"], result.data["frames"]) == (2, 4, 9)
    assert [s["name"] for s in result.details["sequences"]] == ["one", "two"]
    assert result.details["sequences"][0]["grid"] == [8, 12]
    assert [(o["sequence"], o["object"]) for o in result.details["objects"]] == [
        ("one", 1), ("one", 2), ("two", 1), ("two", 2),
    ]  # fmt: skip
    (file,) = (tmp_path / "o/results").iterdir()
    assert Result.load(file) == result

    from vos_benchmark.benchmark import benchmark

    folder = masks_folder(tmp_path / "o")
    truth = str(davis / "Annotations/480p")
    both, j, f, objects = benchmark([truth], [str(folder)], num_processes=1, verbose=False)
    assert (both[0], j[0], f[0]) == pytest.approx(
        [result.metrics[k] for k in ("J&F", "J_mean", "F_mean")], abs=1e-9
    )
    row = result.details["objects"][3]
    assert objects[0]["two"][0][2] == pytest.approx(row["J_mean"])
    assert objects[0]["two"][1][2] == pytest.approx(row["F_mean"])


def test_masks_are_indexed_pngs(plain_vit, davis, tmp_path):
    evaluate_davis(config(plain_vit, davis, out=str(tmp_path / "o")))
    folder = masks_folder(tmp_path / "o")
    assert sorted(p.name for p in (folder / "one").iterdir()) == [f"{n:05d}.png" for n in range(5)]
    truth = Image.open(davis / "Annotations/480p/one/00000.png")
    first = Image.open(folder / "one/00000.png")
    assert (first.mode, first.size) == ("P", (96, 64))
    assert first.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    np.testing.assert_array_equal(first, truth)
    assert set(np.unique(read_mask(folder / "two/00003.png"))) == {0, 1, 2}
    assert not (folder.parent / "strips").exists()


def test_objects_count_equally_not_sequences(plain_vit, davis):
    """Three objects in two sequences: the mean is over the three."""
    for file in (davis / "Annotations/480p/two").iterdir():
        ids = read_mask(file)
        write_mask(file, np.where(ids == 2, 0, ids).astype(np.uint8))
    result = evaluate_davis(config(plain_vit, davis))
    rows = [row["J_mean"] for row in result.details["objects"]]
    assert len(rows) == 3
    assert result.metrics["J_mean"] == pytest.approx(np.mean(rows))
    by_sequence = np.mean([s["J_mean"] for s in result.details["sequences"]])
    assert abs(result.metrics["J_mean"] - by_sequence) > 0.01


def test_first_and_last_frames_are_not_scored(plain_vit, davis):
    before = evaluate_davis(config(plain_vit, davis, sequences=("one",)))
    last = davis / "Annotations/480p/one/00004.png"
    write_mask(last, np.zeros_like(read_mask(last)))
    after = evaluate_davis(config(plain_vit, davis, sequences=("one",)))
    assert after.metrics == before.metrics
    assert after.data["fingerprint"] != before.data["fingerprint"]


@pytest.mark.parametrize("protocol", ["videowalk", "cropmae"])
def test_other_protocols(plain_vit, davis, protocol):
    result = evaluate_davis(config(plain_vit, davis, protocol=protocol, temperature=0.05))
    assert result.metrics["J_mean"] > 60
    assert result.protocol["context"] == 20
    assert result.protocol["name"] == f"{protocol}+changed"


def test_an_object_that_vanishes_at_grid_size(plain_vit, davis):
    """A speck between the grid's samples: it is reported, counted and scores nothing; as DINO's script
    it has no channel, with the same result for the others."""
    for file in (davis / "Annotations/480p/one").iterdir():
        ids = read_mask(file)
        ids[0, 40] = 3
        write_mask(file, ids)
    result = evaluate_davis(config(plain_vit, davis, sequences=("one",)))
    assert result.details["vanished"] == ["one 3"]
    assert result.data["objects"] == 3
    assert result.details["objects"][2]["J_mean"] == 0
    seen = evaluate_davis(config(plain_vit, davis, sequences=("one",), objects="seen"))
    assert seen.details["objects"] == result.details["objects"]
    assert seen.protocol["objects"] == "seen"


def test_void_grey_and_rgb(plain_vit, davis):
    """Void pixels are background; grey frames and masks painted in RGB work."""
    before = evaluate_davis(config(plain_vit, davis, sequences=("one",)))
    for number in range(5):
        file = davis / f"Annotations/480p/one/{number:05d}.png"
        ids = read_mask(file)
        ids[50:60, 2:10] = 255
        write_mask(file, ids)
        if number % 2:
            Image.open(file).convert("RGB").save(file)
    after = evaluate_davis(config(plain_vit, davis, sequences=("one",)))
    assert after.metrics == before.metrics
    for file in (davis / "JPEGImages/480p/one").iterdir():
        Image.open(file).convert("L").save(file)
    assert evaluate_davis(config(plain_vit, davis, sequences=("one",))).metrics["J_mean"] > 20


def test_sizes_may_differ_between_sequences(plain_vit, davis):
    for kind in ("JPEGImages", "Annotations"):
        for file in (davis / kind / "480p/two").iterdir():
            image = Image.open(file)
            image.resize((64, 128), Image.Resampling.NEAREST).save(file)
    result = evaluate_davis(config(plain_vit, davis))
    assert [s["input"] for s in result.details["sequences"]] == [[64, 96], [128, 64]]


def count_followed(monkeypatch):
    """Names of sequences that are really run."""
    names, real = [], sequence_module.Propagation

    def spy(*arguments):
        names.append(arguments[0].shape)
        return real(*arguments)

    monkeypatch.setattr(sequence_module, "Propagation", spy)
    return names


def test_finished_sequences_are_not_repeated(plain_vit, davis, tmp_path, monkeypatch):
    out = str(tmp_path / "o")
    broken = davis / "JPEGImages/480p/two/00002.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"two/00002.jpg: .*put the frame right, then run again"):
        evaluate_davis(config(plain_vit, davis, out=out))
    runs = count_followed(monkeypatch)
    broken.write_bytes(whole)
    result = evaluate_davis(config(plain_vit, davis, out=out))
    assert len(runs) == 1  # only ``two``
    again = evaluate_davis(config(plain_vit, davis, out=out))
    assert len(runs) == 1
    assert again.metrics == result.metrics
    assert again.identity() == result.identity()
    fresh = evaluate_davis(config(plain_vit, davis))
    assert fresh.metrics == pytest.approx(result.metrics)
    assert len(runs) == 3


def test_what_no_longer_fits_is_repeated(plain_vit, make_kind, davis, tmp_path, monkeypatch):
    """Another setting, other weights, other data, a lost mask or a damaged score: that is run again."""
    out = str(tmp_path / "o")
    evaluate_davis(config(plain_vit, davis, out=out))
    runs = count_followed(monkeypatch)
    evaluate_davis(config(plain_vit, davis, out=out))
    assert not runs
    (masks_folder(out) / "one/00003.png").unlink()
    evaluate_davis(config(plain_vit, davis, out=out))
    assert len(runs) == 1
    (masks_folder(out).parent / "scores/two.json").write_text("{")
    evaluate_davis(config(plain_vit, davis, out=out))
    assert len(runs) == 2
    frame = davis / "JPEGImages/480p/one/00001.jpg"
    frame.write_bytes(frame.read_bytes() + b"\0")
    evaluate_davis(config(plain_vit, davis, out=out))
    assert len(runs) == 3
    evaluate_davis(config(plain_vit, davis, out=out, topk=4))
    assert len(runs) == 5
    other = make_kind(tmp_path / "other.safetensors", seed=1)
    evaluate_davis(config(other, davis, out=out))
    assert len(runs) == 7
    assert len(list(Path(out, "davis").iterdir())) == 3


def test_batches_and_threads_change_nothing(plain_vit, davis):
    one = evaluate_davis(config(plain_vit, davis, batch_size=1, threads=1))
    many = evaluate_davis(config(plain_vit, davis, batch_size=3, threads=4))
    assert many.metrics == pytest.approx(one.metrics)


def test_strip_with_two_backbones(plain_vit, make_kind, davis, tmp_path):
    other = make_kind(tmp_path / "other.safetensors", seed=1)
    out = tmp_path / "o"
    result = evaluate_davis(
        config(plain_vit, davis, out=str(out), pictures=1, columns=3, compare=other)
    )
    (strip,) = out.glob("davis/*/strips/*.png")
    assert strip.name == "one.png"
    with Image.open(strip) as image:
        assert image.width > 500
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.std() > 20
    assert result.details["compare"]["sequences"] == ["one"]
    alone = evaluate_davis(config(other, davis, sequences=("one",)))
    assert result.details["compare"]["metrics"] == pytest.approx(alone.metrics)
    with pytest.raises(InputError, match="--compare draws pictures"):
        evaluate_davis(config(plain_vit, davis, compare=other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": ("three",)}, "'three' is not in"),
        ({"size": 4}, "smaller than a patch"),
        ({"layer": 3}, "layer is 3; .* has 2 blocks"),
        ({"batch_size": 0}, "batch_size is 0: give a"),
        ({"threads": 0}, "threads is 0: give a"),
        ({"topk": 0}, "topk is 0: give a"),
        ({"protocol": "jabri"}, "one of dino, videowalk, cropmae"),
    ],
)
def test_bad_settings_are_refused_first(plain_vit, davis, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        evaluate_davis(config(plain_vit, davis, out=str(tmp_path / "o"), **change))
    assert not (tmp_path / "o").exists()


CHILD = """
import json, os, pathlib, sys
import torch
torch.set_num_threads(1)
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.video.evaluate import DavisConfig, evaluate_davis
from cmt_mae.engine.processes import leave_processes
said = []
for settings in json.loads(sys.argv[1]):
    try:
        result = evaluate_davis(DavisConfig(**settings))
        said.append([result.metrics, [s["name"] for s in result.details["sequences"]]])
    except InputError as error:
        said.append(str(error))
pathlib.Path(__file__).with_name("said" + os.environ["RANK"]).write_text(json.dumps(said))
leave_processes()  # else the interpreter may end while a connection's thread still runs
"""


def test_two_processes_share_sequences(plain_vit, davis, tmp_path):
    """Each sequence once, the same numbers in both; a broken frame in one ends both with its line."""
    alone = evaluate_davis(config(plain_vit, davis))
    broken = tmp_path / "broken"
    shutil.copytree(davis, broken)
    frame = broken / "JPEGImages/480p/two/00001.jpg"
    frame.write_bytes(frame.read_bytes()[:700])
    runs = [vars(config(plain_vit, d, out=str(tmp_path / d.name / "o"))) for d in (davis, broken)]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = start(script, json.dumps(runs), processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    said = [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
    results, errors = zip(*said, strict=True)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(alone.metrics)
    assert results[0][1] == ["one", "two"]
    assert len(list((davis / "o/results").iterdir())) == 1
    assert errors[0] == errors[1]
    assert "two/00001.jpg" in errors[0]
    assert [p.name for p in broken.glob("o/davis/*/scores/*")] == ["one.json"]


def test_real_frames(shared, tmp_path):
    """The first frames of ``dog`` with DeiT-Tiny. (The published script's numbers on whole sequences
    stand in docs/results/davis.md; they need minutes.)"""
    root = tmp_path / "d"
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "png")):
        (root / kind / "480p/dog").mkdir(parents=True)
        for number in range(3):
            name = f"{kind}/480p/dog/{number:05d}.{suffix}"
            (root / name).write_bytes((shared / "data/davis" / name).read_bytes())
    (root / "ImageSets/2017").mkdir(parents=True)
    (root / "ImageSets/2017/val.txt").write_text("dog\n")
    teacher = str(shared / "teachers/deit_tiny_patch16_224.safetensors")
    result = evaluate_davis(
        DavisConfig(teacher, str(root), device="cpu", progress=False, positions="scale_factor")
    )
    assert result.details["sequences"][0]["input"] == [480, 832]
    # frame 1 of the whole run that agrees with the published script to four digits
    assert result.metrics["J_mean"] == pytest.approx(86.145, abs=0.3)
    assert result.metrics["F_mean"] == pytest.approx(84.982, abs=0.3)
