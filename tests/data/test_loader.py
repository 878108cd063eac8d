"""Batches: the same over ranks, workers and restarts; broken images; workers that die."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import channel_stats, eval_batches
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.source import BadImage
from cmt_mae.data.steps import iterate, order

CROPS = CropSettings((8, 8))


class Arrays:
    """n small images in memory; those in `broken` cannot be read."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        rng = np.random.default_rng(n)
        self.images = rng.integers(0, 256, (n, 14, 11, 3), dtype=np.uint8)
        self.broken = frozenset(broken)
        self.classes: list[str] | None = None
        self.limits = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def label(self, index: int) -> int | None:
        return index % 5 if index % 7 else None

    def read(self, index: int) -> np.ndarray | bytes:
        if index in self.broken:
            raise BadImage("cut")
        image: np.ndarray = self.images[index]
        return image

    def fingerprint(self) -> str:
        return ""


def batches(source: Any, count: int, **options: Any) -> list[Any]:
    given = {"noise_length": 5, "seed": 3, "batch_size": 8, "micro_batch": 8} | options
    stream = pretrain_batches(source, given.pop("crops", CROPS), **given)
    result = list(islice(stream, count))
    stream.close()  # type: ignore[attr-defined]
    return result


def equal(a: Any, b: Any) -> bool:
    for key in a:
        same = torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]
        if not same:
            return False
    return a.keys() == b.keys()


@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_order_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    once = order(n, seed, epoch)
    assert once.dtype == np.int64
    assert sorted(once.tolist()) == list(range(n))
    assert np.array_equal(once, order(n, seed, epoch))
    if n > 50:
        assert not np.array_equal(once, order(n, seed, epoch + 1))
        assert not np.array_equal(once, order(n, seed + 1, epoch))


@given(
    st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 3), st.integers(0, 20),
    st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_ranks_share_out_the_same_global_batch(
    world: int, micro: int, accumulation: int, extra: int, start: int
) -> None:
    size = world * micro * accumulation
    source = Arrays(size + extra)
    given = {"batch_size": size, "start_step": start, "world": world, "micro_batch": micro}
    whole = batches(source, 2, batch_size=size, micro_batch=size, start_step=start)
    ranks = [batches(source, 2 * accumulation, rank=rank, **given) for rank in range(world)]
    for step in range(2):
        first = step * accumulation
        parts = [ranks[rank][first + a] for a in range(accumulation) for rank in range(world)]
        for key in ("images", "flip", "noise", "index"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[step][key])


@given(st.integers(0, 40), st.integers(8, 30), st.booleans())
@settings(max_examples=25, deadline=None)
def test_starting_anywhere_continues_the_same_run(start: int, n: int, split: bool) -> None:
    source = Arrays(n, broken=(1,))
    micro = 4 if split else 8
    per_step = 8 // micro
    whole = batches(source, (start + 3) * per_step, micro_batch=micro)
    rest = batches(source, 3 * per_step, micro_batch=micro, start_step=start)
    assert all(map(equal, rest, whole[start * per_step :]))


def test_workers_change_nothing() -> None:
    source = Arrays(40, broken=(2, 3, 11))
    crops = replace(CROPS, second_size=(12, 6))
    plain = batches(source, 12, micro_batch=4, crops=crops)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    handler = signal.getsignal(signal.SIGCHLD)
    for workers in (1, 2):
        both = batches(source, 12, micro_batch=4, crops=crops, workers=workers)
        assert all(map(equal, plain, both))
    assert torch.equal(state, torch.random.get_rng_state())  # the run's own stream is left alone
    assert signal.getsignal(signal.SIGCHLD) == handler
    assert plain[0]["images"].shape == (4, 3, 8, 8)
    assert plain[0]["second"].shape == (4, 3, 12, 6)
    assert plain[0]["images"].dtype == plain[0]["second"].dtype == torch.uint8
    assert plain[0]["images"].is_contiguous(memory_format=torch.channels_last)


