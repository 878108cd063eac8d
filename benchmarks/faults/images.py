"""Broken images: decoded one by one, trained on, and evaluated on.

Mutated files go through the decoder and through the batches of pre-training in forks whose time and memory are
measured; bombs likewise. Then real commands run over folders with such files and with everything else that may
have an image's name: pipes, sockets, links, what nobody may read, what is deleted meanwhile.
"""

from functools import partial

import numpy as np

from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.image_runs import Runs, evaluate_all, train_on_folders
from benchmarks.faults.measured import Progress, is_one_line, measure
from benchmarks.faults.pictures import bombs, mutated, originals
from benchmarks.faults.tiny import prepare
from cmt_mae.data import decode, loader
from cmt_mae.data.decode import BadImage

PROMISE = (
    "a broken image crashes and hangs nothing; in training it is counted, named and replaced, an evaluation stops "
    "with its name; memory stays bounded"
)
CHUNK = 150
LIMIT_S = 30.0  # of a chunk of small images, and of a bomb
SMALL_MIB = 400.0  # what any file that is refused, and any chunk of small ones, may add
LARGE_MIB = 3600.0  # what a picture just below the limit of pixels may add


def campaign(options: Options) -> Verdict:
    """Every kind of broken image on every way into the software."""
    verdict = Verdict(PROMISE)
    rng = np.random.default_rng(options.seed)
    files = originals(options.shared, rng)
    count = 250 if options.quick else 3000
    mutations = list(mutated(files, count, rng))
    refused = decode_all(mutations, files, verdict)
    train_on_all(mutations, list(files.values()), refused, verdict)
    explode(verdict, large=not options.quick)
    tiny = prepare(options.folder / "tiny")
    chosen = [one for one in mutations if one[0] in refused]
    runs = (Runs(0, 40, 1),) if options.quick else (Runs(0, 300, 4), Runs(2, 300, 4))
    train_on_folders(tiny, options.folder, chosen, runs, verdict)
    evaluate_all(tiny, options, verdict)
    return verdict


# --- the decoder and the batches of pre-training ----------------------------------------------------


def decode_all(
    mutations: list[tuple[str, bytes]], files: dict[str, bytes], verdict: Verdict
) -> dict[str, str]:
    """Each gives a picture or one line; a file that was cut never gives another picture than the whole one.

    Returns the reasons of those that are refused.
    """
    refused: dict[str, str] = {}
    worst, seconds = 0.0, 0.0
    for start in range(0, len(mutations), CHUNK):
        part = mutations[start : start + CHUNK]
        while part:
            ended = measure(partial(decode_each, part, files), LIMIT_S)
            if (fault := ended.fault()) is not None:
                verdict.failures.append(f"decoder, {part[ended.reached][0]}: {fault}")
                part = part[ended.reached + 1 :]
                continue
            for (what, _), (kind, text) in zip(part, ended.value, strict=True):
                if kind == "refused":
                    refused[what] = text
                elif kind == "wrong":
                    verdict.failures.append(f"decoder, {what}: {text}")
            worst, seconds = max(worst, ended.peak_mib), seconds + ended.seconds
            break
    if worst > SMALL_MIB:
        verdict.failures.append(f"decoder: {worst:.0f} MiB for small files")
    verdict.trials += len(mutations)
    verdict.figures |= {
        "mutated images": len(mutations),
        "of them refused by the decoder": len(refused),
        "decoder: seconds": round(seconds, 1),
        "decoder: peak MiB of any chunk": round(worst),
    }
    return refused


def decode_each(
    part: list[tuple[str, bytes]], files: dict[str, bytes], progress: Progress
) -> list[tuple[str, str]]:
    """(picture | refused | wrong, why) of each. files: the whole ones by name, for those that were cut."""
    found = []
    for number, (what, raw) in enumerate(part):
        progress.note(number)
        try:
            array = decode.decode_image(raw)
        except BadImage as error:
            right = is_one_line(str(error))
            found.append(("refused" if right else "wrong", str(error)))
        else:
            right = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
            if right and ", cut, " in what:  # all that was cut off is a trailer
                right = np.array_equal(array, decode.decode_image(files[what.split(",")[0]]))
            found.append(("picture" if right and array.size else "wrong", str(array.shape)))
    return found


