"""benchmarks/gpu.py on a CPU: every way of running a step is the step, wrong ways are found, calls go on."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_equal, gpu_fp8, gpu_parts, gpu_photos
from benchmarks.gpu_variants import VARIANTS, settings, stepper_of
from PIL import Image
from torch import nn

from cmt_mae.engine import compiling
from cmt_mae.pretraining import assemble
from cmt_mae.tools.bench.build import synthetic_batches

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile up to its graphs; the code that inductor makes of them is test_compiling's."""
    real = compiling.compile_blocks
    monkeypatch.setattr(compiling, "compile_blocks", lambda networks: real(networks, "eager"))
    monkeypatch.setattr(compiling, "why_not", lambda _: "")
    monkeypatch.setattr("cmt_mae.tools.bench.measure.peak_flops", lambda *_: {"flops": 1e12})


def dry(out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    status = gpu.main(["--dry-run", "--out", str(out), *words])
    return status, json.loads(out.read_text())


def test_every_way_is_equal_and_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    ways = ("eager", "guides_graph", "compiled_step_graph", "second_stream", "fp8")
    assert set(ways) < set(VARIANTS)  # the others are parts of these
    words = ("--variants", ",".join(ways), "--methods", "two")
    status, content = dry(out, "--parts", "equal,variants", *words)
    assert status == 0
    assert content["dry_run"]
    entries = content["entries"]
    for name in ways:
        assert entries[f"variants/micro/two/{name}/b4"]["images_per_second"]["median"] > 0
        if name != "eager":
            check = entries[f"equal/micro/two/{name}"]
            assert check["differs"] == []
            assert 0 < check["errors"]["bf16"]["gradients"] < 0.5
    assert entries["equal/micro/two/compiled_step_graph"]["errors"]["fp32"]["gradients"] == 0
    eager, fp8 = (entries[f"variants/micro/two/{n}/b4"] for n in ("eager", "fp8"))
    assert fp8["gflop_per_image"] == eager["gflop_per_image"]  # fp8 layers are counted


def test_the_other_parts_run_and_a_second_call_measures_nothing_again(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    words = ("--parts", "sweep,loader,shares,profile", "--methods", "two", "--best", "frozen")
    status, content = dry(out, *words)
    assert status == 0
    entries = content["entries"]
    assert {k for k in entries if k.startswith("sweep")} == {
        f"sweep/micro/two/{n}/b{b}" for n in ("eager", "frozen") for b in (2, 4)
    }
    for kind in ("tar", "packed"):
        assert entries[f"loader/{kind}/alone"]["images_per_second"] > 0
        fed = entries[f"loader/{kind}/fed micro two eager"]
        rate = fed["images_per_second"]["median"]
        assert fed["lost_share"] == pytest.approx(1 - rate / fed["synthetic"])
    assert sum(entries["shares/micro/two/eager"]["shares"].values()) == pytest.approx(1)
    kernels = entries["profile/micro/two/eager"]
    assert kernels["top"][0]["share"] >= kernels["top"][1]["share"] > 0
    assert "aten::" in (tmp_path / kernels["table"]).read_text()
    assert [line.split(":")[0] for line in content["verdicts"]] == [
        f"loader/{k}/fed micro two eager" for k in ("packed", "tar")
    ]
    assert not list(tmp_path.glob("*trace*"))
    again, same = dry(out, *words, "--budget-s", "0")
    assert again == 0
    assert same["entries"] == entries


def test_no_time_left_is_told_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    words = ("--parts", "sweep", "--methods", "mae", "--best", "eager")
    status, content = dry(out, *words, "--budget-s", "0")
    assert status == 3
    assert content["left"] == ["peak", "sweep/micro/mae/eager/b2", "sweep/micro/mae/eager/b4"]
    assert "the same command goes on" in capsys.readouterr().err
    status, content = dry(out, *words)
    assert status == 0
    assert content["left"] == []
    assert len(content["entries"]) == 3


def test_a_failure_costs_one_entry_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    words = ("--parts", "sweep", "--methods", "mae", "--best", "eager")
    real = gpu_parts.Work.timed

    def broken(self: Any, size: str, method: str, name: str, count: int) -> Any:
        if count == 2:
            raise RuntimeError("illegal\nmemory access")
        return real(self, size, method, name, count)

    monkeypatch.setattr(gpu_parts.Work, "timed", broken)
    status, content = dry(out, *words)
    assert status == 1
    assert (
        content["entries"]["sweep/micro/mae/eager/b2"]["error"]
        == "RuntimeError: illegal memory access"
    )
    assert "images_per_second" in content["entries"]["sweep/micro/mae/eager/b4"]
    monkeypatch.setattr(gpu_parts.Work, "timed", real)
    assert dry(out, *words)[0] == 0


def test_the_sweep_stops_at_the_first_batch_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_parts.Work, "timed", full)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 80e9)
    words = ("--parts", "sweep", "--methods", "mae", "--best", "eager")
    _, content = dry(tmp_path / "gpu.json", *words)
    sizes = {k: v for k, v in content["entries"].items() if k.startswith("sweep")}
    assert list(sizes) == ["sweep/micro/mae/eager/b2"]
    assert sizes["sweep/micro/mae/eager/b2"]["peak_memory_gb"] == 80


