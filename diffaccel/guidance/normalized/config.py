"""Normalised attention guidance: away from a negative prompt, inside of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaccel.errors import check_kinds

LEAST = 1e-12  # norms below count as zero


@dataclass(frozen=True, slots=True)
class NormalizedAttention:
    """Steers every attention layer away from what it gives for a negative prompt.

    For few-step and guidance-distilled models, where classifier-free guidance fails; it takes the
    place of that one, so call the pipeline without (`guidance_scale=1`). Models with separate
    text cross-attention (Wan, LTX, U-Nets) pay one more cross-attention, models with joint
    attention (FLUX, SD3, Qwen-Image, HunyuanVideo, CogVideoX) a second row in the batch.

    With the outputs Z+ and Z- of a layer for both prompts and the guidance's scale w:

        Z~ = Z+ + w (Z+ - Z-),   R = |Z~| / |Z+|   (L1 norms over the channels of a token)
        Z  = blend Z~ min(R, limit) / R + (1 - blend) Z+

    Source: "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models"
    (Chen et al., 2025, https://arxiv.org/abs/2505.21179). Published: w 4, limit 2.5, blend 0.25
    for FLUX; blend 0.5 for SDXL.

    Args:
        negative_prompt: What to steer away from. Or its embeddings (1, T, C), as the pipeline's
            `encode_prompt` gives them.
        limit: Largest growth of a token's norm, at least 1.
        blend: Share of the guided output, 0 to 1.
        negative_mask: (1, T) mask of given embeddings, for pipelines that have one.
    """

    negative_prompt: str | Tensor = field(default="", compare=False)
    limit: float = 2.5
    blend: float = 0.25
    negative_mask: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.limit >= 1.0:
            raise ValueError(f"limit must be at least 1, got limit={self.limit}")
        if not 0.0 <= self.blend <= 1.0:
            raise ValueError(f"blend must lie in 0 to 1, got blend={self.blend}")
        given = self.negative_prompt
        if not isinstance(given, str) and not (isinstance(given, Tensor) and given.ndim == 3):
            raise TypeError(
                "negative_prompt must be a text or its embeddings (1, T, C), got "
                f"{type(given).__name__}"
            )
        mask = self.negative_mask
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"negative_mask must be None or a tensor (1, T), got {type(mask).__name__}"
            )

    @property
    def strength(self) -> float:
        """Zero where the outputs stay as they are."""
        return self.blend

    def combined(
        self,
        positive: Tensor,
        negative: Tensor,
        scale: float,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Returns the guided output of a layer.

        Args:
            positive: (B, N, H, D), Z+.
            negative: (B, N, H, D), Z-.
            scale: w.
            total: Sums a tensor over the ranks that share the heads, None where H are all.
        """
        wide = torch.promote_types(positive.dtype, torch.float32)
        sound = positive.to(wide)
        pushed = sound + scale * (sound - negative.to(wide))
        norms = torch.stack([x.abs().sum((-2, -1), keepdim=True) for x in (sound, pushed)])
        norm, pushed_norm = norms if total is None else total(norms)
        limited = (norm * self.limit / pushed_norm.clamp(min=LEAST)).clamp(max=1.0)
        guided = torch.lerp(sound, pushed * limited, self.blend)
        return torch.where(norm > LEAST, guided, sound).to(positive.dtype)
