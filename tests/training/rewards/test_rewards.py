"""Rewards: the protocol in all its spellings, sums, failures, the built-in ones in closed form."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffsteer.eval import load_classifier
from diffsteer.training.rewards import (
    Brightness,
    ClassProbability,
    ColourTarget,
    JpegSize,
    RewardError,
    RewardPool,
    RewardScores,
    RewardSet,
    as_reward,
    jpeg_bytes,
    load_reward,
    load_rewards,
)

NAN = float("nan")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


WORDS = ["one", "two", "three", "four"]
NOTES = [{"label": 0, "answer": "a"}, {"label": 3, "answer": "b"}, {"label": 5}, {"answer": "d"}]


# -- the protocol --------------------------------------------------------------------------------


def spellings() -> dict[str, object]:
    def native(images, prompts, metadata):
        return images.mean((1, 2, 3))

    def keyword(prompts, images, **columns):
        assert prompts == WORDS and columns["answer"] == ["a", "b", None, "d"]
        return [float(value) for value in images.mean((1, 2, 3))]

    def completions(completions, answer):
        return completions.mean((1, 2, 3)).numpy()

    def ddpo(images, prompts, metadata):
        return images.mean((1, 2, 3)), {"note": 1}

    class Object:
        def __call__(self, images, prompts, metadata):
            return images.mean((1, 2, 3))

    return {
        "native": native,
        "other names": lambda i, p, m: i.mean((1, 2, 3)),
        "images alone": lambda x: x.mean((1, 2, 3)),
        "keyword": keyword,
        "completions": completions,
        "scores and info": ddpo,
        "object": Object(),
        "optional": lambda images, scale=1.0: scale * images.mean((1, 2, 3)),
    }


@pytest.mark.parametrize("spelling", spellings())
def test_every_spelling_of_a_reward_gives_the_same_scores(images: Tensor, spelling: str) -> None:
    scores = RewardSet({"it": spellings()[spelling]}).score(images, WORDS, NOTES)
    torch.testing.assert_close(scores.values["it"], images.mean((1, 2, 3)))
    assert scores.failures == {"it": 0}


def test_a_column_that_is_missing_is_named(images: Tensor) -> None:
    reward = as_reward(lambda images, colour: colour)
    with pytest.raises(TypeError, match=r"asks for 'colour'.*answer, label"):
        reward(images, WORDS, NOTES)


@pytest.mark.parametrize("wrong, what", [(3, "a int"), (JpegSize, "the class JpegSize; make")])
def test_what_cannot_be_called_is_no_reward(wrong: object, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        as_reward(wrong)


# -- sums and failures ---------------------------------------------------------------------------


def test_the_total_leaves_out_what_does_not_apply_but_not_what_failed(images: Tensor) -> None:
    rewards = RewardSet(
        {
            "all": (lambda x: torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.0),
            "some": (lambda x: [10.0, None, NAN, float("inf")], -0.5),
        }
    )
    scores = rewards.score(images, WORDS, NOTES)
    torch.testing.assert_close(scores.total, torch.tensor([-3.0, 4.0, NAN, NAN]), equal_nan=True)
    assert scores.failures == {"all": 0, "some": 2}
    summary = scores.summary()
    assert summary["reward/all"] == 2.5 and summary["reward/some_failed"] == 2
    assert summary["reward/some"] == 10 and summary["reward/total"] == 0.5
    both = RewardScores.cat([scores, scores])
    assert len(both) == 8 and both.failures == {"all": 0, "some": 4}


def test_a_reward_that_raises_is_counted_logged_once_and_not_fatal(images: Tensor, caplog) -> None:
    def broken(images):
        raise ConnectionError("the server is gone")

    rewards = RewardSet({"broken": broken, "fine": Brightness()})
    for _ in range(3):
        scores = rewards.score(images, WORDS)
    assert scores.failures == {"broken": 4, "fine": 0}
    assert scores.total.isnan().all() and not scores.values["fine"].isnan().any()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(RewardError, match="broken failed on 4 of 4 images: ConnectionError: the"):
        scores.require_some()


def test_scores_that_are_none_or_nan_for_all_images_are_an_error_when_asked(images: Tensor) -> None:
    for value, why in ((None, "applies to none of the 4 images"), (NAN, "NaN or infinity")):
        scores = RewardSet({"it": lambda x, value=value: [value] * 4}).score(images, WORDS)
        with pytest.raises(RewardError, match=why):
            scores.require_some()
    half = RewardSet({"it": lambda x: [1.0, None, None, NAN]}).score(images, WORDS)
    assert half.require_some() is half


@pytest.mark.parametrize(
    "result", [[1.0] * 3, torch.zeros(4, 1), torch.zeros(()), ["a", "b", "c", "d"], None, [1.0] * 5]
)
def test_a_wrong_number_of_scores_stops_the_work(images: Tensor, result: object) -> None:
    with pytest.raises(RewardError, match=r"reward 'it' must give one (score|number)"):
        RewardSet({"it": lambda x: result}).score(images, WORDS)


def test_inputs_that_do_not_belong_together_are_refused(images: Tensor) -> None:
    rewards = RewardSet({"it": Brightness()})
    with pytest.raises(ValueError, match="4 images, 3 prompts and 3 of metadata"):
        rewards.score(images, WORDS[:3])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        rewards.score(images[0], WORDS)
    with pytest.raises(TypeError, match="divide by 255"):
        rewards.score((images * 255).to(torch.uint8), WORDS)
    with pytest.raises(ValueError, match="at least one reward"):
        RewardSet({})
    with pytest.raises(ValueError, match="weight of reward 'it' must be finite"):
        RewardSet({"it": (Brightness(), NAN)})


def test_rewards_see_no_gradient_and_give_float32_on_the_cpu(images: Tensor) -> None:
    images.requires_grad_()
    scores = RewardSet({"it": lambda x: x.double().mean((1, 2, 3))}).score(images, WORDS)
    assert not scores.total.requires_grad and scores.values["it"].dtype == torch.float32


# -- in the background ---------------------------------------------------------------------------


def test_a_pool_scores_while_the_caller_goes_on(images: Tensor) -> None:
    sampled = threading.Event()

    def waits(images):
        assert sampled.wait(20)  # only over if the caller was not held up
        return images.mean((1, 2, 3))

    rewards = RewardSet({"it": waits})
    with RewardPool(rewards) as pool:
        futures = [pool.submit(images[:2], WORDS[:2]), pool.submit(images[2:], WORDS[2:])]
        assert not futures[0].done()
        sampled.set()
        scores = RewardScores.cat([future.result() for future in futures])
    torch.testing.assert_close(scores.total, images.mean((1, 2, 3)))


def test_a_pool_hands_on_errors_and_knows_no_zero_workers(images: Tensor) -> None:
    rewards = RewardSet({"it": lambda x: [1.0]})
    with RewardPool(rewards) as pool, pytest.raises(RewardError, match="one score an image"):
        pool.submit(images, WORDS).result()
    with pytest.raises(ValueError, match="workers must be at least 1"):
        RewardPool(rewards, workers=0)


# -- the built-in ones ---------------------------------------------------------------------------


def test_jpeg_size_is_that_of_the_file(images: Tensor) -> None:
    flat, noise = torch.full((1, 3, 32, 32), 0.5), images[:1]
    sizes = jpeg_bytes(torch.cat([flat, noise]), quality=80)
    buffer = io.BytesIO()
    array = (noise[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array).save(buffer, "JPEG", quality=80)
    assert sizes[1] == len(buffer.getvalue()) > sizes[0]
    small = JpegSize(quality=80)(torch.cat([flat, noise]))
    torch.testing.assert_close(small, -torch.tensor(sizes) / 1000)
    large = JpegSize(quality=80, compressible=False)(torch.cat([flat, noise]))
    torch.testing.assert_close(large, -small)
    with pytest.raises(ValueError, match="quality must be from 1 to 95"):
        JpegSize(quality=0)


def test_colours_have_the_scores_that_can_be_worked_out() -> None:
    colours = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    images = colours[:, :, None, None].expand(3, 3, 5, 7)
    luma = torch.tensor([1.0, 0.0, 0.7152])
    torch.testing.assert_close(Brightness()(images), luma)
    torch.testing.assert_close(Brightness(target=0.25)(images), -(luma - 0.25).abs())
    away = ColourTarget(0.0, 1.0, 0.0)(images)
    torch.testing.assert_close(away, -torch.tensor([2 / 3, 1 / 3, 0.0]).sqrt())
    for wrong in (lambda: Brightness(target=1.5), lambda: ColourTarget(red=-0.1)):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            wrong()


def test_class_probability_is_the_softmax_at_the_label(images: Tensor) -> None:
    classifier = load_classifier("evaluation")
    chances = classifier(images).softmax(1)
    scores = ClassProbability()(images, WORDS, NOTES)
    wanted = [chances[0, 0].item(), chances[1, 3].item(), chances[2, 5].item(), None]
    assert scores[3] is None and scores[:3] == pytest.approx(wanted[:3], rel=1e-5)
    bird = ClassProbability("evaluation", label="bird", mode="log")(images)
    torch.testing.assert_close(bird, chances[:, 2].log(), rtol=1e-4, atol=1e-5)
    right = ClassProbability("evaluation", mode="correct")
    found = right(images, WORDS, [{"label": int(chance.argmax())} for chance in chances])
    assert found.tolist() == [1.0] * 4
    assert right(images, WORDS, [{}] * 4) == [None] * 4


def test_class_probability_takes_one_pass_and_any_classifier(images: Tensor) -> None:
    calls = []

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Network(nn.Linear):
        def forward(self, images: Tensor) -> Output:
            calls.append(tuple(images.shape))
            return Output(super().forward(images.flatten(1)))

    torch.manual_seed(0)
    network = Network(3 * 16 * 16, 4)
    scores = ClassProbability(network, label=2, resolution=16)(images)
    assert calls == [(4, 3, 16, 16)] and scores.shape == (4,)
    with pytest.raises(ValueError, match="label 7 is out of range: the classifier knows 4"):
        ClassProbability(network, label=7, resolution=16)(images)
    with pytest.raises(ValueError, match="unknown class name 'cow'"):
        ClassProbability("guidance", label="cow")
    with pytest.raises(ValueError, match="mode must be one of"):
        ClassProbability(mode="maybe")
    with pytest.raises(FileNotFoundError, match="evaluation, guidance or a folder"):
        ClassProbability("nowhere")


# -- by name -------------------------------------------------------------------------------------


def test_rewards_are_found_by_name_with_options_and_weights(images: Tensor, tmp_path: Path) -> None:
    assert load_reward("jpeg:quality=80") == JpegSize(80)
    assert load_reward("jpeg-large") == JpegSize(compressible=False)
    assert load_reward("colour:red=0.5,blue=1.0") == ColourTarget(0.5, 0.5, 1.0)
    assert load_reward("class-probability:label=cat,mode=log").label == 3
    assert load_reward("operator:neg")(images, WORDS, NOTES).equal(-images)
    mine = tmp_path / "mine.py"
    mine.write_text("def red(images):\n    return images[:, 0].mean((1, 2))\n")
    rewards = load_rewards(["jpeg:quality=80@0.5", "brightness", f"{mine}:red@-1"])
    assert rewards.weights == {"jpeg": 0.5, "brightness": 1.0, f"{mine}:red": -1.0}
    assert not rewards.score(images, WORDS).total.isnan().any()


@pytest.mark.parametrize(
    "spec, what",
    [
        ("jpg", "unknown reward 'jpg'; give one of jpeg, .* or package.module:name"),
        ("jpeg:size=3", "reward 'jpeg' has no option 'size'; it has quality, compressible"),
        ("jpeg:80", "cannot read the options '80' of reward 'jpeg'"),
        ("no.such.module:f", "cannot load the reward no.such.module:f"),
        ("operator:nothing", "cannot load the reward operator:nothing"),
        ("nowhere/mine.py:f", "there is no file nowhere/mine.py"),
    ],
)
def test_names_that_lead_nowhere_say_so(spec: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        load_reward(spec)


def test_weights_and_doubles_on_the_command_line_are_checked() -> None:
    with pytest.raises(ValueError, match="the weight of reward 'jpeg@much' is no number"):
        load_rewards(["jpeg@much"])
    with pytest.raises(ValueError, match="'jpeg' is given twice"):
        load_rewards(["jpeg", "jpeg"])
