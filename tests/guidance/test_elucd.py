"""EluCD: the energy, its gradients and the forms of the push, against closed forms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from diffsteer.core import GaussianMixture, GuidedDenoiser, Level, MissingPrediction, Step
from diffsteer.guidance import (
    CalibratedClassifierGuidance,
    ClassifierFreeGuidance,
    calibrated_energy,
    smooth_activations,
)
from diffsteer.guidance.calibration import calibration_error, fit_temperature, reliability
from diffsteer.guidance.elucd import (
    clipped_pixels,
    direction_size,
    posterior_variance,
    sine_boost,
)
from diffsteer.samplers import AncestralStep, euler_step, heun_step, integrate, karras_sigmas

DOUBLE = torch.float64


def as_is(x: Tensor) -> Tensor:
    return x


def make_step(x, level, cond, **more) -> Step:
    more = {"index": 1, "count": 4, "timestep": 0.0, **more}
    return Step(x=x, level=level, cond=cond, **more)


def test_t1_logit_gradient_and_shift_invariance():
    logits = torch.randn(5, 4, dtype=DOUBLE).requires_grad_()
    labels = torch.tensor([0, 3, 1, 2, 2])
    for joint, marginal in ((1.0, 1.0), (2.0, 2.0), (1.0, 0.5), (1.5, 0.0)):
        energy = calibrated_energy(logits, labels, joint=joint, marginal=marginal)
        (slope,) = torch.autograd.grad(energy.sum(), logits)
        onehot = nn.functional.one_hot(labels, 4).double()
        want = joint * onehot - marginal * (marginal * logits).softmax(1)
        torch.testing.assert_close(slope, want.detach())
        torch.testing.assert_close(slope.sum(1), torch.full((5,), joint - marginal, dtype=DOUBLE))
        shifted = calibrated_energy(logits + 7, labels, joint=joint, marginal=marginal)
        torch.testing.assert_close(
            shifted - energy, torch.full_like(energy, 7 * (joint - marginal))
        )
    plain = calibrated_energy(logits, labels)
    torch.testing.assert_close(plain, logits.log_softmax(1).gather(1, labels[:, None])[:, 0])


def test_t2_limits_of_the_temperatures():
    logits, labels = torch.randn(6, 4, dtype=DOUBLE), torch.randint(0, 4, (6,))
    wanted = logits.gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(
        calibrated_energy(logits, labels, joint=3.0, marginal=0.0), 3 * wanted - math.log(4)
    )
    tau = 1e6
    sharp = calibrated_energy(logits, labels, joint=tau, marginal=tau) / tau
    torch.testing.assert_close(sharp, wanted - logits.max(1).values, rtol=0, atol=1e-5)
    assert torch.isfinite(calibrated_energy(1e4 * logits.float(), labels)).all()


def test_t3_linear_classifier_in_closed_form():
    weight, x = torch.randn(3, 6), torch.randn(4, 6)
    labels, level = torch.tensor([0, 2, 1, 1]), Level.ve(0.5)
    rule = CalibratedClassifierGuidance(
        lambda images: images @ weight.T,
        scale=2.0,
        joint=1.2,
        marginal=0.6,
        sine=0.0,
        labels=labels,
        decode=as_is,
    )
    cond = torch.randn(4, 6)
    guided = rule(make_step(x, level, cond))
    share = (0.6 * cond @ weight.T).softmax(1)
    gradient = 1.2 * weight[labels] - 0.6 * share @ weight
    torch.testing.assert_close(guided - cond, 2.0 * 0.25 * gradient, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_noisy_samples_is_classifier_guidance_to_the_letter():
    data, x = GaussianMixture.random(3, shape=(2,)), 3 * torch.randn(9, 2, dtype=DOUBLE)
    labels = torch.arange(9) % 3
    for level in (Level.ve(torch.tensor(0.8).double()), Level.flow(torch.tensor(0.6).double())):
        size = torch.hypot(level.alpha, level.sigma)
        rule = CalibratedClassifierGuidance(
            lambda seen, level=level, size=size: data.class_posterior(seen * size, level).log(),
            marginal=1.0,
            sine=0.0,
            labels=labels,
            decode=as_is,
            classify_on="noisy",
        )
        guided = rule(make_step(x, level, data.denoise(x, level, None)))
        torch.testing.assert_close(guided, data.denoise(x, level, labels))


def two_classes(mean=1.2, std=0.5) -> GaussianMixture:
    return GaussianMixture(
        torch.tensor([[-mean], [mean]], dtype=DOUBLE), torch.tensor([std, std], dtype=DOUBLE)
    )


def test_t4_exact_guidance_through_the_denoiser_turns_uncond_into_cond():
    """With the exact posterior of the noisy sample the score form is exact."""
    data, x = two_classes(), torch.randn(9, 1, dtype=DOUBLE)
    labels = torch.ones(9, dtype=torch.long)
    for level in (Level.ve(torch.tensor(0.8).double()), Level.vp(torch.tensor(0.4).double())):
        inner = make_step(
            x,
            level,
            data.denoise(x, level, None),
            evaluate=lambda at, branch="cond": at,  # the classifier sees the noisy sample itself
        )
        rule = CalibratedClassifierGuidance(
            lambda at, level=level: data.class_posterior(at, level).log(),
            marginal=1.0,
            sine=0.0,
            labels=labels,
            decode=as_is,
            through_denoiser=True,
        )
        torch.testing.assert_close(rule(inner), data.denoise(x, level, labels))


def test_t4_the_plug_in_gradient_converges_to_the_exact_one_at_low_noise():
    data, x = two_classes(), torch.tensor([[0.3], [-0.2], [0.9]], dtype=DOUBLE)
    labels = torch.ones(3, dtype=torch.long)
    clean = Level.ve(torch.tensor(0.0, dtype=DOUBLE))

    def gap(sigma):
        level = Level.ve(torch.tensor(sigma, dtype=DOUBLE))
        rule = CalibratedClassifierGuidance(
            lambda at: data.class_posterior(at, clean).log(),
            marginal=1.0,
            sine=0.0,
            labels=labels,
            decode=as_is,
        )
        base = data.denoise(x, level, None)
        exact = data.denoise(x, level, labels) - base
        return float(((rule(make_step(x, level, base)) - base) / exact - 1).abs().max())

    assert gap(0.003) < 0.01 < gap(0.5) and gap(0.003) < gap(0.01) < gap(0.03)


@pytest.mark.parametrize("form", ["score", "posterior", "direction"])
def test_t5_scale_zero_is_the_base_rule_bit_for_bit(form):
    x = torch.randn(3, 4)
    step = make_step(x, Level.ve(0.7), torch.randn(3, 4), uncond=torch.randn(3, 4))
    for rule in (None, ClassifierFreeGuidance(3.0)):
        guided = CalibratedClassifierGuidance(as_is, scale=0.0, rule=rule, form=form)
        assert torch.equal(guided(step), step.cond if rule is None else rule(step))
        assert step.moved is None


def test_t6_posterior_form_moves_the_mean_of_an_ancestral_step_by_w_times_g():
    now, following = (Level.vp(torch.tensor(a, dtype=DOUBLE)) for a in (0.3, 0.5))
    target, cond, x = torch.randn(3, 2, 5, dtype=DOUBLE)
    labels = torch.zeros(2, dtype=torch.long)
    step = make_step(x, now, cond, index=2, count=10, next_level=following)
    variance = posterior_variance(now, following)
    beta = 1 - now.alpha**2 / following.alpha**2
    torch.testing.assert_close(  # the posterior variance of DDPM
        variance, beta * (1 - following.alpha**2) / (1 - now.alpha**2)
    )

    def run(gamma, largest):
        rule = CalibratedClassifierGuidance(
            lambda d: -(d - target).square().sum(1, keepdim=True) / 2,
            form="posterior",
            marginal=0.0,
            sine=gamma,
            labels=labels,
            decode=as_is,
        )
        step.memory.clear()
        step.memory[id(rule)] = largest
        draw = AncestralStep(torch.zeros_like, eta=1.0, level=lambda a: Level.vp(a))
        means = [
            draw(lambda at, s, d=d: d, x, torch.tensor(0.3).double(), torch.tensor(0.5).double())
            for d in (cond, rule(step))
        ]
        return means[1] - means[0]

    # T10: one step on a quadratic moves the mean by w (target - denoised), taken at the prediction.
    torch.testing.assert_close(run(0.0, variance), variance * (target - cond))
    largest = 3 * variance
    weight = variance + 0.3 * largest * math.sin(math.pi * 7 / 10)
    torch.testing.assert_close(run(0.3, largest), weight * (target - cond))


def test_t6_sine_term_is_zero_at_the_end_and_linear_in_gamma():
    v = torch.tensor(0.2)
    assert float(sine_boost(9, 10, 0.5, 2 * v, v)) == 1.0
    values = [float(sine_boost(5, 10, g, 2 * v, v)) - 1 for g in (0.1, 0.2)]
    assert values[1] == pytest.approx(2 * values[0]) and values[0] > 0
    assert float(sine_boost(3, 10, 0.5, v, torch.tensor(0.0))) == 1.0


def test_t7_direction_form_pushes_by_a_fixed_share_of_the_sample():
    seen = []
    x = 3 * torch.randn(4, 8, dtype=DOUBLE)

    def evaluate(at, branch="cond", **_):
        seen.append(at)
        return at / 2

    for factor in (1.0, 50.0):
        step = make_step(x, Level.ve(2.0), x / 2, index=3, count=10, evaluate=evaluate)
        rule = CalibratedClassifierGuidance(
            lambda u, f=factor: f * torch.stack([u.sum(1), (u**2).sum(1)], 1),
            scale=0.004,
            sine=0.3,
            marginal=0.0,
            form="direction",
            labels=torch.tensor([0, 1, 0, 1]),
        )
        guided = rule(step)
        torch.testing.assert_close(guided, step.moved / 2)
        push = (step.moved - x).norm(dim=1) / x.norm(dim=1)
        torch.testing.assert_close(
            push, torch.full((4,), direction_size(3, 10, 0.004, 0.3)).double()
        )
    torch.testing.assert_close(seen[0], seen[1])  # no matter how large the logits
    sizes = [direction_size(i, 10, 0.004, 0.3) for i in range(10)]
    want = [0.004, 0.004007, 0.003978, 0.00388, 0.003687, 0.003382, 0.002959, 0.002425, 0.001796]
    assert sizes == pytest.approx([*want, 0.001098], abs=5e-7)
    later = make_step(x, Level.ve(2.0), x / 2, stage=1, evaluate=evaluate)
    assert torch.equal(rule(later), x / 2) and later.moved is None


@pytest.mark.parametrize("size, shown", [(20.0, 1.0), (0.1, 0.1)])
def test_direction_form_shows_the_classifier_no_sample_beyond_unit_size(size, shown):
    seen = []
    x = torch.randn(3, 400, dtype=DOUBLE)
    x = size * x / x.square().mean(1, keepdim=True).sqrt()
    rule = CalibratedClassifierGuidance(
        lambda u: seen.append(u.detach()) or u[:, :2],
        form="direction",
        labels=torch.tensor([0, 1, 0]),
        decode=as_is,
    )
    rule(make_step(x, Level.ve(2.0), x / 2, evaluate=lambda at, branch="cond", **_: at / 2))
    torch.testing.assert_close(seen[0], x * shown / size)


def test_direction_form_runs_under_heun_and_pulls_to_the_class():
    means = torch.tensor([[-1.2, 0.0], [1.2, 0.0]], dtype=DOUBLE)
    data = GaussianMixture(means, torch.tensor([0.5, 0.5], dtype=DOUBLE))
    labels = torch.ones(200, dtype=torch.long)
    x = 5 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    share = []
    for scale in (0.0, 0.2):
        rule = CalibratedClassifierGuidance(
            lambda u: torch.stack([-u[:, 0], u[:, 0]], 1),
            scale=scale,
            form="direction",
            labels=labels,
        )
        denoiser = GuidedDenoiser(rule, lambda at, s: data.denoise(at, Level.ve(s), None))
        end = integrate(denoiser, x, karras_sigmas(10, 0.02, 5.0), heun_step)
        share.append(float((end[:, 0] > 0).double().mean()))
    assert share[1] > share[0] + 0.1


class Block(nn.Module):
    """A residual block that uses one in-place ReLU twice, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.two(self.relu(self.one(x))) + x)


