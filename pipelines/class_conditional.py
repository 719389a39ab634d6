"""A diffusers pipeline for class-conditional flow-matching models in pixel space."""

import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..core.noise import seeded_generators
from ..core.prediction import Kind, Level, from_denoised, to_denoised

# (No `from __future__ import annotations` here: diffusers reads the constructor's types at load time.)

PREDICTIONS = {"velocity": Kind.VELOCITY, "denoised": Kind.DENOISED}
SMALLEST_SIGMA = 1e-6  # a velocity divides by sigma; every real schedule stays far above
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassConditionalPipeline(DiffusionPipeline):
    """Images from class labels: a stock transformer or UNet, a stock flow-matching scheduler, no text, no VAE.

    The flow is ``x = (1 - sigma) * clean + sigma * noise`` with pixels in [-1, 1]; the network gets
    ``sigma * num_train_timesteps`` as its timestep and the label ``num_classes`` as "no class". The solver's
    state and the guidance arithmetic are float32 whatever the dtype of the network.

    Args:
        transformer: ``DiTTransformer2DModel``, or ``UNet2DModel`` with ``num_class_embeds = classes + 1``.
        scheduler: ``FlowMatchEulerDiscreteScheduler`` or any other with flow sigmas (``use_flow_sigmas``).
        prediction: what the network's output means, "velocity" (noise - clean) or "denoised" (clean).
        id2label: names of the classes, e.g. ``{0: "airplane", ...}``; keys may be strings, as in JSON.

    Raises:
        ValueError: if ``prediction`` is unknown, the network takes no class labels or its output has not the
            shape of its input, or a name in ``id2label`` occurs twice or belongs to no class.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  (diffusers' own spelling)

    def __init__(
        self,
        transformer: DiTTransformer2DModel | UNet2DModel,
        scheduler: SchedulerMixin,
        prediction: str = "velocity",
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.num_classes = _num_classes(transformer)
        self.id2label = _check_names(id2label, self.num_classes)
        names = {str(index): name for index, name in self.id2label.items()} or None
        self.register_to_config(prediction=prediction, id2label=names)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @property
    def prediction_kind(self) -> Kind:
        """What the network's raw output means."""
        return PREDICTIONS[self.config.prediction]

    @property
    def label2id(self) -> dict[str, int]:
        """Class index of each class name."""
        return {name: index for index, name in self.id2label.items()}

    @property
    def guidance_scale(self) -> float:
        """The scale of the call that is running, for callbacks."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call that is running evaluates the unconditional branch too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of network calls of the call that is running."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop (by setting ``pipe._interrupt``)."""
        return self._interrupt

    def label_ids(self, class_labels: Any) -> list[int]:
        """Class indices of ``class_labels``: an index, a class name, or any sequence or tensor of these.

        Raises:
            ValueError: if an index is out of range or a name is unknown.
            TypeError: if a label is neither an integer nor a string.
        """
        if isinstance(class_labels, Tensor | np.ndarray):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence | Iterator | range):
            class_labels = [class_labels]
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: Any) -> int:
        if isinstance(label, str):
            if label not in self.label2id:
                known = ", ".join(self.label2id) or f"none; use the indices 0 to {self.num_classes - 1}"
                raise ValueError(f"class_labels: unknown class name {label!r}; the names are {known}")
            return self.label2id[label]
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise TypeError(f"class_labels: expected class indices or names, got {label!r}")
        if not 0 <= operator.index(label) < self.num_classes:
            raise ValueError(
                f"class_labels: {operator.index(label)} is out of range; this model has {self.num_classes} "
                f"classes, 0 to {self.num_classes - 1}"
            )
        return operator.index(label)

    def velocity(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The velocity that the network's raw output implies: what the scheduler takes.

        Args:
            output: raw output of the network, (B, C, H, W), float32.
            x: the noisy sample, same shape.
            sigma: noise level, shape () or (B,).

        Returns:
            Same shape as ``output``.
        """
        if self.prediction_kind == Kind.VELOCITY:
            return output
        level = Level.flow(sigma.clamp(min=SMALLEST_SIGMA))
        denoised = to_denoised(output, self.prediction_kind, x, level)
        return from_denoised(denoised, Kind.VELOCITY, x, level)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 20,
        sigmas: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image a label.

        Args:
            class_labels: class indices or names; a single one is repeated for every seed.
            guidance_scale: plain classifier-free guidance, uncond + scale * (cond - uncond); at 1 or below
                the conditional prediction is used alone. Other rules: ``steer(pipe, rule)``.
            num_inference_steps: number of solver steps.
            sigmas: noise levels of the steps, decreasing, before the scheduler's own shift; by default
                evenly spaced from 1 to 1 / num_inference_steps.
            generator: one generator, or one an image.
            seeds: one an image, instead of ``generator``: a seed names an image, whatever the batch.
            latents: the noise to start from, (B, C, H, W), instead of ``seeds``.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W) with pixels in [0, 1]; "latent", the
                solver's result, float32, nominally in [-1, 1] and not clipped.
            return_dict: False gives the tuple (images,).
            callback_on_step_end: called as ``f(pipe, index, timestep, {"latents": ...})`` after each step.
            callback_on_step_end_tensor_inputs: what the callback is given; only "latents".

        Raises:
            ValueError: if a label is out of range, a name unknown, the number of steps below 1, the scale not
                finite, the counts of labels, seeds and generators differ, or the shape of ``latents`` is wrong.
            TypeError: if labels or seeds have the wrong type.
        """
        labels, generator = self._check_inputs(
            class_labels, guidance_scale, num_inference_steps, generator, seeds, latents, output_type,
            callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        device, count = self._execution_device, len(labels)
        x = self._noise(count, generator, latents, device)
        classes = torch.tensor(labels, device=device)
        if self.do_classifier_free_guidance:
            classes = torch.cat([torch.full_like(classes, self.num_classes), classes])
        levels = self._set_timesteps(num_inference_steps, sigmas, device)
        stochastic = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if stochastic else {}

        with _evaluating(self.transformer), self.progress_bar(total=self._num_timesteps) as bar:
            for index, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    break
                velocity = self._predict(x, levels[index], classes)
                x = self.scheduler.step(velocity, t, x, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, index, t, {"latents": x}).pop("latents", x)
                bar.update()

        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        guided = self.do_classifier_free_guidance
        x = torch.cat([x, x]) if guided else x
        timestep = (sigma * self.scheduler.config.num_train_timesteps).expand(len(x))
        output = self.transformer(
            x.to(self.transformer.dtype),
            timestep=timestep,
            class_labels=classes,
            return_dict=False,
        )[0].float()
        velocity = self.velocity(output, x, sigma)
        if not guided:
            return velocity
        uncond, cond = velocity.chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    def _noise(
        self, count: int, generator: Any, latents: Tensor | None, device: torch.device
    ) -> Tensor:
        size = self.transformer.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (count, self.transformer.config.in_channels, height, width)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=torch.float32)

    def _set_timesteps(
        self, steps: int, sigmas: Sequence[float] | None, device: torch.device
    ) -> Tensor:
        """Prepare the scheduler; return the noise level of each of its timesteps, on ``device``."""
        scheduler = self.scheduler
        config = scheduler.config
        if "FlowMatch" not in type(scheduler).__name__ and not config.get("use_flow_sigmas", False):
            raise ValueError(
                f"{type(scheduler).__name__} has no flow sigmas; use FlowMatchEulerDiscreteScheduler, or one "
                "built with use_flow_sigmas=True and prediction_type='flow_prediction'"
            )
        if config.get("use_dynamic_shifting", False):
            raise ValueError(
                "the scheduler's use_dynamic_shifting depends on an image size that this pipeline does not "
                "vary; load it with use_dynamic_shifting=False and a fixed shift"
            )
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is not None and not takes_sigmas:
            raise ValueError(f"sigmas: {type(scheduler).__name__} takes no sigmas of its own")
        if takes_sigmas and sigmas is None and "FlowMatch" in type(scheduler).__name__:
            # The scheduler's own default ends on a step from sigma = 0.001: a network call for nothing.
            sigmas = np.linspace(1.0, 1.0 / steps, steps).tolist()
        given = {} if sigmas is None else {"sigmas": list(sigmas)}
        scheduler.set_timesteps(steps if sigmas is None else len(sigmas), device=device, **given)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # spares a search that waits for the device
        self._num_timesteps = len(scheduler.timesteps)
        return scheduler.sigmas[: self._num_timesteps].to(device=device, dtype=torch.float32)

    def _decode(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
        images = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).cpu().numpy()
        return array if output_type == "np" else self.numpy_to_pil(array)

    def _check_inputs(
        self, class_labels: Any, guidance_scale: float, steps: int, generator: Any, seeds: Any,
        latents: Tensor | None, output_type: str, callback_inputs: Sequence[str],
    ) -> tuple[list[int], Any]:  # fmt: skip
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")
        unknown = set(callback_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: only 'latents' can be given, got {sorted(unknown)}"
            )
        return _match_counts(self.label_ids(class_labels), generator, seeds, latents)


def _match_counts(
    labels: list[int], generator: Any, seeds: Any, latents: Tensor | None
) -> tuple[list[int], Any]:
    """Repeat a single label over the seeds, and turn seeds into generators."""
    if seeds is not None and (generator is not None or latents is not None):
        other = "generator" if generator is not None else "latents"
        raise ValueError(f"give either seeds or {other}, not both")
    if seeds is not None:
        seeds = [seeds] if isinstance(seeds, int) else [operator.index(seed) for seed in seeds]
        generator = seeded_generators(seeds)
    many = generator if isinstance(generator, list) else None
    if many is not None and len(labels) == 1:
        labels = labels * len(many)
    if not labels:
        raise ValueError("class_labels is empty; give at least one label")
    if many is not None and len(many) != len(labels):
        what = "generator" if seeds is None else "seeds"
        raise ValueError(
            f"{what}: got {len(many)} for {len(labels)} class_labels; give one for each image"
        )
    return labels, generator


def _num_classes(transformer: Any) -> int:
    config = transformer.config
    if config.get("out_channels") not in (None, config["in_channels"]):
        raise ValueError(
            f"transformer: expected as many output as input channels ({config['in_channels']}), got "
            f"{config['out_channels']}; learned variances have no meaning in flow matching"
        )
    if config.get("num_embeds_ada_norm"):
        return int(config["num_embeds_ada_norm"])
    if config.get("num_class_embeds"):
        return int(config["num_class_embeds"]) - 1  # the last row is the null class
    raise ValueError(
        f"transformer: {type(transformer).__name__} takes no class labels; set num_embeds_ada_norm "
        "(DiTTransformer2DModel) or num_class_embeds = classes + 1 (UNet2DModel)"
    )


def _check_names(id2label: Mapping[Any, str] | None, num_classes: int) -> dict[int, str]:
    names = {int(index): str(name) for index, name in (id2label or {}).items()}
    outside = [index for index in names if not 0 <= index < num_classes]
    if outside:
        raise ValueError(
            f"id2label: {outside[0]} is out of range; the model has {num_classes} classes"
        )
    if len(set(names.values())) != len(names):
        raise ValueError("id2label: a class name occurs twice")
    return dict(sorted(names.items()))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: in training mode stock DiT drops labels at random."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
