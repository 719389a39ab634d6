"""GFCG: the identities it is built on, its combinations, its state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffsteer.core import GaussianMixture, GuidedDenoiser, Level, MissingPrediction, Step
from diffsteer.guidance import ClassifierFreeGuidance
from diffsteer.guidance.gfcg import (
    MODES,
    GradientFreeClassifierGuidance,
    confusion,
    pixels,
    reference_class,
)
from diffsteer.samplers import euler_step, heun_step, integrate, karras_sigmas

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, -1.0], [1.0, 1.0, 1.0]])
LABELS = torch.tensor([0, 0, 2])


def mixture(classes: int = 3) -> GaussianMixture:
    angle = torch.arange(classes, dtype=torch.float64) * 2 * math.pi / classes
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((classes,), 0.5, dtype=torch.float64))


def posterior_logits(data, level):
    return lambda x: data.class_posterior(x, level).log()


def make_step(data, x, sigma, labels, **more):
    level = Level.ve(torch.tensor(sigma, dtype=torch.float64))
    calls = []

    def evaluate(at, branch="cond", class_labels=None):
        calls.append(branch)
        given = None if branch == "uncond" else labels if class_labels is None else class_labels
        return data.denoise(x if at is None else at, level, given)

    def evaluate_weak(model, branch="cond", class_labels=None):
        calls.append("weak")
        return 0.8 * data.denoise(x, level, labels if class_labels is None else class_labels)

    step = Step(
        x=x,
        level=level,
        index=0,
        count=5,
        timestep=sigma,
        cond=data.denoise(x, level, labels),
        uncond=data.denoise(x, level, None),
        evaluate=evaluate,
        evaluate_weak=evaluate_weak,
        recorded=lambda name, branch: labels,
        **more,
    )
    return step, calls


def at_the_level(data, step, **more):
    """The rule with the exact posterior at the noisy sample as its classifier."""
    more = {"decode": lambda _: step.x, **more}
    return GradientFreeClassifierGuidance(posterior_logits(data, step.level), **more)


@pytest.mark.parametrize("combine", ["alone", "cfg", "switch", "autoguidance"])
def test_g1_off_is_the_baseline(combine):
    data, x = mixture(), torch.randn(6, 2, dtype=torch.float64)
    step, _ = make_step(data, x, 0.8, torch.zeros(6, dtype=torch.long))
    rule = at_the_level(data, step, scale=0.0, combine=combine, cfg_scale=3.0)
    reference = {"alone": step.cond, "autoguidance": 0.8 * step.cond}.get(combine, step.uncond)
    want = step.cond + 2.0 * (step.cond - reference)
    assert torch.equal(rule(step), step.cond if combine == "alone" else want)
    if combine in ("switch", "autoguidance"):  # a threshold above 1 is never reached
        never = at_the_level(data, step, threshold=1.1, combine=combine, cfg_scale=3.0)
        assert torch.equal(never(step), want)


def test_g2_reference_is_never_the_wanted_class():
    assert reference_class(LOGITS, LABELS).tolist() == [1, 1, 0]
    logits, labels = torch.randn(200, 7), torch.randint(0, 7, (200,))
    reference = reference_class(logits, labels)
    assert (reference != labels).all()
    shifted = logits / 3 + torch.randn(200, 1)
    shifted[torch.arange(200), labels] += 5.0
    assert torch.equal(reference_class(shifted, labels), reference)
    two = reference_class(torch.randn(9, 2), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0]))
    assert two.tolist() == [1, 0, 1, 0, 1, 0, 1, 0, 1]


def test_g3_confusion_modes():
    reference = reference_class(LOGITS, LABELS)
    pair = confusion(LOGITS, LABELS, reference, temperature=2.0)
    torch.testing.assert_close(pair, torch.sigmoid(torch.tensor([-0.5, 1.5, 0.0])))
    torch.testing.assert_close(
        pair + confusion(LOGITS, reference, LABELS, temperature=2.0), torch.ones(3)
    )
    p = LOGITS.softmax(1)
    top = confusion(LOGITS, LABELS, reference, mode="top")
    miss = confusion(LOGITS, LABELS, reference, mode="miss")
    torch.testing.assert_close(top, p.gather(1, reference[:, None])[:, 0])
    torch.testing.assert_close(miss, 1 - p.gather(1, LABELS[:, None])[:, 0])
    assert (top <= miss + 1e-6).all()
    assert confusion(LOGITS, LABELS, reference, mode="binary").tolist() == [0.0, 1.0, 0.0]
    assert confusion(LOGITS, LABELS, reference, mode="const").tolist() == [1.0, 1.0, 1.0]
    rising = torch.tensor([[z, 1.0, 0.0] for z in (-20.0, -1.0, 1.0, 3.0, 30.0)])
    first, second = torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    for mode in ("pair", "top", "miss"):
        phi = confusion(rising, first, second, mode=mode)
        assert (phi.diff() < 0).all() and phi[-1] < 1e-9, (
            "certainty of the wanted class is no doubt"
        )
    broken = LOGITS.clone()
    broken[1, 0] = math.nan
    for mode in MODES:
        phi = confusion(broken, LABELS, reference, mode=mode)
        assert phi[1] == 0 and ((phi >= 0) & (phi <= 1)).all()


def test_g4_contrast_is_the_gradient_of_the_log_odds():
    data, x = mixture(), torch.randn(8, 2, dtype=torch.float64).requires_grad_()
    level = Level.ve(torch.tensor(0.7, dtype=torch.float64))
    c, r = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    posterior = data.class_posterior(x, level)
    (slope,) = torch.autograd.grad((posterior[:, 0] / posterior[:, 1]).log().sum(), x)
    contrast = data.denoise(x, level, c) - data.denoise(x, level, r)
    torch.testing.assert_close(contrast.detach(), 0.7**2 * slope)
    weight = (posterior[:, 1] / (posterior[:, 0] + posterior[:, 1])).detach()[:, None]
    fresh = x.detach().requires_grad_()
    again = data.class_posterior(fresh, level)
    (restricted,) = torch.autograd.grad(
        (again[:, 0] / (again[:, 0] + again[:, 1])).log().sum(), fresh
    )
    torch.testing.assert_close(weight * contrast.detach(), 0.7**2 * restricted)


def test_g5_two_classes_and_the_exact_posterior_are_classifier_free_guidance():
    data, x = mixture(2), torch.randn(6, 2, dtype=torch.float64)
    step, _ = make_step(data, x, 0.8, torch.tensor([0, 1, 0, 1, 0, 1]))
    rule = at_the_level(data, step, scale=2.5, mode="top")
    want = ClassifierFreeGuidance(3.5)(step)
    torch.testing.assert_close(rule(step), want, rtol=1e-6, atol=1e-6)


def test_g6_top_class_is_the_largest_term_of_the_full_gradient():
    data, x = mixture(4), torch.randn(50, 2, dtype=torch.float64)
    labels = torch.randint(0, 4, (50,))
    step, _ = make_step(data, x, 0.6, labels)
    rule = at_the_level(data, step, scale=1.0, mode="top")
    p = data.class_posterior(x, step.level)
    each = torch.stack([step.cond - data.denoise(x, step.level, k) for k in range(4)], 1)
    torch.testing.assert_close((p[..., None] * each).sum(1), step.cond - step.uncond)
    missing = ((p[..., None] * each).sum(1) - (rule(step) - step.cond)).norm(dim=1)
    top = p.gather(1, reference_class(p.log(), labels)[:, None])[:, 0]
    own = p.gather(1, labels[:, None])[:, 0]
    assert (missing <= (1 - own - top) * each.norm(dim=2).max(1).values + 1e-6).all()


def test_g7_same_classes_and_weights_give_the_same_result_in_raw_outputs():
    """The update is affine with weights that sum to one."""
    data, x = mixture(), torch.randn(6, 2, dtype=torch.float64)
    step, _ = make_step(data, x, 0.8, torch.zeros(6, dtype=torch.long))
    rule = at_the_level(data, step, scale=2.0, combine="cfg", cfg_scale=3.0)
    guided = rule(step)

    def noise(denoised):
        return (x - denoised) / 0.8

    reference, phi = step.memory[id(rule)]["verdict"]
    cond, ref = noise(step.cond), noise(data.denoise(x, step.level, reference))
    by_noise = cond + 2 * phi[:, None] * (cond - ref) + 2 * (cond - noise(step.uncond))
    torch.testing.assert_close(x - 0.8 * by_noise, guided, rtol=1e-6, atol=1e-6)


def test_g8_autoguidance_gives_the_guide_the_reference_class():
    data, x = mixture(), torch.randn(40, 2, dtype=torch.float64)
    labels = torch.zeros(40, dtype=torch.long)
    step, calls = make_step(data, x, 0.8, labels)
    rule = at_the_level(data, step, combine="autoguidance", cfg_scale=2.0, threshold=0.5)
    guided = rule(step)
    assert calls == ["weak"]  # as many evaluations as autoguidance
    p = data.class_posterior(x, step.level)
    guide = torch.where(p.argmax(1) != 0, p.argmax(1), labels)
    want = step.cond + (step.cond - 0.8 * data.denoise(x, step.level, guide))
    assert 5 < int((guide != 0).sum()) < 35
    torch.testing.assert_close(guided, want)


def test_g9_no_gradients_are_left_and_inference_mode_works():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3).double()

        def forward(self, images):
            return self.layer(images)

    net = Net().eval()
    data, x = mixture(), torch.randn(5, 2, dtype=torch.float64)
    rule = GradientFreeClassifierGuidance(net, scale=2.0)
    step, _ = make_step(data, x, 0.8, torch.zeros(5, dtype=torch.long))
    plain = rule(step)
    assert not plain.requires_grad and all(p.grad is None for p in net.parameters())
    with torch.inference_mode():
        step, _ = make_step(data, x, 0.8, torch.zeros(5, dtype=torch.long))
        torch.testing.assert_close(rule(step), plain)


@pytest.mark.parametrize(
    "options, per_step", [({}, 1), ({"combine": "cfg", "cfg_scale": 2.0}, 1), ({"every": 2}, 1)]
)
def test_g10_evaluations_and_classifications(options, per_step):
    data, seen = mixture(), []
    x = torch.randn(4, 2, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0])

    def classifier(images):
        seen.append(images)
        return posterior_logits(data, Level.ve(torch.tensor(0.1)))(images)

    rule = GradientFreeClassifierGuidance(
        classifier, labels=labels, low=0.05, high=20.0, decode=lambda d: d, **options
    )
    denoiser = GuidedDenoiser(
        rule,
        lambda at, s, class_labels=None: data.denoise(
            at, Level.ve(s), labels if class_labels is None else class_labels
        ),
        lambda at, s: data.denoise(at, Level.ve(s), None),
    )
    grid = karras_sigmas(8, 0.02, 40.0)
    integrate(denoiser, 40 * x, grid, euler_step)
    inside = [i for i, s in enumerate(grid[:-1]) if 0.05 < s <= 20.0]
    assert denoiser.evaluations == 2 * 8 + per_step * len(inside)
    every = options.get("every", 1)
    due = [i for i in inside if i % every == 0 or i == inside[0]]
    assert len(seen) == len(due)


def test_later_stages_reuse_the_verdict():
    data, seen = mixture(), []
    labels = torch.tensor([0, 1])

    def classifier(images):
        seen.append(1)
        return torch.randn(2, 3)

    rule = GradientFreeClassifierGuidance(classifier, labels=labels, decode=lambda d: d)
    denoiser = GuidedDenoiser(
        rule, lambda at, s, class_labels=None: data.denoise(at, Level.ve(s), labels)
    )
    integrate(denoiser, torch.randn(2, 2).double(), [2.0, 1.0, 0.5], heun_step)
    assert len(seen) == 2


def test_g11_permutation_and_independence():
    data, x = mixture(), torch.randn(7, 2, dtype=torch.float64)
    labels = torch.randint(0, 3, (7,))
    order = torch.randperm(7)

    def run(rows):
        step, _ = make_step(data, x[rows], 0.8, labels[rows])
        return at_the_level(data, step, scale=2.0)(step)

    whole = run(torch.arange(7))
    torch.testing.assert_close(run(order), whole[order])
    torch.testing.assert_close(torch.cat([run(torch.tensor([i])) for i in range(7)]), whole)


def test_g12_contrast_raises_the_posterior_of_the_wanted_class():
    data = mixture()
    labels = torch.zeros(500, dtype=torch.long)
    x = 10 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = Level.ve(torch.tensor(1e-3, dtype=torch.float64))

    def mean_posterior(scale):
        rule = GradientFreeClassifierGuidance(
            posterior_logits(data, clean), scale=scale, labels=labels, decode=lambda d: d
        )
        denoiser = GuidedDenoiser(
            rule,
            lambda at, s, class_labels=None: data.denoise(
                at, Level.ve(s), labels if class_labels is None else class_labels
            ),
        )
        out = integrate(denoiser, x, karras_sigmas(12, 0.01, 10.0), euler_step)
        return float(data.class_posterior(out, clean)[:, 0].mean())

    values = [mean_posterior(scale) for scale in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values) and values[-1] > values[0] + 0.02


def test_the_last_guided_prediction_can_be_what_is_classified():
    data, seen = mixture(), []
    step, _ = make_step(data, torch.randn(3, 2, dtype=torch.float64), 0.8, LABELS)

    def classifier(images):
        seen.append(images)
        return LOGITS

    rule = GradientFreeClassifierGuidance(
        classifier, scale=2.0, classify_on="previous", decode=lambda d: d
    )
    guided = rule(step)
    rule(step)
    assert torch.equal(seen[0], step.cond) and torch.equal(seen[1], guided)
    assert not torch.equal(guided, step.cond)


@pytest.mark.parametrize("sigma, on", [(0.5, False), (0.51, True), (2.0, True), (2.01, False)])
def test_contrast_is_on_above_low_up_to_high(sigma, on):
    step, _ = make_step(mixture(), torch.randn(3, 2, dtype=torch.float64), sigma, LABELS)
    rule = at_the_level(mixture(), step, low=0.5, high=2.0)
    assert torch.equal(rule(step), step.cond) is not on
    step.ratios = torch.tensor([sigma], dtype=torch.float64)  # a run of this step alone
    if on:
        rule(step)
    else:
        with pytest.raises(ValueError, match="no step of this run"):
            rule(step)


def test_hysteresis_dead_zone_label_map_and_table():
    data, x = mixture(), torch.randn(3, 2, dtype=torch.float64)
    labels = torch.tensor([10, 11, 12])
    mapped = torch.tensor([12, 10, 11])  # classifier's class 1 is the pipeline's label 10
    logits = [torch.tensor([[0.0, 9.0, 1.0]] * 3), torch.tensor([[1.1, 9.0, 1.0]] * 3)]
    asked = []

    def classifier(_):
        return logits[len(asked) % 2]

    def evaluate(at, branch="cond", class_labels=None):
        asked.append(class_labels)
        return x * 0

    step, _ = make_step(data, x, 0.8, torch.zeros(3, dtype=torch.long))
    step.evaluate, step.recorded = evaluate, lambda name, branch: labels
    for hysteresis, second in ((1.0, 12), (2.0, 11)):
        asked.clear()
        step.memory.clear()
        rule = GradientFreeClassifierGuidance(
            classifier, label_map=mapped, decode=lambda d: d, hysteresis=hysteresis
        )
        rule(step)
        rule(step)
        assert asked[0].tolist() == [11, 10, 10]  # the runner-up, or the winner where it is wrong
        assert asked[1].tolist() == [second, 10, 10]
    quiet = GradientFreeClassifierGuidance(
        lambda _: logits[0], label_map=mapped, decode=lambda d: d, dead_zone=0.5
    )
    step.memory.clear()
    guided = quiet(step)
    assert torch.equal(guided[0], step.cond[0]) and not torch.equal(guided[1], step.cond[1])


def test_table_of_conditions_is_indexed_by_the_reference():
    x, seen = torch.randn(2, 4), []
    table = torch.arange(12.0).reshape(3, 4)

    def evaluate(at, branch="cond", **overrides):
        seen.append(overrides)
        return x * 0

    step = Step(x=x, level=Level.ve(1.0), index=0, count=1, timestep=0, cond=x, evaluate=evaluate)
    rule = GradientFreeClassifierGuidance(
        lambda _: torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]),
        labels=torch.tensor([0, 2]),
        condition={"encoder_hidden_states": table},
    )
    rule(step)
    assert torch.equal(seen[0]["encoder_hidden_states"], table[[2, 1]])


def test_pixels_are_in_the_unit_interval():
    assert pixels(torch.tensor([-3.0, -1.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 0.5, 1.0]


def run_with(classifier, **options):
    data, x = mixture(), torch.randn(2, 2, dtype=torch.float64)
    step, _ = make_step(data, x, 0.8, options.pop("step_labels", torch.tensor([0, 1])))
    step.classes = options.pop("classes", None)
    if options.pop("no_record", False):
        step.recorded = None
    return GradientFreeClassifierGuidance(classifier, decode=lambda d: d, **options)(step)


def good(images):
    return torch.randn(images.shape[0], 3)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: GradientFreeClassifierGuidance("resnet"), TypeError, "classifier"),
        (lambda: GradientFreeClassifierGuidance(nn.Linear(2, 3)), ValueError, "training mode"),
        (lambda: GradientFreeClassifierGuidance(good, scale=-1.0), ValueError, "scale"),
        (lambda: GradientFreeClassifierGuidance(good, scale=math.nan), ValueError, "scale"),
        (lambda: GradientFreeClassifierGuidance(good, mode="soft"), ValueError, "mode"),
        (lambda: GradientFreeClassifierGuidance(good, temperature=0.0), ValueError, "temperature"),
        (lambda: GradientFreeClassifierGuidance(good, low=2.0, high=1.0), ValueError, "low"),
        (lambda: GradientFreeClassifierGuidance(good, low=-1.0), ValueError, "low must be in"),
        (lambda: GradientFreeClassifierGuidance(good, high="3"), TypeError, "high must be"),
        (lambda: GradientFreeClassifierGuidance(good, every=1.5), ValueError, "whole number"),
        (
            lambda: GradientFreeClassifierGuidance(good, label_map=torch.tensor([0, 1, 1])),
            ValueError,
            "twice",
        ),
        (
            lambda: GradientFreeClassifierGuidance(good, condition={"prompt": torch.zeros(3, 1)}),
            ValueError,
            "labels",
        ),
        (lambda: run_with(lambda x: torch.zeros(2, 1)), ValueError, "K > 1"),
        (lambda: run_with(lambda x: torch.zeros(3, 4)), ValueError, "logits"),
        (lambda: run_with(lambda x: torch.full((2, 3), math.nan)), ValueError, "NaN"),
        (
            lambda: run_with(lambda x: torch.zeros(2, 2), step_labels=torch.tensor([0, 2])),
            ValueError,
            "label_map",
        ),
        (lambda: run_with(good, classes=1000), ValueError, "has 3 classes, the model 1000"),
        (
            lambda: run_with(good, classes=3, label_map=torch.tensor([1, 0, 3])),
            ValueError,
            "names label 3, but the model has 3",
        ),
        (
            lambda: run_with(good, labels=torch.tensor([0, 1]), condition={"a": torch.ones(2, 4)}),
            ValueError,
            "has 3 classes, the model 2",
        ),
        (lambda: run_with(good, labels=torch.tensor([0])), ValueError, "labels must"),
        (lambda: run_with(good, label_map=torch.tensor([0, 1])), ValueError, "entries"),
        (lambda: run_with(good, no_record=True), MissingPrediction, "class_labels"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
