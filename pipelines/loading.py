"""Load any diffusers pipeline by name: the embedded one, a local folder, or a hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from . import embedded
from .class_conditional import ClassConditionalPipeline
from .degraded import degraded
from .files import folder_digest


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> Any:
    """A pipeline ready to call, without a progress bar of its own.

    Args:
        model: "embedded", a folder written by ``save_pretrained``, or a hub id such as
            "stabilityai/stable-diffusion-3.5-medium".
        dtype: of its networks.
        device: where to put it.
        revision: branch, tag or commit of a hub id.

    Raises:
        FileNotFoundError: if there is no such folder, or it holds no pipeline.
        ValueError: if the hub cannot give it, or a file of it is damaged; the message says which.
    """
    if str(model) == "embedded":
        pipe: Any = embedded.load_embedded(dtype=dtype)
    else:
        source = _local_folder(str(model)) or str(model)
        kwargs = {} if revision is None else {"revision": revision}
        try:
            own = _class_name(source, kwargs) == ClassConditionalPipeline.__name__
            cls = ClassConditionalPipeline if own else DiffusionPipeline
            pipe = cls.from_pretrained(source, **embedded.as_dtype(dtype), **kwargs)
        except Exception as error:  # loaders raise everything from KeyError to SafetensorError
            raise ValueError(_explain(source, error)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def load_weak(model: str | Path, pipe: Any) -> Any:
    """The weak model of autoguidance: a denoiser called like the one of ``pipe``.

    Args:
        model: "embedded", the folder of a pipeline or of its denoiser alone, or "skip:3,4" or
            "perturb:3,4": the denoiser of ``pipe`` itself without these layers, or without their
            self-attention, see ``degraded``.
        pipe: the pipeline that it will guide; gives the class, dtype and device.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if a file of it is damaged, it is another kind of model, or it predicts
            something else than the denoiser of ``pipe`` (another k of k-Diff, another D of PFGM++).
    """
    name = "unet" if getattr(pipe, "transformer", None) is None else "transformer"
    strong = getattr(pipe, name)
    if str(model) == "embedded":
        return embedded.load_embedded_weak(dtype=strong.dtype, device=strong.device)
    kind, _, layers = str(model).partition(":")
    if kind in ("skip", "perturb"):
        return degraded(strong, **{kind: _layers(layers)})
    folder = Path(model).expanduser()
    _check_target(folder, pipe)
    folder = folder / name if (folder / "model_index.json").is_file() else folder
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"weak: there is no model in the folder {str(model)!r} (no config.json); give "
            "'embedded', the folder of a pipeline or of its denoiser, 'skip:' or 'perturb:' and "
            "layers"
        )
    try:
        weak = type(strong).from_pretrained(folder, **embedded.as_dtype(strong.dtype))
    except Exception as error:
        raise ValueError(_explain(folder, error)) from error
    return weak.to(strong.device)


def _layers(text: str) -> list[int | str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    return [int(word) if word.lstrip("-").isdigit() else word for word in words]


def _check_target(folder: Path, pipe: Any) -> None:
    """Refuse a weak model whose output means something else."""
    notes = (folder / "model_index.json", folder / "target.json")
    note = next((path for path in notes if path.is_file()), None)
    if note is None or not isinstance(pipe, ClassConditionalPipeline):
        return
    saved = json.loads(note.read_text())
    for key, default in (("prediction", "velocity"), ("k", None), ("augment_dim", None)):
        weak, strong = saved.get(key, default), pipe.config[key]
        if weak != strong:
            raise ValueError(
                f"weak: the model in {folder} was trained with {key}={weak}, the one that it would "
                f"guide with {key}={strong}; autoguidance compares outputs of one meaning (with "
                "k-Diff: train at a fixed k)"
            )


def model_digest(model: str | Path) -> str | None:
    """Fingerprint of the model's files, to notice that they changed; None for a hub id."""
    if str(model) == "embedded":
        return folder_digest(embedded.weights_folder("model"))
    folder = _local_folder(str(model))
    return None if folder is None else folder_digest(folder)


def _local_folder(model: str) -> Path | None:
    """The folder that ``model`` names, or None if it can only be a hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise FileNotFoundError(
                f"model: the folder {path} holds no diffusers pipeline (no model_index.json); give "
                "the folder that save_pretrained() wrote"
            )
        return path
    owner, slash, name = model.partition("/")
    if path.exists() or not slash or not name or "/" in name or owner in ("", ".", "..", "~"):
        raise FileNotFoundError(
            f"model: there is no pipeline folder {model!r}; give 'embedded', an existing folder, "
            "or a hub id of the form owner/name"
        )
    return None


def _class_name(source: str | Path, kwargs: dict[str, Any]) -> str:
    if isinstance(source, Path):
        return str(json.loads((source / "model_index.json").read_text()).get("_class_name"))
    return str(DiffusionPipeline.load_config(source, **kwargs).get("_class_name"))


def _explain(source: str | Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:400] or type(error).__name__
    if isinstance(source, Path):
        return (
            f"model: cannot load the pipeline in {source}: {type(error).__name__}: {reason}. If a "
            "file there is damaged or incomplete, copy or save the pipeline again"
        )
    return (
        f"model: cannot load {source!r}: there is no such folder here, and the hub gave "
        f"{type(error).__name__}: {reason}. Check the spelling and the network (or unset "
        "HF_HUB_OFFLINE), or give a local folder"
    )
