"""Train a small image classifier: seeded, resumable, cheap enough for one CPU core."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..eval.classifiers import (
    CifarClassifier,
    CifarPlainNet,
    CifarResNet,
    PlainNetConfig,
    ResNetConfig,
)
from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint, write_json
from .classifier_recipe import ClassifierTraining, epoch_batches, learning_rate, whitening_filters
from .data import LabelledImages
from .run_folder import check_free

__all__ = [
    "ClassifierTraining",
    "build_classifier",
    "classification_report",
    "make_optimizer",
    "predict",
    "train_classifier",
    "train_epoch",
]

RESULT_FILE, LOG_FILE = "train.json", "log.jsonl"


def build_classifier(
    config: ClassifierTraining, names: tuple[str, ...], images: Tensor
) -> CifarClassifier:
    """The untrained network; ``images`` uint8 (N, 3, H, W) set a whitening layer if it has one."""
    torch.manual_seed(config.seed)
    if config.arch == "resnet":
        return CifarResNet(
            ResNetConfig(class_names=names, width=config.width, mirrored=config.mirrored)
        )
    widths = (config.width, 4 * config.width, 4 * config.width)
    network = CifarPlainNet(
        PlainNetConfig(class_names=names, widths=widths, mirrored=config.mirrored)
    )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(config.seed))
    some = images[order[:5000]].float() / 255
    network.set_whitening(whitening_filters((some - network.mean) / network.std, 2))
    return network


def make_optimizer(network: nn.Module, config: ClassifierTraining) -> torch.optim.SGD:
    """Nesterov SGD; vectors (BatchNorm, biases) have no weight decay."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=True)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """Logits (N, classes), float32 on the CPU, of uint8 ``images`` (N, 3, H, W); in eval mode."""
    was_training = network.training
    device = next(network.parameters()).device
    network.eval()
    rows = images.split(batch_size)
    logits = torch.cat([network(part.to(device).float() / 255).float().cpu() for part in rows])
    network.train(was_training)
    return logits


def classification_report(logits: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Accuracy, negative log-likelihood and expected calibration error of ``logits`` (N, classes).

    The calibration error is that of Guo et al. 2017 (arXiv 1706.04599): the confidence of the
    predicted class against the accuracy, over equally wide ``bins``.
    """
    logits = logits.double()
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).double()
    which = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.double).index_add(0, which, confidence - correct)
    return {
        "accuracy": correct.mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": gaps.abs().sum().item() / len(labels),
    }


def train_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: LabelledImages,
    config: ClassifierTraining,
    epoch: int,
    *,
    progress: bool = False,
) -> float:
    """One pass over ``data``; returns the mean training loss."""
    steps = max(len(data) // config.batch_size, 1)
    device = next(network.parameters()).device
    total = torch.zeros((), device=device)
    network.train()
    batches = epoch_batches(data.pixels, data.labels, config, epoch)
    bar = tqdm(
        batches, f"epoch {epoch + 1}", steps, leave=False, disable=None if progress else True
    )
    for step, (images, labels) in enumerate(bar):
        images, labels = images.to(device), labels.to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, (epoch + (step + 0.5) / steps) / config.epochs)
        with _autocast(config, device):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total.item() / steps


def train_classifier(
    train: LabelledImages,
    test: LabelledImages,
    config: ClassifierTraining,
    out: Path,
    *,
    init: CifarClassifier | None = None,
    device: str | torch.device = "cpu",
    versions: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Train, save to ``out``, and return what is written to ``out/train.json``.

    The run starts from the weights of ``init`` where it is given (of the family and sizes that
    ``config`` says). After every epoch a checkpoint is kept in ``out/checkpoints``, from which
    another call with the same ``config`` goes on and ends at the same weights. The numbers in the
    result are those of the float16 weights read back from ``out``.

    Raises:
        FileExistsError: ``out`` holds a finished run.
        ValueError: ``out`` holds part of a run with another ``config``, or a damaged checkpoint.
    """
    if (out / RESULT_FILE).exists():
        raise FileExistsError(f"{out} holds a finished run; choose another folder or remove it")
    if test.names != train.names:
        raise ValueError(f"the classes differ: {train.names} in training, {test.names} in test")
    network = build_classifier(config, train.names, train.pixels).to(device)
    if init is not None:
        _start_from(network, init)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(network, config)
    log = _resume(out, config, network, optimizer)
    for epoch in range(len(log), config.epochs):
        start = time.monotonic()
        loss = train_epoch(network, optimizer, train, config, epoch, progress=True)
        seconds = time.monotonic() - start
        with _autocast(config, device):
            logits = predict(network, test.pixels)
        accuracy = classification_report(logits, test.labels)["accuracy"]
        log.append({"epoch": epoch + 1, "loss": loss, "accuracy": accuracy, "seconds": seconds})
        _checkpoint(out, config, network, optimizer, log)
    start_id = None if init is None else init.id
    origin = {"init": start_id, "versions": {"torch": torch.__version__, **(versions or {})}}
    return _finish(out, config, network, test, log, origin)


def _start_from(network: CifarClassifier, init: CifarClassifier) -> None:
    if (type(init), replace(init.config, mirrored=network.config.mirrored)) != (
        type(network),
        network.config,
    ):
        raise ValueError(
            f"the weights to start from are of a {type(init).__name__} with {init.config}, "
            f"the options say {type(network).__name__} with {network.config}"
        )
    network.load_state_dict(init.state_dict())


def _autocast(config: ClassifierTraining, device: str | torch.device) -> torch.autocast:
    enabled = config.precision == "bf16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def _checkpoint(
    out: Path,
    config: ClassifierTraining,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, Any]],
) -> None:
    state = {
        "step": len(log),
        "config": asdict(config),
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "log": log,
    }
    save_checkpoint(out / "checkpoints", len(log), state, keep=1)
    (out / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in log))


def _resume(
    out: Path,
    config: ClassifierTraining,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> list[dict[str, Any]]:
    """Load the newest checkpoint of ``out``, if there is one; returns the log so far."""
    found = list_checkpoints(out / "checkpoints")
    if not found:
        check_free(out)
        return []
    state = load_checkpoint(found[-1])
    now = asdict(config)
    changed = {k: (v, now.get(k)) for k, v in state["config"].items() if now.get(k) != v}
    if changed:
        raise ValueError(
            f"{out} holds part of a run with other options (saved, now): {changed}; "
            "use the same ones to go on, or another folder"
        )
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    log: list[dict[str, Any]] = state["log"]
    return log


def _finish(
    out: Path,
    config: ClassifierTraining,
    network: CifarClassifier,
    test: LabelledImages,
    log: list[dict[str, Any]],
    origin: dict[str, Any],
) -> dict[str, Any]:
    network.save_pretrained(out)
    stored = CifarClassifier.from_pretrained(out)
    result = {
        "id": stored.id,
        "parameters": sum(p.numel() for p in stored.parameters()),
        "test": classification_report(predict(stored, test.pixels), test.labels),
        "seconds": sum(line["seconds"] for line in log),
        "config": asdict(config),
        **origin,
        "log": log,
    }
    write_json(out / RESULT_FILE, result)
    return result
