"""Choosing a member of the front: in closed form, and by the words of the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_study import finished

from evomerge.cli_arguments import PICK_HELP
from evomerge.errors import InputError, NothingUsableError
from evomerge.pareto import contributions, hypervolume, most_volume, nondominated, pick
from evomerge.picking import PICKS, pick_line, pick_trial
from evomerge.study_view import StudyView


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return finished(tmp_path_factory.mktemp("picking") / "strings")


class TestVolume:
    def test_by_hand(self) -> None:
        """Between its neighbours each member alone covers a rectangle."""
        front, volumes = contributions([[0.0, 1.0], [0.25, 0.5], [1.0, 0.0], [1.0, 1.0]])
        assert front == (0, 1, 2)
        # Reference 1.1: (0.25-0)*(1.1-1), (1-0.25)*(1-0.5), (1.1-1)*(0.5-0).
        np.testing.assert_allclose(volumes, [0.025, 0.375, 0.05])
        assert most_volume([[0.0, 1.0], [0.25, 0.5], [1.0, 0.0], [1.0, 1.0]]) == 1

    def test_equal_members_share_what_is_theirs(self) -> None:
        rows = [[0.0, 1.0], [0.25, 0.5], [0.25, 0.5], [1.0, 0.0]]
        assert contributions(rows)[1][1] == contributions(rows)[1][2] > 0.3
        assert most_volume(rows) == 1

    def test_scale_and_unit_do_not_count(self) -> None:
        rows = np.array([[0.0, 1.0], [0.6, 0.5], [0.7, 0.1], [1.0, 0.0]])
        assert most_volume(rows) == most_volume(rows * [1e6, 1e-3] + [5.0, -7.0]) == 2

    @given(
        st.integers(1, 3).flatmap(
            lambda m: st.lists(
                st.lists(st.integers(0, 5).map(float), min_size=m, max_size=m),
                min_size=1, max_size=7,
            )
        )
    )  # fmt: skip
    def test_it_is_what_the_front_loses(self, rows: list[list[float]]) -> None:
        front, volumes = contributions(rows)
        assert front == nondominated(rows)
        members = np.array([rows[row] for row in front])
        low, width = members.min(axis=0), np.ptp(members, axis=0)
        normal = (members - low) / np.where(width > 0, width, 1.0)
        reference = [1.1] * normal.shape[1]
        for place, volume in enumerate(volumes):
            others = normal[(normal != normal[place]).any(axis=1)]
            lost = hypervolume(normal, reference) - hypervolume(others, reference)
            assert volume == pytest.approx(lost, abs=1e-9)


class TestWeights:
    def test_by_hand(self) -> None:
        """On z = (0, 1), (0.4, 0.4), (1, 0) the worst weighted loss decides."""
        rows = [[0.0, 1.0], [0.4, 0.4], [1.0, 0.0]]
        assert pick(rows, [0.5, 0.5]) == 1
        assert pick(rows, [0.7, 0.3]) == 1  # 0.28 against 0.3
        assert pick(rows, [0.8, 0.2]) == 0  # 0.2 against 0.32
        assert pick(rows, [0.2, 0.8]) == 2


class TestPickTrial:
    def test_knee_and_best(self, view: StudyView) -> None:
        assert pick_trial(view, "knee") == view.knee
        assert pick_trial(view, "best:sort") == view.best("sort")

    def test_weights_follow_the_order_of_objectives(self, view: StudyView) -> None:
        assert pick_trial(view, "asf:1,0") == view.best("reverse")
        assert pick_trial(view, "asf:0,2") == view.best("sort")
        values = np.array([view.validation[number].values for number in view.front])
        z = (values.max(axis=0) - values) / np.ptp(values, axis=0)
        expected = view.front[int((z * [0.7, 0.3]).max(axis=1).argmin())]
        assert pick_trial(view, "asf:0.7,0.3") == expected

    def test_volume_by_the_scores_that_decided(self, view: StudyView) -> None:
        losses = [[-value for value in view.validation[n].values] for n in view.front]
        assert pick_trial(view, "hv") == view.front[most_volume(losses)]
        still = replace(view, front_split="search")
        losses = [[-v for v in view.told(n).values] for n in view.front]
        assert pick_trial(still, "hv") == view.front[most_volume(losses)]

    def test_the_line_tells_what_and_how(self, view: StudyView) -> None:
        number = pick_trial(view, "hv")
        text = pick_line(view, "hv", number)
        value = view.validation[number].values[0]
        assert text.startswith(f"hv picks trial {number}: reverse {value:.4f}, sort ")
        assert f"--trial {number} --out strings-{number}" in text

    @pytest.mark.parametrize("wrong", ["", "nee", "asf", "asf:", "best:", "hv:1", "knee:2", "all"])
    def test_other_words_are_refused_with_the_choices(self, view: StudyView, wrong: str) -> None:
        with pytest.raises(InputError) as caught:
            pick_trial(view, wrong)
        assert str(caught.value) == (
            f"--pick: expected one of knee, asf:W1,W2,..., best:OBJECTIVE, hv; got {wrong!r}"
        )

    @pytest.mark.parametrize("wrong", ["1", "1,2,3", "0,0", "-1,2", "a,b", "nan,1", "inf,1", "1,"])
    def test_wrong_weights_are_refused_with_the_names(self, view: StudyView, wrong: str) -> None:
        with pytest.raises(InputError) as caught:
            pick_trial(view, f"asf:{wrong}")
        assert str(caught.value) == (
            "--pick asf: expected 2 weights >= 0, not all 0, for reverse, sort in this order; "
            f"got {wrong!r}"
        )

    def test_unknown_objective(self, view: StudyView) -> None:
        with pytest.raises(InputError, match=r"unknown 'srt' \(did you mean 'sort'"):
            pick_trial(view, "best:srt")

    def test_nothing_to_choose_from(self, view: StudyView) -> None:
        with pytest.raises(NothingUsableError, match="nothing to choose"):
            pick_trial(replace(view, front=(), knee=None), "hv")


def test_the_help_names_every_way() -> None:
    assert all(one in PICK_HELP for one in PICKS)


def test_a_pick_outside_of_its_directory_is_shown_whole(view: StudyView, tmp_path: Path) -> None:
    assert str(view.directory.resolve()) in pick_line(view, "knee", pick_trial(view, "knee"))
