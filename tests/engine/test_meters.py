"""Meters: true means, and a NaN counted apart instead of spreading."""

import math

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.engine.meters import Bad, Meters

CPU = torch.device("cpu")


def scalar(number: float) -> torch.Tensor:
    return torch.tensor(number)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_means_of_a_window(values: list[float]) -> None:
    meters = Meters(CPU)
    for value in values:
        meters.add({"loss": scalar(value)})
    means, bad = meters.read()
    assert means["loss"] == pytest.approx(sum(values) / len(values), rel=1e-4, abs=1e-3)
    assert bad == {}


def test_reading_empties_the_window() -> None:
    meters = Meters(CPU)
    assert meters.read() == ({}, {})
    meters.add({"loss": scalar(4.0)})
    meters.read()
    meters.add({"loss": scalar(1.0)})
    assert meters.read()[0] == {"loss": 1.0}
    assert meters.read() == ({}, {})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_do_not_spread(number: float) -> None:
    meters = Meters(CPU)
    for step, value in enumerate((1.0, number, 3.0, number), start=7):
        meters.add({"loss": scalar(value), "fine": scalar(2.0)}, step)
    means, bad = meters.read()
    assert means == {"loss": 2.0, "fine": 2.0}
    assert bad == {"loss": Bad(count=2, first=8)}
    meters.add({"loss": scalar(number)}, 11)
    means, bad = meters.read()
    assert math.isnan(means["loss"])  # nothing finite to average, and it says so
    assert bad == {"loss": Bad(count=1, first=11)}


def test_names_may_come_and_go() -> None:
    """Stage two brings a second loss in the middle of a window."""
    meters = Meters(CPU)
    meters.add({"teacher": scalar(2.0)})
    meters.add({"teacher": scalar(4.0), "momentum": scalar(5.0)})
    assert meters.read()[0] == {"teacher": 3.0, "momentum": 5.0}


def test_any_kind_of_number_and_no_graph() -> None:
    meters = Meters(CPU)
    weight = torch.ones((), requires_grad=True)
    meters.add(
        {"a": 2 * weight, "b": torch.tensor(3), "c": torch.tensor(1.5, dtype=torch.bfloat16)}
    )
    assert not any(row.requires_grad for row in meters.rows.values())
    assert meters.read()[0] == {"a": 2.0, "b": 3.0, "c": 1.5}


def test_a_window_continues_from_its_state() -> None:
    meters, straight = Meters(CPU), Meters(CPU)
    for step, value in enumerate((1.0, math.nan, 2.5)):
        meters.add({"loss": scalar(value)}, step)
        straight.add({"loss": scalar(value)}, step)
    later = Meters(CPU)
    later.load_state_dict(meters.state_dict())
    for step, value in enumerate((7.0, math.inf), start=3):
        later.add({"loss": scalar(value)}, step)
        straight.add({"loss": scalar(value)}, step)
    assert later.read() == straight.read() == ({"loss": 3.5}, {"loss": Bad(2, 1)})


def test_every_step_weighs_alike_whatever_its_micro_batches() -> None:
    meters = Meters(CPU)
    for value in (1.0, 2.0, 3.0, 6.0):
        meters.add({"loss": scalar(value)}, 1, share=1 / 4)
    meters.add({"loss": scalar(5.0)}, 2)
    assert meters.read()[0] == {"loss": 4.0}
    pair = [Meters(CPU, Two(rank)) for rank in (0, 1)]
    for number, one in enumerate(pair):
        one.add({"loss": scalar(2.0 + 2 * number)}, 3)
    assert [m.rows["loss"].tolist() for m in pair] == [[1, 0.5, 0], [2, 0.5, 0]]


class Two(Accelerator):
    """As if a second process stood beside this one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    num_processes = property(lambda _: 2)
    process_index = property(lambda self: self.rank)


def test_a_window_of_two_processes_goes_on_with_one_and_back() -> None:
    """Nothing counted is lost or counted twice when the number of processes changes."""
    first, second = Meters(CPU), Meters(CPU)
    first.add({"loss": scalar(1.0)}, 4)
    first.add({"loss": scalar(math.nan)}, 5)
    second.add({"loss": scalar(6.0)}, 4)
    state = [*first.state_dict(), *second.state_dict()]  # as two processes gather it
    alone = Meters(CPU)
    alone.load_state_dict(state)
    assert alone.read() == ({"loss": 3.5}, {"loss": Bad(1, 5)})
    again = [Meters(CPU, Two(rank)) for rank in (0, 1)]
    for meters in again:
        meters.load_state_dict(state)
    assert [m.rows["loss"].tolist() for m in again] == [[1, 1, 1], [6, 1, 0]]
    for meters in again:
        meters.load_state_dict(first.state_dict())  # of one process
    assert [m.rows["loss"].tolist() for m in again] == [[1, 1, 1], [0, 0, 0]]
