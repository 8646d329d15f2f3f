"""The rules of the claims against hand arithmetic, published tables and counting."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.paper.claims.rules import (
    FailMore,
    Scores,
    fisher,
    fraction_interval,
    has_failed,
    holm,
    judge_failures,
    judge_scores,
    score_of,
)
from megdet.paper.outcome import Failure, Outcome


def trained(mmap: float = 50.0, first: float = 3.0, last: float = 1.0) -> Outcome:
    return Outcome("trained", "", 10, 0.1, 1, mmap, 80.0, 60.0, "t", "v", first_loss=first, last_loss=last)


def broken() -> Outcome:
    why = Failure(7, "rpn_box is not finite", 3.0)
    return Outcome(
        "failed", "step 7", 6, 0.1, 1, None, None, None, "t", "v", failure=why, first_loss=3.0, last_loss=9.0
    )


def test_a_training_fails_where_it_broke_or_its_loss_did_not_fall() -> None:
    assert not has_failed(trained())
    assert has_failed(broken())
    assert has_failed(trained(first=3.0, last=3.0))
    assert has_failed(trained(last=math.nan))
    assert score_of(trained(42.0)) == 42.0
    assert score_of(broken()) == score_of(trained(42.0, last=5.0)) == 0.0


@pytest.mark.parametrize(
    ("failed", "of", "other", "others", "chance"),
    [(5, 5, 0, 5, 1 / 252), (4, 5, 1, 5, 26 / 252), (0, 5, 0, 5, 1.0), (3, 4, 1, 4, 17 / 70)],  # the tea: 17 of 70
)
def test_fishers_chance_is_the_part_of_all_ways_to_share_out_the_failures(
    failed: int, of: int, other: int, others: int, chance: float
) -> None:
    assert fisher(failed, of, other, others) == pytest.approx(chance)


@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_fishers_chance_is_that_of_counting(of: int, others: int, data: st.DataObject) -> None:
    failed, other = data.draw(st.integers(0, of)), data.draw(st.integers(0, others))
    ways = [sum(index < of for index in own) for own in itertools.combinations(range(of + others), failed + other)]
    assert fisher(failed, of, other, others) == pytest.approx(sum(way >= failed for way in ways) / len(ways))


def test_holm_asks_the_smallest_chance_for_the_whole_share_and_stops_at_the_first_that_is_too_large() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.05 / 4, / 3, then 0.03 > 0.05 / 2
    assert holm([0.04]) == [True]
    assert holm([0.03, 0.03]) == [False, False]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("failed", "of", "low", "high"), [(5, 5, 0.4782, 1.0), (0, 5, 0.0, 0.5218), (3, 10, 0.0667, 0.6525)]
)
def test_the_interval_of_a_fraction_is_clopper_and_pearsons(failed: int, of: int, low: float, high: float) -> None:
    assert fraction_interval(failed, of) == pytest.approx((low, high), abs=1e-4)


def test_a_row_fails_more_only_beyond_chance_and_only_where_both_rows_have_run() -> None:
    results = {"a": [broken()] * 5, "b": [trained()] * 5, "c": [broken()] * 3 + [trained()] * 2}
    asked = [FailMore("a fails", "a", "b"), FailMore("c fails", "c", "b"), FailMore("d fails", "d", "b")]
    found = judge_failures(asked, results)
    assert [own.word for own in found] == ["shown", "not shown", "not run"]
    assert found[0].sentence() == "a fails: shown (a failed 5 of 5, b 0 of 5; by chance 0.004)."


def test_scores_are_equal_within_the_margin_and_better_or_worse_beyond_zero() -> None:
    results = {
        "a": [trained(score) for score in (50.0, 50.2, 50.4)],
        "b": [trained(score) for score in (50.1, 50.3, 50.5)],
        "c": [trained(score) for score in (60.0, 60.2, 60.4)],
        "d": [trained(score) for score in (40.0, 50.0, 60.0)],
        "e": [trained(50.0)],
    }

    def word(row: str, than: str, margin: float | None = None) -> str:
        return judge_scores([Scores("it", row, than, margin)], results)[0].word

    assert word("a", "b", 2.0) == "equal"
    assert (word("c", "a"), word("a", "c", 2.0)) == ("better", "worse")
    assert word("d", "a", 2.0) == "undecided"
    assert word("e", "a") == word("f", "a") == "not run"


def test_several_statements_share_the_level() -> None:
    results = {
        "a": [trained(score) for score in (50.0, 51.0, 52.0)],
        "b": [trained(score) for score in (52.6, 53.6, 54.6)],
    }
    alone, shared = Scores("it", "b", "a"), [Scores("it", "b", "a")] * 5
    assert judge_scores([alone], results)[0].word == "better"  # t of 4 degrees at 97.5%: 2.78 * 0.816 = 2.27 < 2.6
    assert judge_scores(shared, results)[0].word == "undecided"  # at 99.5%: 4.60 * 0.816 = 3.76
    assert "99% interval" in judge_scores(shared, results)[0].evidence
    # equal at 90%: 0.1 +- 2.13 * 0.163, within 0.5; for 5 statements at 98%: 0.1 +- 3.75 * 0.163 is not
    near = {"a": [trained(s) for s in (50.0, 50.2, 50.4)], "b": [trained(s) for s in (50.1, 50.3, 50.5)]}
    asked = [Scores("it", "b", "a", 0.5)]
    assert judge_scores(asked, near)[0].word == "equal"
    assert judge_scores(asked * 5, near)[0].word == "undecided"
    assert "; 98% -0.5 to +0.7, margin 0.5" in judge_scores(asked * 5, near)[0].evidence
