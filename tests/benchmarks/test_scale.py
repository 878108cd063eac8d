"""The model of cost against real modules, published numbers and hand arithmetic; its page; its measurements."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import scale, timing
from benchmarks import scale_model as model
from programs import forks

REPOSITORY = Path(__file__).parents[2]
RESULT = REPOSITORY / "docs" / "results" / "scale.json"


@pytest.mark.parametrize(
    ("size", "stage", "gmac", "left"),
    [("base", "one", 46.79, 97.9), ("base", "two", 64.59, 97.9), ("large", "one", 79.68, 98.7),
     ("large", "two", 141.54, 98.8)],
)  # fmt: skip
def test_multiplications_are_those_of_the_specification(
    size: str, stage: str, gmac: float, left: float
) -> None:
    """Section 11: the plain way's GMAC, and the percentage that the four exact savings leave of it."""
    assert model.flop(size, stage)["step"] / 2e9 == pytest.approx(gmac * left / 100, rel=0.0015)


def test_mae_is_the_official_codes_count() -> None:
    """9.781 GMAC forward and 19.447 backward for ViT-B by torch's counter on facebookresearch/mae, whose heads see
    the visible tokens too and whose last decoder block finishes them: 3 % of it."""
    counted = model.flop("base", "mae")
    assert (counted["step"] - counted["backward"]) / 2e9 == pytest.approx(9.781, rel=0.03)
    assert counted["backward"] / 2e9 == pytest.approx(19.447, rel=0.03)


def test_a_step_by_hand() -> None:
    machine = model.Machine(sustained=100e12, inside=100e9, between=10e9, fixed_s=0.01, bucket=25e6)
    learnt = model.parameters(model.paper_networks("base", "two")[0], learnt=True)
    assert learnt == 111_918_336
    cost = model.step_cost("base", "two", 8, 64, machine)
    work = model.flop("base", "two")
    assert cost["compute_s"] == pytest.approx(64 * work["step"] / 100e12)
    assert cost["bytes_sent"] == pytest.approx(1.75 * 4 * learnt)
    assert cost["exchange_s"] == pytest.approx(1.75 * 4 * learnt / 100e9)
    # backward (25 ms) hides all of the 8 ms but the last bucket's share
    assert cost["exposed_s"] == pytest.approx(cost["exchange_s"] * 25e6 / (4 * learnt))
    slow = model.step_cost("base", "two", 64, 8, machine)
    assert slow["bytes_sent"] == pytest.approx(2 * 63 / 64 * 4 * learnt)
    # 7/8 twice inside at 100 GB/s, then an eighth of the gradient over 8 nodes at 10 GB/s
    exchange = 1.75 * 4 * learnt / 100e9 + 1.75 * 4 * learnt / 8 / 10e9
    backward = 8 * work["backward"] / 100e12
    assert slow["exchange_s"] == pytest.approx(exchange)
    assert slow["exposed_s"] == pytest.approx(exchange - backward)
    assert slow["images_per_second"] == pytest.approx(64 * 8 / slow["step_s"])


@settings(deadline=None)
@given(
    st.sampled_from(["base", "large"]), st.sampled_from(["mae", "one", "two"]),
    st.integers(1, 1024), st.integers(1, 512),
)  # fmt: skip
def test_properties_of_the_model(size: str, stage: str, gpus: int, images: int) -> None:
    machine = model.Machine()
    cost = model.step_cost(size, stage, gpus, images, machine)
    assert 0 <= cost["exposed_s"] <= cost["exchange_s"]
    assert 0 < cost["efficiency"] <= 1
    assert cost["images_per_second"] <= gpus * images / cost["compute_s"]
    more = model.step_cost(size, stage, gpus, images + 1, machine)
    assert more["images_per_second"] > cost["images_per_second"]
    assert model.memory_bytes(size, gpus, "fsdp") <= model.memory_bytes(size, gpus, "ddp")
    assert model.all_reduce_bytes(1e9, gpus) <= 2e9


def test_the_page_is_what_the_formulas_and_the_measurements_say() -> None:
    page = model.PAGE.read_text(encoding="utf-8")
    measured = json.loads(RESULT.read_text())
    assert not measured["quick"]
    assert model.filled(page, model.tables(measured)) == page
    other = copy.deepcopy(measured)
    other["checkpoint"]["bytes"] *= 2
    assert model.filled(page, model.tables(other)) != page


def test_the_measured_checkpoint_and_traffic_are_near_the_model() -> None:
    measured = json.loads(RESULT.read_text())
    size = measured["checkpoint"]["size"]
    assert measured["checkpoint"]["bytes"] == pytest.approx(model.checkpoint_bytes(size), rel=0.002)
    runs = measured["processes"]
    wanted = 2 * model.all_reduce_bytes(runs["gradient_bytes"], 2)
    assert runs["loopback_bytes_per_step"] == pytest.approx(wanted, rel=0.05)
    assert runs["rounds"] >= 7


def test_growth_and_two_real_processes_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead contestant is an error, not a hang."""
    monkeypatch.setattr(timing, "TURN_S", 0.0)  # one step a turn
    monkeypatch.setattr(timing, "REST_S", 0.0)
    monkeypatch.setattr(timing, "PROCESSES", forks())
    content = scale.main(["--quick", "--out", str(tmp_path), "--parts", "growth,processes"])
    assert content["growth"]["axes"]["images a step"]["memory_gb"]["8"] > 0
    table = model.growth_table(content)
    assert "| images a step, 8 to 16 |" in table
    runs = content["processes"]
    wanted = 2 * model.all_reduce_bytes(runs["gradient_bytes"], 2)
    assert runs["loopback_bytes_per_step"] == pytest.approx(wanted, rel=0.3)
    assert set(runs["seconds"]) == {"1 process", "2 processes"}
    with pytest.raises(RuntimeError, match="a process of a contestant ended"):
        scale.alternate_processes({"gone": scale.Contestant(sys.exit)}, 1)
    assert scale.read_packed(tmp_path / "store", 1000).run()["images"].shape == (32, 3, 32, 32)  # type: ignore


def test_the_launch_lines_name_commands_that_exist() -> None:
    """`-m cmt_mae pretrain` takes the flags of the page, and torchrun takes those before it."""
    page = model.PAGE.read_text(encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    flags = set(re.findall(r"torchrun (.*?)-m cmt_mae", page.replace("\\\n", ""), re.DOTALL))
    names = {word for line in flags for word in line.split() if word.startswith("--")}
    assert names >= {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--standalone"}
    missing: list[Any] = [n for n in names if n not in shown and n.replace("-", "_") not in shown]
    assert not missing
