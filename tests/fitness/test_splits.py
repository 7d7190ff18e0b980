"""The division of items is disjoint, stable and honest about what there is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.fitness.splits import ItemSplit, split_items

IDS = [str(number) for number in range(50)]


@given(
    total=st.integers(3, 80),
    share=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)),
    seed=st.integers(0, 5),
)
def test_parts_are_disjoint_counted_and_in_task_order(
    total: int, share: tuple[int, int, int], seed: int
) -> None:
    ids = [f"doc{number}" for number in range(total)]
    if sum(share) > total:
        with pytest.raises(InputError, match=rf"= {sum(share)} items asked for.*has {total}"):
            split_items(ids, *share, seed=seed, name="t")
        return
    split = split_items(ids, *share, seed=seed, name="t")
    parts = (split.search, split.validation, split.test)
    assert tuple(len(part) for part in parts) == share
    assert len({item for part in parts for item in part}) == sum(share)
    assert all(list(part) == sorted(part, key=ids.index) for part in parts)


def test_fractions_are_of_all_items_and_rounded_down() -> None:
    split = split_items(IDS, 0.5, 0.29, 10, seed=1, name="t")
    assert (len(split.search), len(split.validation), len(split.test)) == (25, 14, 10)
    hundred = [str(number) for number in range(100)]
    assert len(split_items(hundred, 0.29, 0, 0, seed=1, name="t").search) == 29


def test_asking_for_more_search_items_keeps_the_held_out_ones() -> None:
    small, large = (split_items(IDS, n, 10, 10, seed=3, name="t") for n in (5, 25))
    assert (small.validation, small.test) == (large.validation, large.test)
    assert set(small.search) < set(large.search)


def test_seed_and_name_change_the_draw() -> None:
    draws = {
        split_items(IDS, 10, 10, 10, seed=seed, name=name).test
        for seed in (0, 1)
        for name in ("a", "b")
    }
    assert len(draws) == 4


def test_same_draw_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from evomerge.fitness.splits import split_items\n"
        "print(split_items([str(n) for n in range(50)], 10, 5, 5, seed=7, name='t'))"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert made == {str(split_items(IDS, 10, 5, 5, seed=7, name="t"))}


def test_the_draw_of_this_release_is_kept() -> None:
    # Recorded: a study resumed by a later release must see the same items.
    assert split_items(IDS[:12], 3, 2, 2, seed=0, name="t") == ItemSplit(
        search=("0", "1", "4"), validation=("3", "6"), test=("10", "11")
    )


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((0, 1, 1), "t: search: must be at least 1 item, got 0"),
        ((-1, 1, 1), r"t: search: must be an integer >= 0 or a fraction in \(0, 1\], got -1"),
        ((1, 1.5, 1), r"t: validation: must be an integer >= 0 or a fraction in \(0, 1\], got 1.5"),
        (
            (1, 1, float("nan")),
            r"t: test: must be an integer >= 0 or a fraction .*, got nan",
        ),
        ((1, 0.001, 1), "t: validation: 0.001 of 50 items is not one item"),
        ((True, 1, 1), "t: search: expected a count or a fraction, got True"),
        (
            (40, 10, 5),
            r"t: 40 search \+ 10 validation \+ 5 test = 55 items .*has 50",
        ),
    ],
)
def test_errors_name_the_number(shares: tuple[float, float, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        split_items(IDS, *shares, seed=0, name="t")


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(InputError, match="t: 1 item ids occur more than once"):
        split_items(["a", "b", "a"], 1, 1, 1, seed=0, name="t")
