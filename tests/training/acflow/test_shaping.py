"""Reward shaping, levels, the plan of an epoch, and the end of the warm-up."""

from __future__ import annotations

import math

import pytest
import torch

from diffsteer.training.acflow import (
    ACFlowConfig,
    RewardShaper,
    RunningMoments,
    WarmUp,
    shape_rewards,
)
from diffsteer.training.acflow.levels import draw_levels, draw_update
from diffsteer.training.acflow.plan import check_split, epoch_plan
from diffsteer.training.acflow.shaping import combine
from diffsteer.training.acflow.targets import constant_groups, make_targets
from diffsteer.training.rewards import RewardError, RewardScores

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 60.0])


def test_prompt_shaping_centres_each_prompt_and_scales_by_all():
    z = shape_rewards(REWARDS, GROUPS, limit=math.inf)
    spread = REWARDS.double().std(unbiased=False) + 1e-4
    torch.testing.assert_close(z[:3] * spread, torch.tensor([-1.0, 0.0, 1.0]).double())
    assert float(z[3:].mean()) == pytest.approx(0, abs=1e-12)


def test_prompt_shaping_with_one_image_a_prompt_centres_all():
    z = shape_rewards(REWARDS, torch.arange(6))
    assert float(z.mean()) == pytest.approx(0, abs=1e-12)
    assert float(z.std(unbiased=False)) == pytest.approx(1, abs=1e-4)


def test_minmax_and_none():
    z = shape_rewards(REWARDS, GROUPS, mode="minmax")
    assert float(z.min()) == 0 and float(z.max()) == 1
    assert shape_rewards(torch.full((6,), 3.0), GROUPS, mode="minmax").tolist() == [0.0] * 6
    assert torch.equal(shape_rewards(REWARDS, GROUPS, mode="none"), REWARDS.double())


@pytest.mark.parametrize("mode", ["prompt", "minmax", "none", "running"])
def test_a_missing_reward_stays_missing_and_changes_no_other(mode):
    def shaped(values, groups):
        moments = RunningMoments().update(values)
        return shape_rewards(values, groups, mode=mode, moments=moments)

    with_hole = torch.cat([REWARDS, torch.tensor([math.nan])])
    z = shaped(with_hole, torch.cat([GROUPS, torch.tensor([1])]))
    assert z[-1].isnan()
    torch.testing.assert_close(z[:-1], shaped(REWARDS, GROUPS))


def test_an_outlier_is_bounded():
    values = torch.zeros(400)
    values[0] = 1e6
    assert float(shape_rewards(values, torch.zeros(400).long()).max()) == 5.0


def test_running_moments_are_unbiased_from_the_first_batch():
    generator = torch.Generator().manual_seed(0)
    moments = RunningMoments()
    assert (moments.mean, moments.std) == (0.0, 1.0)
    for step in range(200):
        moments = moments.update(3 + 2 * torch.randn(500, generator=generator))
        if step in (0, 5, 199):
            assert moments.mean == pytest.approx(3, abs=0.2)
            assert moments.std == pytest.approx(2, abs=0.2)
    assert moments.update(torch.tensor([math.nan])) is moments


def test_several_rewards_weigh_by_their_share_at_unit_scale():
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = combine({"a": a, "b": b}, {"a": 1.0, "b": -3.0}, unit=True)
    assert float(total.std(unbiased=False)) == pytest.approx(1, abs=1e-3)
    raw = (a - 3 * b) / 4
    torch.testing.assert_close(total, raw / (raw.std(unbiased=False) + 1e-4))
    hole = a.clone()
    hole[0] = math.nan
    assert float(combine({"a": hole, "b": b}, {"a": 1, "b": 1}, unit=False)[0]) == float(b[0])


def test_a_negative_weight_turns_a_single_reward():
    shaper = RewardShaper("prompt")
    up = shaper({"r": REWARDS}, {"r": 5.0}, GROUPS)
    torch.testing.assert_close(shaper({"r": REWARDS}, {"r": -0.1}, GROUPS), -up)


def test_the_shaper_goes_on_from_its_state():
    one, other = RewardShaper("running"), RewardShaper("running")
    one({"r": REWARDS}, {"r": 1.0}, GROUPS)
    other.load_state_dict(one.state_dict())
    z = one({"r": REWARDS * 2}, {"r": 1.0}, GROUPS)
    assert torch.equal(z, other({"r": REWARDS * 2}, {"r": 1.0}, GROUPS))


