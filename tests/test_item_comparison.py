"""Trials compared item by item, against formulas by hand, scipy and brute force."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from answered_study import answered
from rich.console import Console
from scipy import stats
from small_study import finished

from evomerge.comparison_rows import comparison_facts, comparison_note, comparison_rows
from evomerge.errors import InputError
from evomerge.fitness.aggregate import Aggregate
from evomerge.item_comparison import (
    Comparison,
    Pairing,
    compare_trials,
    find_trial,
    rivals_of,
)
from evomerge.paired_tests import Resampling, bootstrap, holm, mcnemar
from evomerge.study_record import History, Result
from evomerge.study_view import StudyView
from evomerge.terminal import print_comparison
from evomerge.trial import Direction, Evaluation, Objective, Score, Trial


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> StudyView:
    return answered(tmp_path_factory.mktemp("answered") / "strings")


def one(view: StudyView, *words: str) -> Comparison:
    return compare_trials(view, [find_trial(view, word) for word in words])


def columns(view: StudyView, number: int) -> list[np.ndarray]:
    return [np.array(score.items) for score in view.test[number].scores]


class TestStatistics:
    @pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (7, 2), (3, 3), (0, 12)])
    def test_mcnemar_counts_the_flips_that_are_as_uneven(self, better: int, worse: int) -> None:
        flips = better + worse
        ways = [math.comb(flips, k) for k in range(flips + 1)]
        wanted = sum(w for k, w in enumerate(ways) if abs(2 * k - flips) >= abs(better - worse))
        assert mcnemar(better, worse) == pytest.approx(wanted / 2**flips)

    def test_holm_by_hand(self) -> None:
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
        assert holm([]) == []

    def test_the_bootstrap_is_that_of_brute_force(self) -> None:
        draw = np.random.default_rng(0)
        ids = tuple(f"i{place}" for place in range(60))
        words = {item: float(draw.integers(1, 30)) for item in ids}
        tasks = {item: "ab"[place % 3 == 0] for place, item in enumerate(ids)}
        mine, other = draw.gamma(2.0, 0.3, (2, 60))
        less = Objective("nll", Direction.MINIMIZE)
        for aggregate in (
            Aggregate(),
            Aggregate("exp", words),
            Aggregate("bits", words),
            Aggregate("exp", words, tasks),
        ):
            found = bootstrap(less, aggregate, ids, mine, other, Resampling(3000))
            groups = [[p for p in range(60) if tasks[ids[p]] == name] for name in "ab"]
            strata = groups if aggregate.strata else [list(range(60))]
            values = []
            for _ in range(1500):
                rows = np.concatenate([draw.choice(group, len(group)) for group in strata])
                names = [ids[row] for row in rows]
                pair = [aggregate.estimate(names, list(s[rows]))[0] for s in (mine, other)]
                values.append(pair[1] - pair[0])
            for share in (0.025, 0.5, 0.975):
                width = float(np.std(values))
                wanted = np.quantile(values, share)
                assert np.quantile(found, share) == pytest.approx(wanted, abs=0.2 * width)

    def test_objectives_with_the_same_items_share_their_draws(self) -> None:
        ids, scores = ("a", "b", "c", "d"), ((1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 0.0))
        resampling = Resampling(200)
        up = bootstrap(Objective("x"), Aggregate(), ids, *scores, resampling)
        down = bootstrap(Objective("y", Direction.MINIMIZE), Aggregate(), ids, *scores, resampling)
        assert np.array_equal(up, -down)
        assert len(set(up)) > 2


class TestCompareTrials:
    def test_a_difference_by_hand(self, view: StudyView) -> None:
        ours, theirs = view.knee, find_trial(view, "uniform")
        assert ours is not None
        found = one(view, "knee", "uniform")
        assert [p.objective for p in found.pairings] == ["reverse", "sort", ""]
        for pairing, mine, other in zip(
            found.pairings, columns(view, ours), columns(view, theirs), strict=False
        ):
            difference = mine - other
            assert pairing.split == "test"
            assert pairing.items == 60
            assert pairing.values == pytest.approx((mine.mean(), other.mean()))
            assert pairing.difference == pytest.approx(difference.mean())
            error = difference.std(ddof=1) / math.sqrt(60)
            assert pairing.standard_error == pytest.approx(error)
            assert (pairing.better, pairing.worse) == (
                (difference > 0).sum(),
                (difference < 0).sum(),
            )
            flips = pairing.better + pairing.worse
            assert flips > 0
            assert pairing.p == stats.binomtest(pairing.better, flips).pvalue
            ids = view.items_of("test", ours)[0]
            assert [c.item for c in pairing.changes] == [
                item for item, d in zip(ids, difference, strict=True) if d
            ]
            assert pairing.interval is not None
            middle = sum(pairing.interval) / 2
            assert middle == pytest.approx(pairing.difference, abs=error)
            width = pairing.interval[1] - pairing.interval[0]
            assert width == pytest.approx(2 * 1.96 * error, rel=0.35)

    def test_the_mean_keeps_what_the_objectives_share(self, view: StudyView) -> None:
        ours, theirs = view.knee, find_trial(view, "uniform")
        assert ours is not None
        mean = one(view, "knee", "uniform").pairings[-1]
        pairs = zip(columns(view, ours), columns(view, theirs), strict=True)
        both = np.mean([a - b for a, b in pairs], axis=0)  # per item, as they are the same items
        assert mean.difference == pytest.approx(both.mean())
        assert mean.standard_error == pytest.approx(both.std(ddof=1) / math.sqrt(60))
        wanted = stats.ttest_1samp(both, 0.0).pvalue
        assert mean.p == pytest.approx(wanted)
        assert mean.interval is not None
        low, high = mean.interval
        assert high - low == pytest.approx(2 * 1.96 * mean.standard_error, rel=0.2)  # type: ignore[operator]

    def test_all_tests_are_corrected_together(self, view: StudyView) -> None:
        found = one(view, "knee", "base", "expert:one", "uniform")
        assert len(found.pairings) == 9
        assert list(found.names) == [
            find_trial(view, w) for w in ("knee", "base", "expert:one", "uniform")
        ]
        raw = [p.p for p in found.pairings if p.p is not None]
        assert [p.adjusted for p in found.pairings if p.p is not None] == holm(raw)
        for pairing in found.pairings:
            assert pairing.adjusted is None or pairing.p is None or pairing.adjusted >= pairing.p
            assert pairing.clear == (pairing.adjusted is not None and pairing.adjusted < 0.05)

    def test_the_other_way_round_is_the_negative(self, view: StudyView) -> None:
        forth, back = one(view, "base", "uniform"), one(view, "uniform", "base")
        for a, b in zip(forth.pairings, back.pairings, strict=True):
            assert a.difference == pytest.approx(-b.difference)
            assert (a.better, a.worse, a.p) == (b.worse, b.better, b.p)

    def test_graded_scores_are_tested_by_t_and_less_can_be_better(self, tmp_path: Path) -> None:
        view = finished(tmp_path / "three", objectives=3)
        found = one(view, "knee", "base")
        assert [p.objective for p in found.pairings] == ["reverse", "sort", "nll"], (
            "no mean of units"
        )
        nll = found.pairings[2]
        mine, other = (columns(view, n)[2] for n in (found.first, nll.theirs))
        assert nll.difference == pytest.approx((other - mine).mean())
        assert (nll.better, nll.worse) == ((other > mine).sum(), (other < mine).sum())
        assert nll.test == "t"
        if nll.standard_error and nll.standard_error > 1e-9:
            assert nll.p == pytest.approx(stats.ttest_rel(mine, other).pvalue)

    def test_search_scores_are_compared_where_one_has_no_others(self, view: StudyView) -> None:
        plain = next(
            t.number for t in view.trials if t.evaluation is not None and t.number not in view.test
        )
        found = one(view, str(plain), "base", "uniform")
        assert {p.split for p in found.pairings} == {"search"}
        assert "Search items flatter the front" in comparison_note(found)
        assert "flatter" not in comparison_note(one(view, "knee", "base"))
        with pytest.raises(InputError, match=f"trial {plain} has no scores on test items"):
            compare_trials(view, [0, plain], "test")

    def test_only_items_that_both_were_scored_on_count(self, view: StudyView) -> None:
        """A race stops after a prefix, and a set of items may be another one."""
        history = History.of([], "")
        history.opened = dict(view.history.opened or {})
        history.opened["items"] = {
            "search": [["a", "b", "c", "d"]],
            "validation": [[]],
            "test": [[]],
        }
        history.sets.append((("d", "c", "x"),))
        history.set_of[1] = 0

        def trial(number: int, *scores: float) -> Trial:
            evaluation = Evaluation((Score(0.0, 0.0, scores),), {})
            return replace(view.trials[0], number=number, evaluation=evaluation, label=f"l{number}")

        small = replace(
            view, history=history, objectives=view.objectives[:1], knee=None, results={},
            contract={"items": history.opened["items"]},
            trials=(trial(0, 1.0, 0.0, 1.0, 0.0), trial(1, 1.0, 1.0, 0.0), trial(2, 0.0, 1.0)),
        )  # fmt: skip
        (pairing,) = compare_trials(small, [0, 1]).pairings
        assert (pairing.items, pairing.values) == (2, (0.5, 1.0))  # c: 1 and 1, d: 0 and 1
        assert [c.item for c in pairing.changes] == ["d"]
        (pairing,) = compare_trials(small, [0, 2]).pairings
        assert (pairing.items, pairing.difference) == (2, 0.0)
        with pytest.raises(InputError, match="scored on different search items of reverse"):
            compare_trials(small, [1, 2])

    def test_a_failed_trial_says_why(self, view: StudyView) -> None:
        failed = next(t.number for t in view.trials if t.failure is not None)
        with pytest.raises(
            InputError, match=f"trial {failed} has no scores .* it failed .*diverged"
        ):
            compare_trials(view, [0, failed])

    def test_too_few_or_twice(self, view: StudyView) -> None:
        with pytest.raises(InputError, match="at least two trials"):
            compare_trials(view, [3])
        with pytest.raises(InputError, match=r"trial 0 \(base\) is named twice"):
            compare_trials(view, [0, 1, 0])

    def test_equal_merges_have_nothing_to_test(self, view: StudyView) -> None:
        twin = replace(view.trials[0], number=1, label="expert:one")
        evaluation = view.test[0]
        same = replace(
            view, trials=(view.trials[0], twin, *view.trials[2:]),
            results={**view.results, ("test", 1): Result(evaluation, 1, "w")},
        )  # fmt: skip
        pairing = compare_trials(same, [0, 1]).pairings[0]
        assert (pairing.difference, pairing.p, pairing.interval) == (0.0, 1.0, None)
        assert not pairing.clear


class TestFindTrial:
    def test_numbers_labels_and_picks(self, view: StudyView) -> None:
        assert find_trial(view, "11") == 11
        assert view.trial(find_trial(view, "expert:two")).label == "expert:two"
        assert find_trial(view, "knee") == view.knee
        assert find_trial(view, "best:sort") == view.best("sort")

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("two", r"'two' names no trial of .*did you mean 'expert:two'"),
            ("unifrom", "did you mean 'uniform'"),
            ("x", r"expected a number from 0 to \d+, knee, hv, best:OBJECTIVE, .* baseline: base"),
            ("999", "has trials 0 to"),
            ("-1", "has trials 0 to"),
            ("best:x", "unknown 'x'"),
        ],
    )
    def test_others_are_refused(self, view: StudyView, word: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            find_trial(view, word)

    def test_the_baselines_are_the_rivals(self, view: StudyView) -> None:
        assert view.knee is not None
        labels = {view.trial(n).label for n in rivals_of(view, view.knee)}
        assert {"base", "expert:one", "expert:two", "expert:three", "uniform"} <= labels
        assert find_trial(view, "base") not in rivals_of(view, find_trial(view, "base"))


def test_facts_are_json_and_list_the_items_that_were_asked_for(view: StudyView) -> None:
    found = one(view, "knee", "base")
    first = found.pairings[0]
    texts = {("reverse", first.changes[0].item): "abc="}
    facts = json.loads(json.dumps(comparison_facts(found, 2, texts), allow_nan=False))
    assert facts["first"]["trial"] == view.knee
    pair = facts["pairs"][0]
    assert (pair["objective"], pair["against"]["name"]) == ("reverse", "base")
    assert [c["item"] for c in pair["changed"]] == [c.item for c in first.changes[:2]]
    assert pair["changed"][0]["text"] == "abc="
    assert "text" not in pair["changed"][1]
    assert facts["pairs"][-1]["objective"] is None


def test_people_see_the_items_and_what_the_columns_are(view: StudyView) -> None:
    found = one(view, "knee", "base")
    console = Console(width=150, record=True, file=io.StringIO())
    print_comparison(console, found, 1, {("reverse", found.pairings[0].changes[0].item): "abc="})
    text = " ".join(console.export_text().split())
    assert "McNemar's exact test where all scores are 0 or 1, else Student's t" in text
    assert f"{len(found.pairings[0].changes)} of 60 items differ" in text
    assert "abc=" in text
    assert "60 test" in text
    assert comparison_note(found).split("p:")[0] in text


def test_nothing_to_test_is_a_dash() -> None:
    pairing = Pairing(0, 1, "a", "test", 1, (1.0, 0.0), 1.0, None, None, 1, 0, "t", None)
    row = comparison_rows(Comparison({0: "x", 1: "y"}, (pairing,)))[0]
    assert row[5:] == ("+1.000", "–", "1/0", "–")
    assert "nothing could be tested" in comparison_note(Comparison({0: "x", 1: "y"}, (pairing,)))
