"""The ranking of trials: which rate is chosen, what counts as noise, which plans no other beats."""

from __future__ import annotations

import pytest
import torch

from freezeplan.training.ranking import Place, Trial, as_rows, front, rank, verdict


def trial(plan: str, wrong: list[bool], *, lr: float = 1e-3, seed: int = 0, choice: float = 0.5, seconds: float = 1.0):
    return Trial(plan, lr, seed, choice, sum(wrong) / len(wrong), 0.0, seconds, None, 10, False, tuple(wrong))


def missed(share: float, count: int = 400, seed: int = 0) -> list[bool]:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share).tolist()


def test_the_rate_is_chosen_on_the_held_out_images_and_not_on_the_validation_images():
    better_there = trial("a", [True, True, False], lr=1e-3, choice=0.1)
    better_here = trial("a", [False, False, False], lr=3e-3, choice=0.2)

    (place,) = rank([better_there, better_here])

    assert (place.lr, place.val_error) == (1e-3, pytest.approx(2 / 3))


def test_of_equal_rates_the_lowest_is_taken():
    (place,) = rank([trial("a", [True], lr=lr) for lr in (3e-3, 3e-4, 1e-3)])

    assert place.lr == 3e-4


def test_seeds_are_averaged_before_the_rate_is_chosen():
    trials = [
        trial("a", [False], lr=1e-3, seed=0, choice=0.0),
        trial("a", [False], lr=1e-3, seed=1, choice=0.9),
        trial("a", [True], lr=3e-3, seed=0, choice=0.4),
        trial("a", [True], lr=3e-3, seed=1, choice=0.4),
    ]

    assert rank(trials)[0].lr == 3e-3


def test_a_small_difference_is_noise_and_a_large_one_is_not():
    first = missed(0.2)
    nearly = [not w if n in (0, 100, 200) else w for n, w in enumerate(first)]
    worse = missed(0.5, seed=1)

    best, second, last = rank([trial("a", first), trial("b", nearly), trial("c", worse)])

    assert (best.behind, best.within_noise) == (None, False)
    assert ({best.plan, second.plan}, second.within_noise) == ({"a", "b"}, True)
    assert (last.plan, last.within_noise) == ("c", False)
    assert last.behind is not None
    assert last.behind[0] > 0.2


def test_the_difference_is_paired():
    """Two plans of nearly the same error differ beyond noise where one misses a superset of the other's images."""
    base = missed(0.3, count=1500)
    more = [w or n % 40 == 0 for n, w in enumerate(base)]

    first, second = rank([trial("a", base), trial("b", more)])

    assert first.interval[1] > second.val_error  # the intervals overlap
    assert not second.within_noise


def test_the_interval_is_that_of_a_proportion():
    (place,) = rank([trial("a", missed(0.3, count=1000))])
    error = place.val_error
    half = 1.96 * (error * (1 - error) / 1000) ** 0.5

    assert place.interval == (pytest.approx(error - half, abs=half / 5), pytest.approx(error + half, abs=half / 5))


def test_the_same_trials_give_the_same_intervals():
    trials = [trial("a", missed(0.3)), trial("b", missed(0.4, seed=3))]

    assert rank(trials) == rank(list(trials))


def test_the_front_is_what_no_other_plan_beats_in_both():
    trials = [
        trial("fast", [True, True, False], seconds=1),
        trial("slow and no better", [True, True, False], seconds=5),
        trial("best", [False, False, False], seconds=9),
        trial("dominated", [True, False, False], seconds=10),
    ]

    assert front(rank(trials)) == ("fast", "best")


def test_the_verdict_names_the_cheapest_where_nothing_is_shown():
    alike = [trial("a", missed(0.30), seconds=9), trial("b", missed(0.30, seed=1), seconds=2)]
    apart = [trial("a", missed(0.1), seconds=9), trial("b", missed(0.6), seconds=2)]

    first = rank(alike)[0].plan
    other = "b" if first == "a" else "a"
    assert verdict(rank(alike)) == (
        f"no evidence of a difference between {first}, {other}; the cheapest is b, at lr 0.001"
    )
    assert verdict(rank(apart)) == "a is best, at lr 0.001"


def test_rows_are_plain_data():
    (row,) = as_rows(rank([trial("a", [True, False])]))

    assert row["plan"] == "a"
    assert row["front"] is True
    assert set(map(type, row.values())) <= {str, float, int, bool, type(None)}
    assert isinstance(rank([trial("a", [True])])[0], Place)
