"""The comparisons are fair: the same shapes, the same results, turns in turn; the page says what was found."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.loaders import ours, timm_loader, torchvision_loader
from benchmarks.side_by_side import Options
from benchmarks.speed_page import page
from benchmarks.steps import naive_model, our_trainer, settings, transformers, transformers_model
from benchmarks.timing import OURS, Comparison, Contestant, Step, alternate, alternate_processes
from PIL import Image

from benchmarks import side_by_side, timing
from cmt_mae.tools.bench.build import frozen_backbone
from programs import forks


def learned(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_naive_has_our_parameters_and_our_frozen_networks() -> None:
    config = settings("two", "small", batch_size=2)
    backbone = frozen_backbone(config)
    _, task, _, _ = our_trainer(config, "two", backbone)
    naive = naive_model(config, backbone, "last")
    naive.start_stage_two()
    assert learned(naive) == learned(task.learner)
    assert naive.momentum is not None
    ours_frozen = sum(p.numel() for p in task.frozen_networks.parameters())
    theirs = sum(p.numel() for net in (naive.teacher, naive.momentum) for p in net.parameters())
    # a bias for the folded normalisation
    assert abs(ours_frozen - theirs) <= backbone.model.embed_dim
    assert naive.mask_ratio == config.mask.ratio
    assert naive.alpha == config.alpha


def test_transformers_has_our_parameters_and_learns() -> None:
    config = settings("mae", "micro")
    _, task, _, _ = our_trainer(config, "one")
    assert learned(transformers_model(config)) == learned(task.learner)
    step: Any = transformers(config)
    (model,) = [
        cell.cell_contents for cell in step.run.__closure__ if hasattr(cell.cell_contents, "vit")
    ]
    before = model.vit.layers[0].mlp.fc1.weight.clone()
    step.run()
    assert not torch.equal(before, model.vit.layers[0].mlp.fc1.weight)


def test_loaders_hand_over_equal_work(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for number in range(4):
        noise = torch.randint(0, 256, (300, 260, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).save(tmp_path / "all" / f"{number}.jpg")
    runs: dict[str, Any] = {
        OURS: ours(tmp_path, 4, 2),
        "torchvision": torchvision_loader(tmp_path, 4, 2),
        "timm": timm_loader(tmp_path, 4, 2),
    }
    for name, run in runs.items():
        batches = run()
        assert len(batches) == 2, name
        for batch in batches:
            images = batch["images"] if name == OURS else batch[0]
            assert images.shape == (2, 3, 224, 224)
            assert images.dtype == torch.uint8


def test_contestants_take_turns_and_each_begins() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    seconds = alternate({n: lambda n=n: calls.append(n) for n in names}, 3)
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    rounds = ["".join(calls[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]  # the first is not counted


def test_ratios_are_taken_within_a_round() -> None:
    comparison = Comparison("mae", "mae/x", "what", 10, target={"rival": 1.5, "slow": 1.5})
    entry = comparison.measured(
        {OURS: [1.0, 2.0, 4.0], "rival": [2.0, 2.0, 4.0], "slow": [2.0, 4.0, 8.0]}
    )
    assert entry["contestants"][OURS]["rate"] == 5.0
    assert entry["contestants"]["rival"]["times_ours"] == {"median": 1.0, "low": 1.0, "high": 2.0}
    environment = {
        "versions": dict.fromkeys(("python", "torch", "timm", "torchvision", "pillow"), "1"),
        "hardware": {"processor": "p", "cores": 2},
    }
    text = page(
        {"command": "c", **environment, "comparisons": {"mae/x": {**entry, "quick": False}}}
    )
    assert "| mae/x against rival | 1.5 x | 1.00 x (1.00 to 2.00) | missed |" in text
    assert "| mae/x against slow | 1.5 x | 2.00 x (2.00 to 2.00) | met |" in text
    assert "quick run" not in text


def test_parts_are_selected_and_earlier_numbers_stay(tmp_path: Path) -> None:
    for axis in ("image size", "width"):
        chosen = {axis: side_by_side.COSTS[axis]}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(side_by_side, "COSTS", chosen)
            patch.setattr(side_by_side, "STAGES", {"mae": "mae", "stage two": "two"})
            side_by_side.main(["--quick", "--parts", "cost", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert set(content["comparisons"]) == {"cost/small/stage", "cost/small/image size", "cost/small/width"}
    assert content["comparisons"]["cost/small/stage"]["facts"]["stage_two_over_mae"]["flop"] > 1.5
    text = (tmp_path / "speed.md").read_text()
    assert "quick run" in text
    assert "| 96 px |" in text


def test_a_quick_run_has_two_rounds_of_the_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(side_by_side, "run", lambda *given: seen.append(given))
    side_by_side.main(["--quick"])
    side_by_side.main(["--sizes", "vitb16"])
    (_, quick, aside), (_, real, committed) = seen
    assert (quick.rounds, quick.sizes, real.rounds, real.sizes) == (2, ("small",), 7, ("vitb16",))
    assert aside != committed == side_by_side.RESULTS
    assert isinstance(quick, Options)


def noting(path: Path) -> Step:
    """A contestant that leaves a byte a run, takes longer at its second and third, and holds 100 MB meanwhile."""
    path.touch()

    def run() -> None:
        with open(path, "ab") as file:
            file.write(b".")
        held = bytearray(100_000_000)
        time.sleep(0.02 * min(path.stat().st_size, 3))
        del held

    return Step(run, {"who": os.getpid()})


def test_contestants_in_processes_of_their_own_keep_their_state_and_their_memory_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "REST_S", 0.0)
    monkeypatch.setattr(timing, "PROCESSES", forks())
    contestants = {name: Contestant(partial(noting, tmp_path / name)) for name in ("a", "b")}
    turns = alternate_processes(contestants, 2, warm=1, turn_s=0.3)
    for times in turns.seconds.values():
        assert len(times) == 2
        assert times[0] >= 0.04
        assert times[1] >= 0.06
    assert len({os.getpid(), *(turns.facts[name]["who"] for name in "ab")}) == 3
    if turns.facts["a"]["of_steps_alone"]:
        assert 0.09 < turns.facts["a"]["above_start_gb"] < 0.5
    runs = [(tmp_path / name).stat().st_size for name in contestants]
    assert runs[0] == runs[1] >= 1 + 2  # the same for all; several a turn where the machine is free
