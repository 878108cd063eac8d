"""Few-shot parts: by class, seeded, one inside the other."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.core.errors import InputError
from cmt_mae.data.source import Names, Source
from cmt_mae.evaluate.few_shot import few_shot_indexes

LABELS = [0] * 200 + [1] * 50 + [2] * 3


class Numbers:
    """A reader whose image ``i`` is the byte ``i``."""

    def read(self, index: int) -> bytes:
        return bytes([index])

    def piece(self, index: int, start: int, length: int) -> bytes:
        return self.read(index)[start : start + length]

    def sizes(self) -> list[int]:
        return [1] * len(LABELS)


def counts(few_shot: str, seed: int = 0) -> dict[int, int]:
    return dict(Counter(LABELS[i] for i in few_shot_indexes(LABELS, few_shot, seed)))


def test_counts_by_hand() -> None:
    assert counts("10%") == {0: 20, 1: 5, 2: 1}
    assert counts("1%") == {0: 2, 1: 1, 2: 1}  # 0.5 and 0.03 images: one at least
    assert counts("12.5 %") == {0: 25, 1: 6, 2: 1}
    assert counts("100%") == {0: 200, 1: 50, 2: 3}
    assert counts("5") == {0: 5, 1: 5, 2: 3}  # all where there are fewer
    assert counts("1") == {0: 1, 1: 1, 2: 1}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=120), st.integers(0, 2**63 - 1),
    st.floats(0.001, 100), st.floats(0.001, 100), st.integers(1, 40), st.integers(1, 40),
)  # fmt: skip
def test_a_smaller_part_lies_inside_a_larger_one(
    labels: list[int], seed: int, p: float, q: float, m: int, n: int
) -> None:
    for small, large in (
        (f"{min(p, q):.4f}%", f"{max(p, q):.4f}%"), (str(min(m, n)), str(max(m, n))),
    ):  # fmt: skip
        inner, outer = (few_shot_indexes(labels, text, seed) for text in (small, large))
        assert set(inner) <= set(outer)
        assert inner == sorted(set(inner))
        assert {labels[i] for i in inner} == set(labels)
        assert few_shot_indexes(labels, small, seed) == inner


def test_a_class_is_drawn_whatever_the_others_hold() -> None:
    alone = [i for i in few_shot_indexes(LABELS, "5", 3) if LABELS[i] == 0]
    assert [i for i in few_shot_indexes(LABELS[:210], "5", 3) if i < 200] == alone


def test_seeds_draw_other_images_evenly() -> None:
    drawn = Counter(i for seed in range(300) for i in few_shot_indexes(LABELS, "10%", seed))
    assert few_shot_indexes(LABELS, "10%", 0) != few_shot_indexes(LABELS, "10%", 1)
    often = [drawn[i] for i in range(200)]  # each with probability 1/10
    assert min(often) > 8
    assert max(often) < 60


@pytest.mark.parametrize(
    "text", ["0%", "0", "-1", "100.5%", "ten", "", "1.5", "5 shots", "%", "00"]
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="neither a share of each class like 1% or 10%"):
        few_shot_indexes(LABELS, text, 0)


def test_subset_is_a_source() -> None:
    names = Names(f"n{i}" for i in range(len(LABELS)))
    whole = Source(names, Numbers(), np.array(LABELS), ["a", "b", "c"])
    part = whole.subset([3, 210, 252])
    assert len(part) == 3
    assert part.classes == ["a", "b", "c"]
    assert [part.label(i) for i in range(3)] == [0, 1, 2]
    assert (part.name(2), part.read(2)) == ("n252", bytes([252]))
    others = {whole.subset(indexes).fingerprint() for indexes in ([3], [3, 210], [4, 210])}
    assert part.subset([2]).read(0) == part.read(2)
    assert len({*others, part.fingerprint(), whole.fingerprint()}) == 5