def scores(values, failed=None):
    flags = torch.zeros(len(values), dtype=torch.bool) if failed is None else failed
    return RewardScores({"r": values}, {"r": flags}, {"r": 1.0})


def targets(values, **options):
    settings = {"drop_constant": True, "device": torch.device("cpu"), **options}
    return make_targets(scores(values), GROUPS, RewardShaper(), **settings)


def test_a_prompt_that_scores_alike_is_left_to_the_reference():
    values = torch.tensor([2.0, 2.0, 2.0, 1.0, 2.0, 3.0])
    found = targets(values)
    assert found.weighed[:3].isnan().all() and not found.weighed[3:].isnan().any()
    assert not found.shaped.isnan().any()
    assert not targets(values, drop_constant=False).weighed.isnan().any()
    alone = constant_groups(torch.tensor([1.0, 5.0]), torch.tensor([0, 1]))
    assert not alone.any()


def test_no_score_at_all_is_an_error():
    with pytest.raises(RewardError, match="no image got a score"):
        targets(torch.full((6,), math.nan))


# -- levels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["uniform", "logit-normal"])
def test_levels_are_stratified_and_inside(levels):
    generator = torch.Generator().manual_seed(0)
    sigma = draw_levels(5000, 4, generator, levels=levels, mean=0.4, std=0.8)
    assert float(sigma.min()) > 9e-4 and float(sigma.max()) < 1 - 9e-4
    assert bool((sigma.diff(dim=1) >= 0).all())
    if levels == "uniform":
        torch.testing.assert_close(sigma.mean(0), torch.tensor([1, 3, 5, 7]) / 8, rtol=0, atol=0.01)
    else:
        logit = torch.logit(sigma.double())
        assert float(logit.mean()) == pytest.approx(0.4, abs=0.02)
        assert float(logit.std()) == pytest.approx(0.8, abs=0.02)


def test_a_part_of_an_update_is_drawn_alike_however_it_is_split():
    whole = draw_update((6, 2, 2), 3, seed=7, device=torch.device("cpu"))
    part = whole.part(2, 4)
    assert part.sigma.shape == (6,) and part.noise.shape == (6, 2, 2)
    assert torch.equal(part.noise, whole.noise[2:4].flatten(0, 1))


# -- the plan of an epoch --------------------------------------------------------------------------


def test_each_prompt_is_repeated_and_each_comes_round_equally_often():
    seen = []
    for epoch in range(5):
        plan = epoch_plan(epoch, prompts=5, per_epoch=2, repeats=3, seed=1)
        counts = {p: plan.prompts.count(p) for p in plan.prompts}
        assert len(plan.prompts) == 6 and all(n % 3 == 0 for n in counts.values())
        assert len(set(plan.seeds)) == 6
        seen += plan.prompts
    assert sorted(seen) == sorted([*range(5)] * 6)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_every_update(ranks):
    plan = epoch_plan(0, prompts=3, per_epoch=4, repeats=4, seed=1)
    parts = [plan.mine(rank, ranks, 2) for rank in range(ranks)]
    assert sorted(p for part in parts for p in part) == list(range(16))
    for part in parts:
        assert all(p < 8 for p in part[: len(part) // 2]) and all(
            p >= 8 for p in part[len(part) // 2 :]
        )


def test_epochs_that_do_not_split_are_refused():
    config = ACFlowConfig(
        prompts_per_epoch=3, images_per_prompt=8, updates_per_epoch=2, accumulate=2
    )
    check_split(config, 3)
    with pytest.raises(ValueError, match=r"multiple of 20 \(2 updates x 5 ranks x 2 passes\)"):
        check_split(config, 5)


# -- warm-up ---------------------------------------------------------------------------------------


def test_the_warm_up_ends_by_explained_variance_or_by_time():
    rule = WarmUp(least=2, most=5, threshold=0.1, ramp=4)
    assert not rule.over(1, 0.9) and rule.over(2, 0.2)
    assert not rule.over(4, 0.05) and not rule.over(4, None) and rule.over(5, None)
    assert rule.rate(3, None) == 0
    assert [rule.rate(epoch, 3) for epoch in (3, 4, 6, 9)] == [0.25, 0.5, 1.0, 1.0]