class Memory:
    """Files in memory as a source."""

    classes: list[str] | None = None
    limits = None

    def __init__(self, files: list[tuple[str, bytes]]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """What was done to it."""
        return self.files[index][0]

    def label(self, _: int) -> int | None:
        """None has one."""
        return None

    def read(self, index: int) -> bytes:
        """The file."""
        return self.files[index][1]

    def fingerprint(self) -> str:
        """None is needed."""
        return ""


def train_on_all(
    mutations: list[tuple[str, bytes]], good: list[bytes], refused: dict[str, str], verdict: Verdict
) -> None:
    """Batches of pre-training over mutated files among good ones: none fails, refused ones are named.

    (A JPEG is decoded down to the lowest row of its crop only, so damage below that may go unnoticed.)
    """
    named: set[str] = set()
    half = [(f"whole {n}", raw) for n, raw in enumerate(good * (CHUNK // len(good) + 1))][:CHUNK]
    for start in range(0, len(mutations), CHUNK):
        part = mutations[start : start + CHUNK]
        source = Memory([*part, *half])
        ended = measure(partial(bad_of_an_epoch, source), 2 * LIMIT_S)
        fault = ended.fault() or (ended.value if ended.kind == "refused" else None)
        if fault is not None:
            verdict.failures.append(f"batches, {part[0][0]} and later: {fault}")
            continue
        if ended.peak_mib > SMALL_MIB:
            verdict.failures.append(f"batches: {ended.peak_mib:.0f} MiB for small files")
        named |= ended.value
    extra = named - set(refused)
    lossless = [what for what in refused if not what.startswith(("jpeg", "mpo", "photo"))]
    unnoticed = [what for what in lossless if what not in named]
    if extra:
        verdict.failures.append(f"named though they can be decoded: {sorted(extra)[:3]}")
    if unnoticed:
        verdict.failures.append(f"trained on though refused: {unnoticed[:3]}")
    verdict.trials += len(mutations)
    verdict.figures |= {
        "named by the batches of one epoch": len(named),
        "JPEGs damaged below their crop, trained on": len(set(refused) - named),
    }


def bad_of_an_epoch(source: Memory, progress: Progress) -> set[str]:
    """Names of the broken images that one epoch of batches meets."""
    size = 25
    stream = loader.pretrain_batches(
        source, loader.CropSettings((32, 32)), noise_length=4, seed=1, batch_size=size, micro_batch=size
    )  # fmt: skip
    found = set()
    for number in range(len(source) // size):
        progress.note(number)
        batch = next(stream)
        assert batch["images"].shape == (size, 3, 32, 32)
        for _, name, reason in batch["bad"]:
            assert is_one_line(reason), reason
            found.add(name)
    return found


def explode(verdict: Verdict, large: bool) -> None:
    """Bombs, each decoded in a fork of its own."""
    peaks: dict[str, str] = {}
    for what, raw, fate in bombs(large):
        ended = measure(partial(decode_each, [(what, raw)], {}), 4 * LIMIT_S)
        verdict.trials += 1
        fault, most = ended.fault(), LARGE_MIB if "13377" in what else SMALL_MIB
        if fault is None and ended.value[0][0] != fate:
            fault = f"{ended.value}, not {fate}"
        if fault is None and (ended.cpu_s > LIMIT_S or ended.peak_mib > most):
            fault = "too much"
        peaks[what] = f"{ended.peak_mib:.0f} MiB, {ended.cpu_s:.1f} s, {len(raw)} bytes, {fate}"
        if fault is not None:
            verdict.failures.append(f"bomb, {what}: {fault} ({peaks[what]})")
    verdict.figures["bombs"] = peaks
