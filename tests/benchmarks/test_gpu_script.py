"""benchmarks/gpu.py on a CPU: its parts run, a wrong step is found, calls go on, the host reads no value."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.steps import METHODS, our_trainer, settings
from benchmarks.timing import Book

from benchmarks import gpu, photos
from cmt_mae.engine import compiling

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile up to its graphs; the code that inductor makes of them is test_compiling's."""
    real = compiling.compile_blocks
    monkeypatch.setattr(compiling, "compile_blocks", lambda networks: real(networks, "eager"))
    monkeypatch.setattr(compiling, "why_not", lambda _: "")


@pytest.mark.usefixtures("quick_compiler")
def test_the_dry_run_does_all_of_it_and_a_second_call_measures_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    entries = content["entries"]
    assert content["dry_run"]
    for way in ("bf16", "compile", "frozen bf16"):  # autocast really rounds, and is still the step
        assert 1e-4 < entries[f"smoke/{way}"]["relative_error_of_gradients"] < 0.1
    assert entries["smoke/fp32"]["relative_error_of_gradients"] < 1e-5
    assert entries["smoke/resume bit by bit, deterministic"]["tensors_equal"] > 100
    assert entries["smoke/fsdp, one process"]["parameters_with_gradient"] > 20
    for method in METHODS:
        row = entries[f"rates/micro/{method}/eager/b4"]
        assert row["host_waits"] == 0
        assert row["mfu"] > 0
        rival = "transformers" if method == "mae" else "naive"
        assert entries[f"rates/micro/{method}/{rival}/b4"]["images_per_second"]["median"] > 0
    for method in ("cmt", "mae"):
        assert 0 <= entries["quality"][f"run/{method}/0"]["points"][0]["knn data"] <= 100
    assert content["verdicts"] == []
    monkeypatch.setattr(gpu.Bench, "one_step", None)  # nothing is called again
    assert gpu.main(["--dry-run", "--out", str(out), "--budget-s", "0"]) == 0
    assert json.loads(out.read_text())["entries"] == entries


def test_a_step_that_is_not_the_step_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = gpu.options(["--dry-run"])
    bench = gpu.Bench(given, Book(tmp_path / "gpu.json"))
    real = bench.gradients

    def spoilt(run: Any, mask: Any) -> Any:
        found, used = real(run, mask)
        return (found if mask is None else found * 1.2), used

    monkeypatch.setattr(bench, "gradients", spoilt)
    with pytest.raises(RuntimeError, match=r"differ from eager fp32 by 2\.00e-01"):
        bench.one_step("fp32")


@pytest.mark.parametrize("method", list(METHODS))
def test_the_host_reads_no_value_in_a_whole_step(method: str) -> None:
    """On a GPU each such read would wait for the device; logging reads its numbers outside of the step."""
    trainer, _, batches, step = our_trainer(settings(method, "micro"), METHODS[method][1])
    with gpu.reading() as seen:
        for _ in range(2):  # the first one makes the optimizer's state
            trainer.step(batches, step)
        assert seen == []
        torch.ones(3)[0].item()  # the watch sees what it is for
    assert seen == ["_local_scalar_dense"]


def test_a_failure_costs_one_entry_no_time_is_told_and_the_next_call_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "book.json"
    book = Book(path, dry_run=True)

    def fails() -> dict[str, Any]:
        raise RuntimeError("illegal\nmemory access")

    def full() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert book.measure("a", 0, fails)["error"] == "RuntimeError: illegal memory access"
    assert book.measure("b", 0, lambda: {"x": 1})["x"] == 1
    again = Book(path, budget_s=0.0)
    assert again.measure("b", 0, fails)["x"] == 1  # measured already
    assert again.measure("a", 60, lambda: {"x": 2}) == {}
    assert again.left == ["a"]
    more = Book(path)
    assert more.measure("a", 60, lambda: {"x": 2})["x"] == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 80e9)
        assert more.measure("c", 0, full)["out_of_memory"]
    assert json.loads(path.read_text())["entries"]["c"]["peak_memory_gb"] == 80


def test_verdicts_name_what_was_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = gpu.Bench(gpu.options(["--dry-run"]), Book(tmp_path / "gpu.json"))
    bench.book.entries.update(
        {
            "rates/vitb16/two/eager/b256": {"mfu": 0.3, "host_waits": 0},
            "rates/vitb16/two/compiled/b256": {"mfu": 0.46, "host_waits": 2},
            "smoke/compile": {"error": "RuntimeError: no Triton"},
        }
    )
    assert bench.end() == 1
    assert capsys.readouterr().err.splitlines() == [
        "smoke/compile: RuntimeError: no Triton",
        "vitb16/two: MFU 46.0% of 45% wanted, met (rates/vitb16/two/compiled/b256)",
        "rates/vitb16/two/compiled/b256: 2 host waits in a step, 0 wanted",
    ]


def test_photos_are_of_imagenets_size() -> None:
    assert all(60_000 < len(photos.photo(seed)) < 180_000 for seed in range(2))


def test_without_its_modules_or_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path / "gpu.json"))
    if not torch.cuda.is_available():
        assert gpu.main([*out]) == 2
        assert "no NVIDIA GPU here: give --dry-run" in capsys.readouterr().err
    assert gpu.main([*out, "--dry-run", "--parts", "fast"]) == 2
    assert "--parts: 'fast' is unknown" in capsys.readouterr().err
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "timm" else real(n))
    assert gpu.main([*out]) == 2
    assert capsys.readouterr().err == "missing modules: timm (cmt_mae: set PYTHONPATH=src)\n"


def test_it_needs_none_of_the_modules_that_a_lent_machine_may_lack() -> None:
    lacking = "jsonargparse faster_coco_eval pycocotools transformers datasets webdataset gradio"
    code = (
        f"import sys\nfor name in '{lacking}'.split():\n    sys.modules[name] = None\n"
        "import benchmarks.gpu, benchmarks.steps, cmt_mae.tools.pretrain, cmt_mae.evaluate.knn"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
