"""Calibration along a trajectory: temperature and interval from what a classifier said."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffsteer.core import GaussianMixture, GuidedDenoiser, Level
from diffsteer.guidance import ClassifierFreeGuidance
from diffsteer.guidance.calibration import calibrate
from diffsteer.guidance.probe import ClassifierProbe, StageLogits
from diffsteer.samplers import euler_step, heun_step, integrate, karras_sigmas


def stage(ratio: float, sharpness: float, truth: float = 1.0, count: int = 4000) -> StageLogits:
    """Logits whose labels are drawn from ``softmax(logits / sharpness)``, ``truth`` of the time."""
    generator = torch.Generator().manual_seed(int(100 * ratio) if math.isfinite(ratio) else 7)
    honest = 2 * torch.randn(count, 5, generator=generator)
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    noise = torch.randint(0, 5, (count,), generator=generator)
    kept = torch.rand(count, generator=generator) < truth
    return StageLogits(ratio, sharpness * honest, torch.where(kept, labels, noise))


def test_the_temperature_is_the_one_that_was_put_in() -> None:
    result = calibrate([stage(r, 2.5) for r in (5.0, 1.0, 0.2)])
    assert result.temperature == pytest.approx(2.5, rel=0.05)
    assert result.error > 0.1 > 3 * result.error_fitted
    assert result.error == pytest.approx(sum(s.error for s in result.stages) / 3)
    assert result.high == math.inf, "as accurate at the first stage as at the last"
    assert [s.ratio for s in result.stages] == [5.0, 1.0, 0.2]
    mixed = calibrate([stage(r, 2.5) for r in (1.0, 0.2, 5.0)])
    assert (mixed.temperature, mixed.high) == (result.temperature, result.high)
    assert [s.ratio for s in mixed.stages] == [5.0, 1.0, 0.2]


def test_the_interval_ends_where_half_of_the_accuracy_is_lost() -> None:
    stages = [
        stage(math.inf, 1.0, 0.0),
        stage(8.0, 1.0, 0.2),
        stage(2.0, 1.0, 0.9),
        stage(0.5, 1.0),
    ]
    result = calibrate(stages)
    assert result.high == pytest.approx(4.0)  # between 8 and 2
    assert calibrate(stages[:1] + stages[2:]).high == pytest.approx(4.0)  # twice the last finite
    wrong = StageLogits(8.0, stages[1].logits, (stages[1].logits.argmax(1) + 1) % 5)
    left_out = calibrate([wrong, *stages[2:]]).temperature
    assert left_out == pytest.approx(calibrate(stages[2:]).temperature)


def test_the_interval_begins_where_a_reference_begins_to_matter() -> None:
    stages = [stage(r, 1.0) for r in (4.0, 1.0, 0.25)]
    for part, contrast in zip(stages, (0.5, 0.1, 1e-5), strict=True):
        part.contrast = torch.full((len(part.labels),), contrast)
    result = calibrate(stages)
    assert result.low == pytest.approx(0.5)  # between 1 and 0.25
    assert result.stages[0].contrast == pytest.approx(0.5)


def test_chance_and_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no stages"):
        calibrate([])
    none = StageLogits(1.0, torch.eye(4), torch.tensor([1, 2, 3, 0]))
    with pytest.raises(ValueError, match="which is chance"):
        calibrate([none])


def mixture() -> GaussianMixture:
    angle = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((3,), 0.3, dtype=torch.float64))


def sample(rule: object, step: object = euler_step, count: int = 60) -> Tensor:
    data, labels = mixture(), torch.arange(count) % 3
    denoiser = GuidedDenoiser(
        rule,  # type: ignore[arg-type]
        lambda x, s, labels: data.denoise(x, Level.ve(s), labels),
        lambda x, s: data.denoise(x, Level.ve(s), None),
        arguments={"labels": labels},
    )
    x = 10 * torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return integrate(denoiser, x, karras_sigmas(6, 0.05, 10.0), step)  # type: ignore[arg-type]


def posterior(x: Tensor) -> Tensor:
    return mixture().class_posterior(x, Level.ve(torch.tensor(0.05).double())).log()


@pytest.mark.parametrize("step, rule", [(euler_step, None), (heun_step, ClassifierFreeGuidance(2))])
def test_the_probe_changes_nothing_and_sees_every_step_once(step: object, rule: object) -> None:
    probe = ClassifierProbe(
        posterior,
        rule,
        condition="labels",
        decode=lambda x: x,
        contrast=True,  # type: ignore
    )
    assert torch.equal(sample(probe, step), sample(rule, step))
    assert [round(s.ratio, 3) for s in probe.stages] == sorted(
        {round(float(s), 3) for s in karras_sigmas(6, 0.05, 10.0) if s > 0}, reverse=True
    )
    assert all(s.labels.tolist() == [i % 3 for i in range(60)] for s in probe.stages)
    assert all(s.contrast is not None and s.contrast.shape == (60,) for s in probe.stages)
    first, last = probe.stages[0], probe.stages[-1]
    assert (last.logits.argmax(1) == last.labels).all()
    assert first.contrast is not None and last.contrast is not None
    assert last.contrast.mean() < first.contrast.mean()
    sample(probe, step)
    assert len(probe.stages) == 6, "a new trajectory starts afresh"


def test_the_contrast_is_with_the_pipelines_label_of_the_reference() -> None:
    table = torch.tensor([2, 0, 1])  # the pipeline's label of each class of the classifier
    settings = {"condition": "labels", "decode": lambda x: x, "contrast": True}
    same = ClassifierProbe(posterior, **settings)  # type: ignore[arg-type]
    other = ClassifierProbe(lambda x: posterior(x)[:, table], label_map=table, **settings)  # type: ignore[arg-type]
    for probe in (same, other):
        sample(probe)
    for one, two in zip(same.stages, other.stages, strict=True):
        assert torch.equal(table[two.labels], one.labels)
        torch.testing.assert_close(one.contrast, two.contrast)


def test_stages_join() -> None:
    a, b = stage(1.0, 1.0, count=3), stage(1.0, 1.0, count=4)
    assert len(a.joined(b).labels) == 7 and a.joined(b).contrast is None
    with pytest.raises(ValueError, match="two noise levels"):
        a.joined(stage(2.0, 1.0, count=3))
