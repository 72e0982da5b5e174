"""Attention with some heads damaged on purpose, for guidance by comparison."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from diffaccel.errors import InputError, check_kinds
from diffaccel.kernels import dense_attention
from diffaccel.kernels.perturbed import (
    blurred_queries,
    image_mass_to_self_attention,
    mean_query_attention,
    self_and_text_attention,
    uniform_attention,
)
from diffaccel.methods.base import Method
from diffaccel.methods.inputs import Attended, AttentionInputs, Position
from diffaccel.methods.visual import COMPUTED_DENSELY

if TYPE_CHECKING:
    from typing_extensions import Self

Target = Literal["identity", "uniform", "blur"]
Scope = Literal["sequence", "image", "image_mass"]


@dataclass(frozen=True, slots=True, repr=False)
class HeadPerturbation(Method):
    """Mixes the attention map of chosen heads with a damaged one: (1 - u) A + u A'.

    With `pipe.set_guidance(HeadPerturbation(...))` the model is steered away from what it
    predicts with these heads damaged. As a method of its own it shows the damage. Without heads
    and layers it is dense attention. The mixture is exact: no map is built, and unselected heads
    keep their bits.

    At strength 1 with target "identity" on all heads of a layer this is perturbed-attention
    guidance (PAG); at lower strength SoftPAG; target "blur" is smoothed-energy guidance (SEG).

    Source: "Fine-Grained Perturbation Guidance via Attention Head Selection" (Ahn et al., 2025,
    https://arxiv.org/abs/2506.10978).

    Args:
        heads: Pairs (layer, head), both from 0. Layers count as `report()` lists them: FLUX has
            its double blocks first, then the single ones; U-Nets go down, middle, up.
        layers: Layers of which all heads are damaged.
        strength: u, 0 (nothing) to 1 (the damaged map alone).
        target: The damaged map. "identity": every token sees itself alone. "uniform": every
            token sees all others equally. "blur": queries of the visual tokens are blurred over
            their grid by `sigma`.
        scope: Where "identity" holds in a sequence of image and text. "sequence": for all tokens.
            "image": between image tokens, before the softmax; text stays visible to them, text
            rows stay dense. "image_mass": the same after the softmax, so that the share of text
            stays.
        sigma: Standard deviation of the blur in tokens; infinity gives every token the mean
            query.

    Example:
        >>> pipe.set_guidance(HeadPerturbation(heads=((8, 3), (9, 0)), strength=0.5), scale=3.0)
    """

    heads: tuple[tuple[int, int], ...] = ()
    layers: tuple[int, ...] = ()
    strength: float = 1.0
    target: Target = "identity"
    scope: Scope = "sequence"
    sigma: float = inf

    def __post_init__(self) -> None:
        check_kinds(self)
        object.__setattr__(self, "heads", tuple(sorted({_checked_head(h) for h in self.heads})))
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        for layer in self.layers:
            if not _is_index(layer):
                raise ValueError(f"layers must be integers of at least 0, got {layer!r}")
        if not 0.0 <= self.strength <= 1.0:
            raise ValueError(f"strength must lie in 0 to 1, got strength={self.strength}")
        for name, choices in (("target", Target), ("scope", Scope)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(choices))}, got "
                    f"{name}={getattr(self, name)!r}"
                )
        if self.target != "identity" and self.scope != "sequence":
            raise ValueError(
                f'scope must be "sequence" unless target is "identity", got scope={self.scope!r} '
                f"with target={self.target!r}"
            )
        if not self.sigma > 0:
            raise ValueError(f"sigma must be above 0 tokens, got sigma={self.sigma}")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` or a head search wrote.

        Raises:
            InputError: The file cannot be read or does not describe a perturbation.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))["perturbation"]
            heads = tuple(tuple(pair) for pair in content.pop("heads", ()))
            layers = tuple(content.pop("layers", ()))
            content["sigma"] = float(content.get("sigma", inf))
            return cls(heads=heads, layers=layers, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"a head file must be JSON as HeadPerturbation.save writes it, {str(path)!r} is "
                f"not ({error})"
            ) from error

    def save(self, path: str | Path) -> None:
        """Writes the configuration as a small JSON file."""
        from diffaccel.files import replacing

        content = asdict(self)
        content["sigma"] = str(self.sigma)  # JSON has no infinity
        with replacing(Path(path)) as temporary:
            temporary.write_text(json.dumps({"perturbation": content}, indent=2) + "\n")

    @property
    def touched(self) -> tuple[int, ...]:
        """The layers that have a damaged head, ascending."""
        return tuple(sorted({layer for layer, _ in self.heads} | set(self.layers)))

    def heads_of(self, layer: int | None, count: int, first: int | None = None) -> tuple[int, ...]:
        """Returns which of `count` heads of a layer are damaged, counted from 0.

        Args:
            layer: Index among the attached layers; None counts as 0.
            count: Heads.
            first: Index of the first of them in its layer, None where they are all.
        """
        layer = layer or 0
        if layer in self.layers:
            return tuple(range(count))
        damaged = tuple(head for at, head in self.heads if at == layer)
        if first is None:
            return damaged
        return tuple(head - first for head in damaged if first <= head < first + count)

    def perturb(self, inputs: AttentionInputs, output: Tensor, layer: int | None) -> Tensor:
        """Damages the output (B, N, H, D) that any method computed for these inputs."""
        chosen = self.heads_of(layer, inputs.query.shape[2], inputs.first_head)
        if not chosen or self.strength == 0:
            return output
        index = torch.tensor(chosen, device=output.device)
        query, key, value = (
            x.index_select(2, index) for x in (inputs.query, inputs.key, inputs.value)
        )
        rows, damaged = self._damaged(replace(inputs, query=query, key=key, value=value))
        mixed = output.clone()
        sound = mixed[:, rows].index_select(2, index)
        mixed[:, rows] = mixed[:, rows].index_copy(2, index, sound.lerp(damaged, self.strength))
        return mixed

    def compute(self, inputs: AttentionInputs, position: Position) -> Attended:
        output = self.perturb(inputs, inputs.dense(), position.layer)
        return Attended(output, 1.0, COMPUTED_DENSELY)

    def _damaged(self, inputs: AttentionInputs) -> tuple[slice, Tensor]:
        """Returns which rows are damaged, and what the damaged map gives for them."""
        query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
        everything, image = slice(None), inputs.layout.visual_slice
        options: dict[str, Any] = {"scale": inputs.scale, "key_padding_mask": mask}
        if self.target == "uniform":
            return everything, uniform_attention(value, mask).expand_as(value)
        if self.target == "blur" and self.sigma == inf:
            mean = mean_query_attention(query[:, image], key, value, **options)
            return image, mean.expand_as(value[:, image])
        if self.target == "blur":
            blurred = blurred_queries(query[:, image], inputs.layout.grid, self.sigma)
            return image, dense_attention(blurred, key, value, **options)
        if self.scope == "sequence":
            return everything, value
        if self.scope == "image_mass":
            is_image = torch.zeros(inputs.layout.length, dtype=torch.bool, device=value.device)
            is_image[image] = True
            return image, image_mass_to_self_attention(
                query, key, value, is_image, image, **options
            )
        text = inputs.exact()
        return image, self_and_text_attention(
            query[:, image],
            key[:, image],
            value[:, image],
            text.key,
            text.value,
            scale=inputs.scale,
            text_mask=text.valid,
        )


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked_head(pair: object) -> tuple[int, int]:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(_is_index, pair)):
        raise ValueError(f"heads must be pairs (layer, head) of integers from 0, got {pair!r}")
    return tuple(pair)