def test_t8_softplus_swap():
    net = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), Block(), nn.Linear(5, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    smooth = smooth_activations(net, 3.0)
    kinds = [type(m) for m in smooth.modules()]
    assert kinds.count(nn.Softplus) == 2 and nn.ReLU not in kinds
    assert any(isinstance(m, nn.ReLU) for m in net.modules())  # the original is untouched
    assert all(torch.equal(before[name], value) for name, value in smooth.state_dict().items())
    assert not smooth.training and not any(p.requires_grad for p in smooth.parameters())
    x = torch.randn(20, 5)
    gaps = [(smooth_activations(net, beta)(x) - net(x)).abs().max() for beta in (3.0, 30.0, 300.0)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.02
    assert torch.equal(smooth_activations(net, math.inf)(x), net(x))
    z = torch.linspace(-4, 4, 101)
    assert ((nn.Softplus(beta=3.0)(z) - z.relu()) <= math.log(2) / 3 + 1e-6).all()
    with pytest.raises(ValueError, match=r"no nn\.ReLU"):
        smooth_activations(nn.Sequential(nn.Linear(2, 2), nn.GELU()), 3.0)


def test_t8_a_smooth_classifier_has_curvature_at_former_kinks_and_steadier_gradients():
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    smooth = smooth_activations(net, 3.0).double()
    kink = torch.linalg.lstsq(smooth[0].weight[:6], -smooth[0].bias[:6]).solution

    def energy(x):
        return calibrated_energy(smooth(x[None]), torch.tensor([1]), marginal=0.5).sum()

    assert smooth[0](kink[None])[0, :6].abs().max() < 1e-9  # six units are at their kink
    hessian = torch.autograd.functional.hessian(energy, kink)
    assert torch.isfinite(hessian).all() and hessian.abs().max() > 1e-3

    def unsteadiness(beta):
        classifier = smooth_activations(net, beta)
        x = torch.randn(200, 6)
        slopes = []
        for _ in range(8):
            leaf = (x + 0.05 * torch.randn_like(x)).requires_grad_()
            ones = torch.ones(200, dtype=torch.long)
            slopes.append(
                torch.autograd.grad(calibrated_energy(classifier(leaf), ones).sum(), leaf)[0]
            )
        return float(torch.stack(slopes).var(0).mean())

    spread = [unsteadiness(beta) for beta in (1.0, 3.0, 10.0, math.inf)]
    assert all(less < more for less, more in pairwise(spread))


def test_t9_calibration_error():
    torch.manual_seed(3)
    logits = 2 * torch.randn(40_000, 5)
    labels = torch.multinomial(logits.softmax(1), 1)[:, 0]
    honest = calibration_error(logits, labels)
    assert honest < 3 * math.sqrt(15 / 40_000)
    assert calibration_error(6 * logits, labels) > 10 * honest
    order = torch.randperm(40_000)
    assert calibration_error(logits[order], labels[order]) == pytest.approx(honest, abs=1e-12)
    one = reliability(logits, labels, bins=1)
    right = (logits.argmax(1) == labels).double().mean()
    sure = logits.double().softmax(1).max(1).values.mean()
    assert one.error == pytest.approx(float((right - sure).abs()))
    assert int(reliability(logits, labels).count.sum()) == 40_000
    even = reliability(torch.zeros(3, 2), torch.tensor([0, 0, 1]), bins=2)  # sure by one half
    assert even.count.tolist() == [3, 0]  # bins are (low, high]
    assert fit_temperature(3 * logits, labels) == pytest.approx(3.0, rel=0.03)
    assert fit_temperature(logits / 2, labels) == pytest.approx(0.5, rel=0.03)


def test_pure_noise_is_not_pushed():
    rule = CalibratedClassifierGuidance(as_is, labels=torch.tensor([0, 2]), decode=as_is)
    x, cond = torch.randn(2, 2, 4)
    assert torch.equal(rule(make_step(x, Level.flow(1.0), cond)), cond)
    assert torch.isfinite(rule(make_step(x, Level.flow(0.99), cond))).all()


def test_the_clamp_keeps_the_gradient():
    x = torch.tensor([-3.0, 0.2, 2.0], requires_grad=True)
    images = clipped_pixels(x)
    assert images.tolist() == pytest.approx([0.0, 0.6, 1.0])
    images.sum().backward()
    assert x.grad.tolist() == [0.5, 0.5, 0.5]


def test_no_graph_is_left_and_inference_mode_works():
    net = nn.Linear(4, 3).eval()
    rule = CalibratedClassifierGuidance(net, labels=torch.tensor([0, 2]), decode=as_is)
    x, cond = torch.randn(2, 2, 4)
    plain = rule(make_step(x, Level.ve(0.4), cond))
    assert not plain.requires_grad and net.weight.grad is None
    with torch.inference_mode():
        torch.testing.assert_close(rule(make_step(x, Level.ve(0.4), cond.clone())), plain)


def test_samples_do_not_look_at_each_other():
    net, labels = nn.Linear(4, 3).eval(), torch.tensor([0, 2, 1])
    x, cond = torch.randn(2, 3, 4)

    def run(rows):
        rule = CalibratedClassifierGuidance(net, labels=labels[rows], decode=as_is)
        return rule(make_step(x[rows], Level.ve(0.4), cond[rows]))

    whole = run(torch.arange(3))
    torch.testing.assert_close(torch.cat([run(torch.tensor([i])) for i in range(3)]), whole)


def test_guidance_raises_the_posterior_under_a_deterministic_sampler():
    data, labels = two_classes(), torch.ones(300, dtype=torch.long)
    clean = Level.ve(torch.tensor(0.05, dtype=DOUBLE))
    x = 10 * torch.randn(300, 1, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    shares = []
    for scale in (0.0, 0.5, 2.0):
        rule = CalibratedClassifierGuidance(
            lambda at: data.class_posterior(at, clean).log(),
            scale=scale,
            labels=labels,
            decode=as_is,
        )
        denoiser = GuidedDenoiser(rule, lambda at, s: data.denoise(at, Level.ve(s), None))
        out = integrate(denoiser, x, karras_sigmas(16, 0.02, 10.0), euler_step)
        shares.append(float((out > 0).double().mean()))
    assert shares == sorted(shares) and shares[-1] > shares[0] + 0.2


def climb(classifier, labels=None, **settings):
    labels = torch.zeros(2) if labels is None else labels
    rule = CalibratedClassifierGuidance(classifier, labels=labels, decode=as_is, **settings)
    return rule(make_step(torch.zeros(2, 3), Level.ve(1.0), torch.ones(2, 3)))


def test_a_label_map_renumbers_the_classes():
    table = torch.tensor([5, 9, 2])  # the pipeline's label of each class
    mapped = climb(as_is, torch.tensor([2, 5]), label_map=table)
    assert torch.equal(mapped, climb(as_is, torch.tensor([2, 0])))


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: CalibratedClassifierGuidance("net"), TypeError, "classifier"),
        (lambda: CalibratedClassifierGuidance(nn.Linear(2, 2)), ValueError, "training mode"),
        (lambda: CalibratedClassifierGuidance(as_is, rule="cfg"), TypeError, "rule"),
        (lambda: CalibratedClassifierGuidance(as_is, scale=math.nan), ValueError, "scale"),
        (lambda: CalibratedClassifierGuidance(as_is, marginal=-1.0), ValueError, "marginal"),
        (lambda: CalibratedClassifierGuidance(as_is, form="sde"), ValueError, "form"),
        (lambda: CalibratedClassifierGuidance(as_is, classify_on="x"), ValueError, "classify_on"),
        (
            lambda: CalibratedClassifierGuidance(as_is, classify_on="noisy", through_denoiser=True),
            ValueError,
            "leave one of them out",
        ),
        (lambda: smooth_activations(nn.ReLU(), 0.0), ValueError, "beta"),
        (lambda: reliability(torch.zeros(0, 3), torch.zeros(0)), ValueError, "N > 0"),
        (
            lambda: fit_temperature(torch.full((2, 2), math.nan), torch.zeros(2)),
            ValueError,
            "finite",
        ),
        (
            lambda: CalibratedClassifierGuidance(as_is, form="posterior", labels=torch.zeros(2))(
                make_step(torch.zeros(2, 3), Level.ve(1.0), torch.zeros(2, 3))
            ),
            ValueError,
            "form='score'",
        ),
        (
            lambda: CalibratedClassifierGuidance(as_is)(
                make_step(torch.zeros(2, 3), Level.ve(1.0), torch.zeros(2, 3))
            ),
            MissingPrediction,
            "class_labels",
        ),
        (
            lambda: CalibratedClassifierGuidance(as_is, labels=torch.zeros(5))(
                make_step(torch.zeros(2, 3), Level.ve(1.0), torch.zeros(2, 3))
            ),
            ValueError,
            "labels must",
        ),
        (
            lambda: CalibratedClassifierGuidance(
                lambda x: x.sum(), labels=torch.zeros(2), decode=as_is
            )(make_step(torch.zeros(2, 3), Level.ve(1.0), torch.zeros(2, 3))),
            ValueError,
            "logits",
        ),
        (lambda: climb(lambda x: x * math.nan), ValueError, "NaN"),
        (lambda: climb(lambda x: x[:, :1]), ValueError, "K > 1"),
        (lambda: climb(lambda x: x.detach()), ValueError, "without gradients"),
        (lambda: climb(as_is, labels=torch.tensor([0, 3])), ValueError, r"\[3\] are no classes"),
        (lambda: climb(as_is, label_map=torch.tensor([4, 0])), ValueError, "2 entries for 3"),
        (
            lambda: CalibratedClassifierGuidance(as_is, decode=as_is)(
                make_step(
                    *(torch.zeros(2, 3), Level.ve(1.0), torch.zeros(2, 3)),
                    recorded=lambda name, branch: torch.tensor([0, 1]),
                    classes=1000,
                )
            ),
            ValueError,
            "has 3 classes, the model 1000",
        ),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
