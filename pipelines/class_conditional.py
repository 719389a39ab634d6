"""A diffusers pipeline for class-conditional models in pixel space: flow matching and EDM."""

# No `from __future__ import annotations`: diffusers reads the constructor's types at load time, and
# until 0.37 it understands Union and Optional but not `A | B`.
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional, Union

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from ..core.prediction import Kind, Level, from_denoised, to_denoised
from ..samplers.pfgmpp import limited
from .call_checks import check_callback_inputs, check_numbers
from .labels import check_names, count_classes, label_ids, match_counts
from .targets import check_overrides, check_prediction, check_scheduler, kind_of, starting_noise

SMALLEST_SIGMA = 1e-6  # a velocity divides by sigma; every real schedule stays far above


class ClassConditionalPipeline(DiffusionPipeline):
    """Images from class labels: a stock transformer or UNet and a stock scheduler.

    No text encoder, no VAE: the flow ``x = (1 - sigma) * clean + sigma * noise`` runs on pixels in
    [-1, 1]. The network gets ``sigma * num_train_timesteps`` as its timestep, and ``num_classes``
    as the label that means "no class". The solver's state and the arithmetic of guidance are
    float32 whatever the dtype of the network. With ``prediction="edm"`` the process is EDM's,
    ``x = clean + sigma * noise``, and the timestep ``num_train_timesteps * ln(sigma) / 4``.

    Args:
        transformer: a ``DiTTransformer2DModel``, or a ``UNet2DModel`` whose ``num_class_embeds`` is
            the number of classes plus 1.
        scheduler: a ``FlowMatchEulerDiscreteScheduler``, or any other with flow sigmas; for "edm"
            an EDM or PFGM++ scheduler.
        prediction: what the network's output means: "velocity" (noise - clean), "denoised" (clean),
            "kdiff" (k * clean - (1 - k) * noise) or "edm" (the raw output that an EDM scheduler
            preconditions).
        id2label: names of the classes, ``{0: "airplane", ...}``; keys may be strings, as in JSON.
        k: of "kdiff", the one the network was trained at.
        augment_dim: the D of PFGM++ the network was trained at; None is infinity, Gaussian noise.
            At a finite D the noise a call starts from is Student-t; ``latents`` must be so too.

    Raises:
        ValueError: if ``prediction`` is unknown, ``k`` or ``augment_dim`` is out of range, the
            network takes no class labels or gives other channels than it gets, or a name in
            ``id2label`` occurs twice or belongs to no class.
    """

    latent_std = 0.5  # of photographs in [-1, 1], for rules that measure in units of the data
    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (spelled as in diffusers)

    def __init__(
        self,
        transformer: Union[DiTTransformer2DModel, UNet2DModel],  # noqa: UP007
        scheduler: SchedulerMixin,
        prediction: str = "velocity",
        id2label: Optional[dict] = None,  # noqa: UP045
        k: Optional[float] = None,  # noqa: UP045
        augment_dim: Optional[float] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        check_prediction(prediction, k, augment_dim)
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.num_classes = count_classes(transformer)
        self.id2label = check_names(id2label, self.num_classes)
        names = {str(index): name for index, name in self.id2label.items()} or None
        self.register_to_config(prediction=prediction, id2label=names, k=k, augment_dim=augment_dim)
        self._guidance_scale, self._num_timesteps, self._interrupt = 1.0, 0, False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a saved pipeline, as in diffusers.

        Raises:
            ValueError: if ``prediction``, ``k`` or ``augment_dim`` is given and is not what the
                network was trained with.
        """
        if {"prediction", "k", "augment_dim"} & kwargs.keys():
            shared = {n: kwargs[n] for n in ("revision", "cache_dir", "token") if n in kwargs}
            check_overrides(cls.load_config(pretrained_model_name_or_path, **shared), kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def prediction_kind(self) -> Kind:
        """What the network's raw output means."""
        return kind_of(self.config.prediction, self.config.k, self.scheduler)

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
        """The velocity that the network's raw output implies: what a flow scheduler takes.

        Args:
            output: raw output of the network, (B, C, H, W), float32.
            x: the noisy sample, same shape.
            sigma: noise level, shape () or (B,).

        Returns:
            Same shape as ``output``.
        """
        kind = self.prediction_kind
        if kind == Kind.VELOCITY:
            return output
        level = Level.flow(sigma.clamp(min=SMALLEST_SIGMA))
        denoised = to_denoised(output, kind, x, level)
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
            latents: unit noise to start from, (B, C, H, W), instead of ``seeds``; Student-t noise
                where ``augment_dim`` is finite (``core.student.student_noise``).
            output_type: "pil"; "np" (B, H, W, C) or "pt" (B, C, H, W), pixels in [0, 1]; "latent",
                the solver's result, nominally in [-1, 1] and not clipped. All float32.
            return_dict: False gives the tuple ``(images,)``.
            callback_on_step_end: ``f(pipe, index, timestep, {"latents": ...})``, called after each
                step.
            callback_on_step_end_tensor_inputs: what the callback is given; only "latents".

        Raises:
            ValueError: if a label is out of range, a name unknown, the number of steps below 1, the
                scale not finite, the counts of labels, seeds and generators differ, ``latents``
                has another shape, or the scheduler is of another process, k or D than the network.
            TypeError: if labels, seeds or generators are of the wrong type.
        """
        check_numbers(guidance_scale, num_inference_steps, output_type)
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        labels = self.label_ids(class_labels)
        labels, generator = match_counts(labels, generator, seeds, latents)
        self._guidance_scale, self._interrupt = float(guidance_scale), False
        device = self._execution_device
        classes = torch.tensor(labels, device=device)
        if self.do_classifier_free_guidance:
            classes = torch.cat([torch.full_like(classes, self.num_classes), classes])
        levels = self._set_timesteps(num_inference_steps, sigmas, device)
        x = self._noise(len(labels), generator, latents, device) * self._noise_scale
        stochastic = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if stochastic else {}
        dtype = self.transformer.dtype  # looked for among all modules: too dear for every step
        with _evaluating(self.transformer), self.progress_bar(total=self._num_timesteps) as bar:
            for index, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    break
                output = self._predict(x, t, levels[index], classes, dtype)
                x = self.scheduler.step(output, t, x, **extra, return_dict=False)[0]
                if callback_on_step_end is not None:
                    x = callback_on_step_end(self, index, t, {"latents": x}).pop("latents", x)
                bar.update()
        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, x: Tensor, t: Tensor, sigma: Tensor, classes: Tensor, dtype: torch.dtype
    ) -> Tensor:
        guided, edm = self.do_classifier_free_guidance, self.config.prediction == "edm"
        ready = self.scheduler.scale_model_input(x, t) if edm else limited(x, self._dim)
        output = self.transformer(
            (torch.cat([ready, ready]) if guided else ready).to(dtype),
            timestep=self._network_time(t if edm else sigma).expand(len(classes)),
            class_labels=classes,
            return_dict=False,
        )[0].float()
        if not edm and not hasattr(self.scheduler, "raw_kind"):  # one that takes k-Diff itself
            output = self.velocity(output, torch.cat([x, x]) if guided else x, sigma)
        if not guided:
            return output
        uncond, cond = output.chunk(2)
        return uncond + self._guidance_scale * (cond - uncond)

    @property
    def _noise_scale(self) -> float:
        return self.scheduler.init_noise_sigma if self.config.prediction == "edm" else 1.0

    def _network_time(self, time: Tensor) -> Tensor:
        return time * self.scheduler.config.num_train_timesteps

    @property
    def _dim(self) -> float:
        return math.inf if self.config.augment_dim is None else self.config.augment_dim

    def _noise(
        self, count: int, generator: Any, latents: Tensor | None, device: torch.device
    ) -> Tensor:
        size = self.transformer.config.sample_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        shape = (count, self.transformer.config.in_channels, *sides)
        if latents is None:
            return starting_noise(shape, generator, self.config.augment_dim, device)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents: expected shape {shape}, got {tuple(latents.shape)}")
        return latents.to(device=device, dtype=torch.float32)

    def _set_timesteps(
        self, steps: int, sigmas: Sequence[float] | None, device: torch.device
    ) -> Tensor:
        """Prepare the scheduler; the noise level of each of its timesteps, on ``device``."""
        scheduler, config = self.scheduler, self.config
        flow_match = check_scheduler(scheduler, config.prediction, config.k, config.augment_dim)
        takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is not None and (not takes_sigmas or config.prediction == "edm"):
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