def test_noise_and_flips_are_uniform() -> None:
    found = batches(Arrays(400), 10, batch_size=400, micro_batch=400, noise_length=20)
    noise = torch.cat([b["noise"] for b in found])
    assert noise.dtype == torch.float32
    assert 0 < noise.min() < noise.max() < 1
    assert kstest(noise.flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs(float(np.mean([b["flip"].float().mean() for b in found])) - 0.5) < 0.04


def test_noise_is_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lowest:
        """A generator that draws the least it can."""

        def random(self, size: int | None = None, out: Any = None, **_: Any) -> Any:
            if out is not None:
                out[:] = 0
            return 0.0 if size is None else np.zeros(size)

    monkeypatch.setattr("cmt_mae.data.loader.sample_rng", lambda *_, **__: Lowest())
    assert batches(Arrays(8), 1)[0]["noise"].min() > 0


def test_the_noise_length_does_not_change_the_crops() -> None:
    source = Arrays(16)
    short, long = (batches(source, 2, noise_length=length) for length in (0, 50))
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a["images"], b["images"])
        assert torch.equal(a["flip"], b["flip"])


def test_fixed_crops_stay_and_noise_moves() -> None:
    def by_image(fixed: bool) -> list[dict[int, Any]]:
        found = batches(Arrays(8), 2, crops=replace(CROPS, fixed=fixed))
        names = ("images", "flip", "noise")
        return [
            {i: tuple(b[n][r] for n in names) for r, i in enumerate(b["index"].tolist())}
            for b in found
        ]

    first, second = by_image(fixed=True)
    assert all(torch.equal(first[i][0], second[i][0]) for i in range(8))
    assert all(first[i][1] == second[i][1] for i in range(8))
    assert not any(torch.equal(first[i][2], second[i][2]) for i in range(8))
    first, second = by_image(fixed=False)
    assert not any(torch.equal(first[i][0], second[i][0]) for i in range(8))


def test_the_second_crop_shows_the_same_region() -> None:
    """A horizontal ramp: both crops of a sample run between the same two values."""
    source = Arrays(16)
    source.images = np.broadcast_to(
        np.linspace(0, 255, 64).astype(np.uint8)[None, None, :, None], (16, 48, 64, 3)
    ).copy()
    batch = batches(source, 1, crops=CropSettings((16, 16), second_size=(32, 48)))[0]
    for crop in (batch["images"], batch["second"]):
        ends = crop.float().mean((1, 2))[:, [0, -1]]
        assert (ends - batch["second"].float().mean((1, 2))[:, [0, -1]]).abs().max() < 8