def spoil(stepper: Any, how: str) -> None:
    """Faults such as a stale graph, a wrong cast or a lost gradient would make."""
    if how == "target":
        real = stepper.guides.teacher.features

        def tilted(*words: Any) -> torch.Tensor:
            features: torch.Tensor = real(*words)
            return features * torch.linspace(0.5, 2, features.shape[-1])

        stepper.guides.teacher.features = tilted
    elif how == "gradient":
        next(stepper.learner.student.blocks[0].parameters()).register_hook(lambda g: g * 1.2)
        stepper.learner.student.blocks[1].mlp.fc2.weight.register_hook(lambda g: g * 1.1)
    elif how == "nan":
        stepper.learner.student.blocks[1].mlp.fc2.weight.register_hook(lambda g: g * float("nan"))
    elif how == "stale":  # a graph that goes on reading its first batch
        first: dict[str, Any] = {}
        real = stepper.to_device
        stepper.to_device = lambda batch: first.setdefault("images", real(batch))


@pytest.mark.parametrize(
    ("how", "named"),
    [("target", "targets"), ("gradient", "gradients"), ("nan", "gradients"), ("stale", "scores")],
)
def test_a_way_that_is_not_the_step_is_found(how: str, named: str) -> None:
    seen: list[Any] = []
    for fault in ("", how):
        run = settings("micro", "two", VARIANTS["eager"], 4, precision="fp32")
        run.runtime.device = "cpu"
        with stepper_of(run, "two", VARIANTS["eager"], {}) as (stepper, teacher, step):
            if fault:
                spoil(stepper, fault)
            crops = assemble.crop_settings(run, teacher)
            batches = [
                next(synthetic_batches(crops, run.mask.rule, 16, 4, seed)) for seed in (1, 2)
            ]
            seen.append(gpu_equal.look(stepper, batches, step, seen[0]["mask"] if seen else None))
    found = gpu_equal.judge(gpu_equal.errors(seen[1], seen[0]), "fp32", "same", None)
    assert any(line.startswith(named) for line in found), found


SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal"}


@pytest.mark.parametrize("method", ["mae", "one", "two"])
def test_forward_and_backward_never_wait_for_the_device(method: str) -> None:
    """What a CUDA graph cannot capture, as far as a CPU shows it: no value of a tensor is read."""
    from torch.utils._python_dispatch import TorchDispatchMode

    read: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = op.overloadpacket.__name__
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            if name in SYNCS and any(t.numel() > 0 for t in tensors):
                read.append(name)
            return op(*args, **(kwargs or {}))

    run = settings("micro", method, VARIANTS["eager"], 4, precision="fp32")
    run.runtime.device = "cpu"
    with stepper_of(run, method, VARIANTS["eager"], {}) as (stepper, teacher, step):
        crops = assemble.crop_settings(run, teacher)
        batch = next(synthetic_batches(crops, run.mask.rule, 16, 4))
        with Watch():
            stepper.loss(batch, step).backward()
            assert read == []
            torch.ones(3)[0].item()  # the watch sees what it is for
    assert read == ["_local_scalar_dense"]


