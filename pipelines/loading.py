"""Loads pipelines: the embedded models, a diffusers folder, or a name on the model hub."""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffaccel.errors import ModelError
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE, EMBEDDED_VIDEO
from diffaccel.pipelines.image.presets import SUPPORTED, SUPPORTED_VIDEO
from diffaccel.pipelines.video.families import REFUSED

# ImportError: a tokenizer needs a package that is not there
LOADING_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError
)  # fmt: skip


def load_image_pipeline(
    source: str | Path = EMBEDDED_IMAGE, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Loads a text-to-image pipeline.

    Args:
        source: A diffusers folder (one that has a model_index.json) or a hub name.
        device: Where the pipeline is put.
        dtype: Of the weights; fp32 on the CPU and bf16 elsewhere by default.

    Returns:
        The stock pipeline, with its own progress bars silenced.

    Raises:
        ModelError: The folder cannot be read, or its pipeline is none of `SUPPORTED`.
    """
    return _load(source, SUPPORTED, device, dtype)


def load_video_pipeline(
    source: str | Path = EMBEDDED_VIDEO, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Loads a text-to-video pipeline, as `load_image_pipeline` does."""
    return _load(source, SUPPORTED_VIDEO, device, dtype)


def _load(
    source: str | Path, supported: tuple[str, ...], device: str, dtype: torch.dtype | None
) -> DiffusionPipeline:
    folder = Path(source)
    if folder.is_dir():
        check_folder(folder, supported)
    elif folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise ModelError(
            f"a model must be a diffusers folder or a hub name such as owner/name, "
            f"got {str(source)!r}; check the path"
        )
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        pipe = DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except LOADING_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"a model must load as a diffusers pipeline, {str(source)!r} does not ({reason}); "
            f"check that the download or the folder is complete"
        ) from error
    _check_supported(type(pipe).__name__, source, supported)
    pipe.set_progress_bar_config(disable=True)
    if device == "cpu":
        _store_channels_last(pipe)
    return pipe.to(device)


def _store_channels_last(pipe: DiffusionPipeline) -> None:
    """Lays weights of 2-D convolutions out as CPUs read them.

    The embedded decoder takes 0.7 times as long with it; 3-D convolutions gain nothing.
    """
    for name in ("vae", "unet"):
        model = getattr(pipe, name, None)
        if model is not None and all(weight.ndim < 5 for weight in model.parameters()):
            model.to(memory_format=torch.channels_last)


def check_folder(folder: Path, supported: tuple[str, ...]) -> str:
    """Returns the class of the pipeline in a folder; reads no weight.

    Raises:
        ModelError: Its index does not name a pipeline that can be used.
    """
    modular = folder / "modular_model_index.json"
    try:
        path = modular if modular.is_file() else folder / "model_index.json"
        index = json.loads(path.read_text(encoding="utf-8"))
        name = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"a model folder must hold a readable model_index.json, got {str(folder)!r}; "
            f"point at the folder that save_pretrained wrote"
        ) from error
    _check_supported(name, folder, supported)
    return name


def _check_supported(name: str, source: str | Path, supported: tuple[str, ...]) -> None:
    if name not in supported:
        kind = "video" if supported is SUPPORTED_VIDEO else "image"
        why = f" ({REFUSED[name]})" if name in REFUSED else ""
        raise ModelError(
            f"the pipeline must be one of the {len(supported)} {kind} pipelines that "
            f"`diffaccel info` lists, got {name} in {str(source)!r}{why}; load it with diffusers "
            "and use set_attn_processor from Python"
        )
