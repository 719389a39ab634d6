"""A diffusers pipeline for class-conditional flow-matching models in pixel space."""

# No `from __future__ import annotations`: diffusers reads the constructor's types at load time.
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..core.prediction import Kind, Level, from_denoised, to_denoised
from .labels import check_names, count_classes, label_ids, match_counts

PREDICTIONS = {"velocity": Kind.VELOCITY, "denoised": Kind.DENOISED}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
SMALLEST_SIGMA = 1e-6  # a velocity divides by sigma; every real schedule stays far above


class ClassConditionalPipeline(DiffusionPipeline):
    """Images from class labels: a stock transformer or UNet and a stock flow-matching scheduler.

    No text encoder, no VAE: the flow ``x = (1 - sigma) * clean + sigma * noise`` runs on pixels in
    [-1, 1]. The network gets ``sigma * num_train_timesteps`` as its timestep, and ``num_classes``
    as the label that means "no class". The solver's state and the arithmetic of guidance are
    float32 whatever the dtype of the network.

    Args:
        transformer: a ``DiTTransformer2DModel``, or a ``UNet2DModel`` whose ``num_class_embeds`` is
            the number of classes plus 1.
        scheduler: a ``FlowMatchEulerDiscreteScheduler``, or any other with flow sigmas.
        prediction: what the network's output means: "velocity" (noise - clean) or "denoised"
            (clean).
        id2label: names of the classes, ``{0: "airplane", ...}``; keys may be strings, as in JSON.

    Raises:
        ValueError: if ``prediction`` is unknown, the network takes no class labels or gives other
            channels than it gets, or a name in ``id2label`` occurs twice or belongs to no class.
    """

    latent_std = 0.5  # of photographs in [-1, 1], for rules that measure in units of the data
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (spelled as in diffusers)

    def __init__(
        self,
        transformer: DiTTransformer2DModel | UNet2DModel,
        scheduler: SchedulerMixin,
        prediction: str = "velocity",
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}"
            )
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.num_classes = count_classes(transformer)
        self.id2label = check_names(id2label, self.num_classes)
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
        """The scale of the running call, for callbacks."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call evaluates the unconditional branch too."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """The number of network calls of the running call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by setting ``pipe._interrupt``."""
        return self._interrupt

    def label_ids(self, class_labels: Any) -> list[int]:
        """Class indices of an index, a class name, or any sequence or tensor of these.

        Raises:
            ValueError: if an index is out of range or a name is unknown.
            TypeError: if a label is neither an integer nor a string.
        """
        return label_ids(class_labels, self.num_classes, self.label2id)

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
        """Generate one image for each label.

        Args:
            class_labels: class indices or names; a single one is repeated for every seed.
            guidance_scale: of plain classifier-free guidance, uncond + scale * (cond - uncond); at
                1 or below the conditional prediction is used alone. Other rules: ``steer(pipe,
                rule)``.
            num_inference_steps: number of solver steps.
            sigmas: noise levels of the steps, decreasing, before the scheduler's own shift; by
                default evenly spaced from 1 to 1 / num_inference_steps.
            generator: one generator, or one for each image.
            seeds: one for each image, instead of ``generator``: a seed names an image, in any
                batch.
            latents: the noise to start from, (B, C, H, W), instead of ``seeds``.
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), pixels in [0, 1]; "latent",
                the solver's result, nominally in [-1, 1] and not clipped. All float32.
            return_dict: False gives the tuple ``(images,)``.
            callback_on_step_end: ``f(pipe, index, timestep, {"latents": ...})``, called after each
                step.
            callback_on_step_end_tensor_inputs: what the callback is given; only "latents".

        Raises:
            ValueError: if a label is out of range, a name unknown, the number of steps below 1, the
                scale not finite, the counts of labels, seeds and generators differ, or ``latents``
                has another shape.
            TypeError: if labels, seeds or generators are of the wrong type.
        """
        _check_numbers(guidance_scale, num_inference_steps, output_type)
        _check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        labels = self.label_ids(class_labels)
        labels, generator = match_counts(labels, generator, seeds, latents)
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        device = self._execution_device
        x = self._noise(len(labels), generator, latents, device)
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
        output = self.transformer(
            x.to(self.transformer.dtype),
            timestep=(sigma * self.scheduler.config.num_train_timesteps).expand(len(x)),
            class_labels=classes,
            return_dict=False,
        )[0]
        velocity = self.velocity(output.float(), x, sigma)
        if not guided:
            return velocity
        uncond, cond = velocity.chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    def _noise(
        self, count: int, generator: Any, latents: Tensor | None, device: torch.device
    ) -> Tensor:
        size = self.transformer.config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (count, self.transformer.config.in_channels, *sides)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=torch.float32)

    def _set_timesteps(
        self, steps: int, sigmas: Sequence[float] | None, device: torch.device
    ) -> Tensor:
        """Prepare the scheduler; the noise level of each of its timesteps, on ``device``."""
        scheduler = self.scheduler
        flow_match = _check_scheduler(scheduler)
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is not None and not takes_sigmas:
            raise ValueError(f"sigmas: {type(scheduler).__name__} takes no sigmas of its own")
        if sigmas is None and takes_sigmas and flow_match:
            # The scheduler's own default ends on a step from sigma = 0.001: a network call for
            # nothing.
            sigmas = np.linspace(1.0, 1.0 / steps, steps).tolist()
        if sigmas is None:
            scheduler.set_timesteps(steps, device=device)
        else:
            scheduler.set_timesteps(len(sigmas), device=device, sigmas=list(sigmas))
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


def _check_numbers(guidance_scale: float, steps: int, output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be an integer of at least 1, got {steps!r}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale}")


def _check_callback_inputs(wanted: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: only {list(known)} can be given, got {unknown}"
        )


def _check_scheduler(scheduler: Any) -> bool:
    """Refuse schedulers that are not of flow matching; True for diffusers' FlowMatch family."""
    name = type(scheduler).__name__
    flow_match = "FlowMatch" in name
    if not flow_match and not scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(
            f"scheduler: {name} has no flow sigmas; use FlowMatchEulerDiscreteScheduler, or one "
            "built with use_flow_sigmas=True and prediction_type='flow_prediction'"
        )
    if scheduler.config.get("use_dynamic_shifting", False):
        raise ValueError(
            "scheduler: use_dynamic_shifting follows an image size that is fixed here; build it "
            "with use_dynamic_shifting=False and a fixed shift"
        )
    return flow_match


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: in training mode a stock DiT drops labels at random."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