def test_fp8_layers_follow_their_formula_and_the_momentum_student() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    tokens = torch.randn(3, 7, 64)
    low = gpu_fp8.Fp8Linear(copy.deepcopy(linear))
    weight = linear.weight / (linear.weight.abs().max() / 448)
    rounded = weight.detach().to(torch.float8_e4m3fn).float() * (linear.weight.abs().max() / 448)
    scale = tokens.abs().max() / 448
    inputs = (tokens / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(
        low(tokens).float(), inputs @ rounded.T + linear.bias, rtol=2e-2, atol=2e-2
    )
    run = settings("micro", "two", VARIANTS["fp8"], 4, precision="bf16")
    run.runtime.device = "cpu"
    with stepper_of(run, "two", VARIANTS["fp8"], {}) as (stepper, _, _):
        guides = stepper.guides
        layer: Any = guides.momentum_runs().blocks[0].mlp.fc1  # type: ignore[index,union-attr]
        before = layer.low.float() * layer.scale
        with torch.no_grad():
            stepper.learner.student.blocks[0].mlp.fc1.weight.mul_(2)  # type: ignore[index,union-attr]
        guides.update_momentum(stepper.learner.student, 0.0)
        torch.testing.assert_close(layer.low.float() * layer.scale, 2 * before)


def test_photos_are_of_imagenets_size_and_can_be_read(tmp_path: Path) -> None:
    sizes = [len(gpu_photos.photo(seed)) for seed in range(3)]
    assert all(60_000 < size < 180_000 for size in sizes), sizes
    (tmp_path / "a.jpg").write_bytes(gpu_photos.photo(0))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.size == gpu_photos.PHOTO


def test_without_its_modules_or_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "gpu.json"))
    if not torch.cuda.is_available():
        assert gpu.main([*out]) == 2
        assert (
            capsys.readouterr().err
            == "no NVIDIA GPU here: give --dry-run to see that the script works\n"
        )
    assert gpu.main([*out, "--dry-run", "--parts", "fast"]) == 2
    assert "--parts: 'fast' is unknown" in capsys.readouterr().err
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in ("timm", "rich") else real(n)
    )
    assert gpu.main([*out]) == 2
    assert capsys.readouterr().err == "missing modules: timm, rich (cmt_mae: set PYTHONPATH=src)\n"


def test_it_needs_none_of_the_modules_that_the_lent_machine_lacks() -> None:
    lacking = "jsonargparse faster_coco_eval pycocotools transformers datasets webdataset gradio"
    code = (
        f"import sys\nfor name in '{lacking}'.split():\n    sys.modules[name] = None\n"
        "import benchmarks.gpu_parts"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_the_targets_are_judged_by_the_best_rate() -> None:
    def rate(median: float) -> dict[str, Any]:
        return {"images_per_second": {"median": median}}

    lines = gpu_parts.verdicts(
        {
            "variants/base/two/eager/b256": rate(2000),
            "sweep/base/two/compiled/b512": rate(3500),
            "variants/large/two/eager/b256": rate(1500),
            "variants/base/one/eager/b256": rate(9000),
            "loader/tar/fed": {"lost_share": 0.06, **rate(3000)},
        }
    )
    assert lines == [
        "base/two: 3500 images/s of 3400 wanted, met (sweep/base/two/compiled/b512)",
        "large/two: 1500 images/s of 1600 wanted, missed (variants/large/two/eager/b256)",
        "loader/tar/fed: 6.0% lost to data of 5 % allowed, missed",
    ]