def test_broken_images_are_named_and_replaced() -> None:
    source = Arrays(16, broken=(4, 9))
    epoch = batches(source, 2)
    named = [bad for batch in epoch for bad in batch["bad"]]
    assert {(4, "image 4", "cut"), (9, "image 9", "cut")} <= set(named)
    used = torch.cat([b["index"] for b in epoch])
    assert not {4, 9} & set(used.tolist())
    drawn = order(16, 3, 0)
    whole = drawn[~np.isin(drawn, [4, 9])]
    assert used[torch.from_numpy(~np.isin(drawn, [4, 9]))].tolist() == whole.tolist()
    assert all(map(equal, epoch, batches(source, 2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_stop_the_run(workers: int) -> None:
    source = Arrays(12, broken=tuple(range(12)))
    with pytest.raises(InputError, match="20 images in a row") as info:
        batches(source, 1, workers=workers)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 9, "micro_batch": 2}, "not a multiple"),
        ({"world": 3}, "3 x 8"),
        ({"micro_batch": 0}, "not a multiple"),
        ({"batch_size": 16, "micro_batch": 8}, "12 images are fewer"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        batches(Arrays(12), 1, **options)


class Accident(Arrays):
    """One image of the seventh batch kills or hangs the process that reads it, `times` over."""

    def __init__(self, marks: Path, times: int, hang: bool) -> None:
        super().__init__(64)
        self.fatal = int(order(64, 3, 0)[50])
        self.marks, self.times, self.hang, self.main = marks, times, hang, os.getpid()

    def read(self, index: int) -> np.ndarray | bytes:
        again = len(list(self.marks.iterdir())) < self.times
        if index == self.fatal and os.getpid() != self.main and again:
            (self.marks / f"{time.time_ns()}").touch()
            if self.hang:
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


@pytest.mark.parametrize("hang", [False, True])
def test_workers_that_die_or_hang_are_replaced(
    tmp_path: Path, hang: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long torch waits for a worker to go before it is killed.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    expected = batches(Arrays(64), 10)
    found = batches(Accident(tmp_path, 2, hang), 10, workers=2, timeout_s=1)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(map(equal, expected, found))


def test_workers_that_always_die_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(InputError, match=r"4 times in a row: .*image \d+, "):
        batches(Accident(tmp_path, 1000, False), 7, workers=1, timeout_s=1)
    with pytest.raises(InputError, match=r"loader worker .*died.* use no workers") as info:
        list(eval_batches(Accident(tmp_path, 1000, False), size=(8, 8), batch_size=4, workers=1))
    assert "\n" not in str(info.value)


def test_workers_are_gone_when_the_stream_is_closed() -> None:
    import multiprocessing

    stream = pretrain_batches(
        Arrays(16), CROPS, noise_length=1, seed=0, batch_size=8, micro_batch=8, workers=2
    )
    for _ in range(2):  # both have started
        next(stream)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    pids = [worker.pid for worker in workers]
    for worker in workers:  # a signal to the whole group is for the main process to answer
        os.kill(worker.pid or 0, signal.SIGTERM)
        os.kill(worker.pid or 0, signal.SIGINT)
    for _ in range(12):  # more than they have read ahead
        next(stream)
    assert [worker.pid for worker in workers if worker.is_alive()] == pids
    stream.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 10, 23])
def test_evaluation_counts_every_image_once(world: int, n: int) -> None:
    source = Arrays(n)
    seen = []
    for rank in range(world):
        found = eval_batches(source, size=(8, 8), batch_size=4, rank=rank, world=world)
        for images, labels, index in found:
            assert images.shape == (len(index), 3, 8, 8)
            assert images.dtype == torch.uint8
            assert 1 <= len(index) <= 4
            expected = [i % 5 if i % 7 else -1 for i in index.tolist()]
            assert labels.tolist() == expected
            seen += index.tolist()
    assert sorted(seen) == list(range(n))


def test_evaluation_with_workers_and_a_broken_image() -> None:
    runs = [list(eval_batches(Arrays(9), size=(8, 8), batch_size=4, workers=w)) for w in (0, 2)]
    for a, b in zip(*runs, strict=True):
        assert all(map(torch.equal, a, b))
    with pytest.raises(InputError, match="image 6: cut"):
        list(eval_batches(Arrays(9, broken=(6,)), size=(8, 8), batch_size=4))


def test_channel_stats() -> None:
    source = Arrays(50)
    mean, std = channel_stats(source, 3)
    pixels = source.images.reshape(-1, 3) / 255
    assert np.allclose(mean, pixels.mean(0))
    assert np.allclose(std, pixels.std(0))
    assert channel_stats(source, 3, limit=7, seed=1) == channel_stats(source, 3, limit=7, seed=1)
    with pytest.raises(InputError):
        channel_stats(Arrays(2, broken=(0, 1)), 3)


def test_stopped_workers_with_answers_on_the_way_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors are fetched from the worker itself: torch's own time limit does not cover that."""
    import multiprocessing

    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    expected = batches(Arrays(64), 10)
    stream = pretrain_batches(
        Arrays(64), CROPS, noise_length=5, seed=3, batch_size=8, micro_batch=8, workers=1,
        timeout_s=0.5,
    )  # fmt: skip
    found = [next(stream)]
    time.sleep(0.5)  # it has read ahead
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGSTOP)
    begin = time.monotonic()
    found += [next(stream) for _ in range(9)]
    assert time.monotonic() - begin < 10
    assert all(map(equal, expected, found))
    stream.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_program_that_ends_by_an_error_does_not_wait_for_its_workers() -> None:
    """They do not hear the SIGTERM by which Python ends daemons before it waits for them."""
    program = (
        "import numpy as np\n"
        "from cmt_mae.data.steps import iterate\n"
        "class Zeros:\n"
        "    def __getitem__(self, key): return np.zeros(3)\n"
        "    def names_of(self, key): return ''\n"
        "stream = iterate(Zeros(), lambda done: range(done, 10**6), 2)\n"
        "next(stream)\n"
        "raise ValueError('a bug')\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 1
    assert ended.stderr.endswith("ValueError: a bug\n")


class Unsendable:
    """Pickled, it fails as tensors do where /dev/shm is full."""

    def __reduce__(self) -> Any:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")


class Answers:
    """Items that cannot be handed over."""

    def __getitem__(self, key: int) -> Unsendable:
        return Unsendable()

    def names_of(self, key: int) -> str:
        return f"item {key}"


def test_answers_that_do_not_fit_into_shared_memory() -> None:
    """Python's queue drops them after a traceback, and they would be waited for."""
    stream = iterate(Answers(), lambda done: range(done, 9), 1, timeout_s=60)
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"no room in shared memory: make /dev/shm larger") as info:
        next(stream)
    assert "item 0" in str(info.value)
    assert time.monotonic() - begin < 20
