"""Fitness shaping: hand-computed values, invariances, failures that cost a pair and not a run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from diffsteer.training.eggroll import shape_fitness

NAN = float("nan")


def test_zscore_centres_each_prompt_and_divides_by_one_deviation() -> None:
    scores = torch.tensor([[1.0, 10.0], [3.0, 10.0], [2.0, 16.0], [2.0, 12.0]])
    shaped = shape_fitness(scores)
    centred = np.array([[-1, -2], [1, -2], [0, 4], [0, 0]], dtype=float)
    deviation = np.sqrt((centred**2).mean())
    assert shaped.deviation == pytest.approx(deviation)
    np.testing.assert_allclose(shaped.values, centred.mean(1) / deviation)
    assert shaped.count == 4 and shaped.values.dtype == torch.float64


def test_one_prompt_gives_the_ordinary_zscore() -> None:
    scores = torch.randn(16, dtype=torch.float64)
    np.testing.assert_allclose(shape_fitness(scores).values, stats.zscore(scores), atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_those_of_scipy(ties: bool) -> None:
    scores = torch.randn(8, 3).round() if ties else torch.randn(8, 3)
    ranks = np.stack([stats.rankdata(column) for column in scores.T.numpy()], 1)
    expected = ((ranks - 1) / 7 - 0.5).mean(1)
    np.testing.assert_allclose(shape_fitness(scores, method="ranks").values, expected, atol=1e-12)


def test_the_best_has_the_highest_rank() -> None:
    shaped = shape_fitness(torch.tensor([3.0, 1.0, 2.0, 0.0]), method="ranks")
    assert shaped.values.tolist() == pytest.approx([0.5, -1 / 6, 1 / 6, -0.5])


def test_signs_say_which_of_a_pair_is_better() -> None:
    scores = torch.tensor([[1.0, 5.0], [2.0, 1.0], [0.0, 0.0], [0.0, 1e-3], [7.0, 7.0], [7.0, 7.0]])
    shaped = shape_fitness(scores, method="sign_pairs")
    assert shaped.values.tolist() == [1, -1, -1, 1, 0, 0]


@pytest.mark.parametrize("method", ["zscore", "ranks", "sign_pairs"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 3e7])
def test_offsets_and_scales_of_the_reward_change_nothing(method: str, scale: float) -> None:
    scores = torch.randn(10, 4, dtype=torch.float64)
    expected = shape_fitness(scores, method=method).values
    shift = torch.tensor([0.0, 5.0, -3.0, 1e3], dtype=torch.float64)
    got = shape_fitness(scale * (scores + shift), method=method).values
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["zscore", "ranks", "sign_pairs", "none"])
@pytest.mark.parametrize("level", [0.0, 0.1, -1e9])
def test_constant_fitness_gives_exactly_nothing(method: str, level: float) -> None:
    scores = torch.full((6, 3), level) + torch.tensor([0.0, 1.0, 2.0])
    shaped = shape_fitness(scores, method=method)
    assert not shaped.values.any() and shaped.deviation == 0 and shaped.count == 6


def test_groups_are_compared_among_themselves_with_one_deviation_for_all() -> None:
    scores = torch.tensor([0.0, 2.0, 100.0, 104.0])
    shaped = shape_fitness(scores, group_size=2)
    centred = np.array([-1, 1, -2, 2.0])
    np.testing.assert_allclose(shaped.values, centred / np.sqrt(2.5))
    ranked = shape_fitness(scores, group_size=2, method="ranks")
    assert ranked.values.tolist() == [-0.5, 0.5, -0.5, 0.5]


def test_a_baseline_takes_the_place_of_the_mean() -> None:
    scores = torch.tensor([[1.0], [2.0], [3.0], [6.0]], dtype=torch.float64)
    shaped = shape_fitness(scores, baseline=torch.tensor([2.5]))
    np.testing.assert_allclose(shaped.values, (scores[:, 0] - 2.5) / scores.numpy().std())


def test_no_score_counts_as_zero_for_both_members_of_the_pair() -> None:
    scores = torch.tensor([[1.0, NAN], [3.0, 10.0], [2.0, 16.0], [2.0, 12.0]])
    shaped = shape_fitness(scores)
    centred = np.array([[-1, 0], [1, 0], [0, 2], [0, -2]], dtype=float)
    deviation = np.sqrt((centred**2).sum() / 6)  # six scores count
    np.testing.assert_allclose(shaped.values, centred.mean(1) / deviation)
    alone = shape_fitness(scores, antithetic=False)
    middle = 38 / 3
    centred = np.array([[-1, 0], [1, 10 - middle], [0, 16 - middle], [0, 12 - middle]])
    np.testing.assert_allclose(alone.values, centred.mean(1) / np.sqrt((centred**2).sum() / 7))


@pytest.mark.parametrize("method", ["zscore", "ranks", "sign_pairs", "none"])
def test_a_lost_member_loses_its_pair_and_the_rest_as_if_it_had_not_been(method: str) -> None:
    scores = torch.randn(8, 3, dtype=torch.float64)
    with_gap = scores.clone()
    with_gap[5] = NAN
    shaped = shape_fitness(with_gap, method=method)
    kept = [0, 1, 2, 3, 6, 7]
    expected = shape_fitness(scores[kept], method=method)
    assert shaped.count == 6 and not shaped.values[[4, 5]].any()
    torch.testing.assert_close(shaped.values[kept], expected.values)


def test_no_score_at_all_is_no_step_and_no_error() -> None:
    shaped = shape_fitness(torch.full((4, 2), NAN))
    assert shaped.count == 0 and not shaped.values.any()


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.zeros(5), {}, "population must be even, got 5"),
        (torch.zeros(0), {}, "scores must have shape"),
        (torch.zeros(4, 2, 1), {}, "scores must have shape"),
        (torch.zeros(6), {"group_size": 3}, "group_size 3 splits a pair"),
        (torch.zeros(6), {"group_size": 4}, "group_size must divide the 6 members"),
        (torch.zeros(4), {"method": "softmax"}, "must be one of zscore, ranks, sign_pairs, none"),
        (torch.zeros(4), {"method": "sign_pairs", "antithetic": False}, "needs antithetic=True"),
        (torch.tensor([0, 1, 2, torch.inf]), {}, "score of member 3 is infinite"),
        (torch.zeros(4, 2), {"baseline": torch.zeros(3)}, "one score for each of 2 prompts"),
        (torch.zeros(4, 1), {"baseline": torch.tensor([NAN])}, "baseline member is not finite"),
    ],
)
def test_scores_that_cannot_be_shaped_are_refused(
    scores: torch.Tensor, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shape_fitness(scores, **options)


def test_scores_are_tensors() -> None:
    with pytest.raises(TypeError, match="scores must be a tensor, got list"):
        shape_fitness([1.0, 2.0])
