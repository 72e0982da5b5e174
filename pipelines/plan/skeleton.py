"""A pipeline as its configuration files describe it: every shape, no weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn

from diffaccel.attach.attachment import DENOISERS
from diffaccel.errors import ModelError
from diffaccel.pipelines.image.presets import SUPPORTED, SUPPORTED_VIDEO
from diffaccel.pipelines.loading import check_folder


@dataclass(frozen=True)
class Outline:
    """The modules of a pipeline on PyTorch's meta device.

    Attributes:
        class_name: Class of the pipeline.
        index: What model_index.json says.
        modules: Component name to module; text encoders too.
        unread: Components that could not be built from their configuration.
    """

    class_name: str
    index: dict[str, Any]
    modules: dict[str, Any]
    unread: tuple[str, ...] = ()

    @property
    def denoisers(self) -> dict[str, Any]:
        """The modules that methods are attached to."""
        return {name: self.modules[name] for name in DENOISERS if name in self.modules}

    @property
    def transformer(self) -> Any:
        return self.modules.get("transformer")

    @property
    def config(self) -> dict[str, Any]:
        """Settings beside the components, where a pipeline has them."""
        return self.index

    @property
    def transformer_2(self) -> Any:
        return self.modules.get("transformer_2")

    @cached_property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels per latent element and axis."""
        config = self.modules["vae"].config
        if "scale_factor_spatial" in config and config.scale_factor_spatial:
            return config.scale_factor_spatial
        if "block_out_channels" in config:
            return 2 ** (len(config.block_out_channels) - 1)
        return 2 ** len(config.temperal_downsample)

    @cached_property
    def vae_scale_factor_temporal(self) -> int:
        """Frames per latent frame."""
        config = self.modules["vae"].config
        if "scale_factor_temporal" in config and config.scale_factor_temporal:
            return config.scale_factor_temporal
        return 2 ** sum(config.get("temperal_downsample", ()))


def read_outline(source: str | Path, *, is_video: bool = False) -> Outline:
    """Reads the configuration of a diffusers folder, or of a hub name in the local cache.

    Args:
        source: The folder or name.
        is_video: Whether a video pipeline is wanted.

    Raises:
        ModelError: The folder cannot be read, the name is not cached, or the pipeline is of
            another kind.
    """
    folder = _folder_of(source)
    check_folder(folder, SUPPORTED_VIDEO if is_video else SUPPORTED)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    modules, unread = {}, []
    for name, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        if not is_component or not (folder / name / "config.json").is_file():
            continue
        try:
            module = _build(entry[0], entry[1], folder / name / "config.json")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            unread.append(name)
            continue
        if isinstance(module, nn.Module):
            modules[name] = module
    outline = Outline(index["_class_name"], index, modules, tuple(unread))
    if not outline.denoisers or "vae" not in modules:
        raise ModelError(
            "a plan needs the config.json of the denoiser and of the autoencoder, "
            f"{str(source)!r} lacks a readable one; complete the folder"
        )
    return outline


def _folder_of(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise ModelError(
            f"a model must be a diffusers folder or a hub name such as owner/name, "
            f"got {str(source)!r}; check the path"
        )
    index = try_to_load_from_cache(str(source), "model_index.json")
    if not isinstance(index, str):
        raise ModelError(
            f"a plan reads local files alone, and {str(source)!r} is not in the hub's cache; "
            "download its model_index.json and config.json files, or sample once"
        )
    return Path(index).parent


def _build(library: str, class_name: str, path: Path) -> nn.Module | None:
    """Builds a component without weights; None for what is no module of these libraries."""
    source = {"diffusers": diffusers, "transformers": transformers}.get(library)
    kind: Any = getattr(source, class_name, None)
    is_module = isinstance(kind, type) and issubclass(kind, nn.Module)
    if not is_module:
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        if library == "diffusers":
            return kind.from_config(config).requires_grad_(False)  # or a count follows gradients
        return kind(kind.config_class.from_dict(config))
