"""Builds the untrained embedded scorer: a small CLIP model with its tokenizer and processor."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from embedded.image.model import new_tokenizer
from embedded.unet.model import WORDS, give_order

WIDTH = 96  # of both encoders
HEADS = 3
EMBEDDING = 64
PIXELS = 64  # side of the pictures that it sees
PATCH = 8


def new_clip(words: int) -> CLIPModel:
    """Builds the model: three layers for pictures, two for captions.

    Args:
        words: Number of words that the tokenizer knows.
    """
    layers = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS}
    model = CLIPModel(
        CLIPConfig(
            text_config=layers
            | {
                "vocab_size": words,
                "num_hidden_layers": 2,
                "max_position_embeddings": WORDS,
                "hidden_act": "gelu",
                "pad_token_id": 0,
                "bos_token_id": 0,
                "eos_token_id": 1,
            },
            vision_config=layers
            | {
                "num_hidden_layers": 3,
                "image_size": PIXELS,
                "patch_size": PATCH,
                "hidden_act": "gelu",
            },
            projection_dim=EMBEDDING,
        )
    )
    give_order(model.text_model)
    return model


def new_processor() -> CLIPImageProcessor:
    """Builds the processor: scaled to 64 px, values -1 to 1."""
    return CLIPImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


class Scorer(nn.Module):
    """What the training of the scorer trains.

    Args:
        words: Words of the captions.
    """

    def __init__(self, words: Iterable[str]) -> None:
        super().__init__()
        self.tokenizer = new_tokenizer(words, WORDS)
        self.clip = new_clip(len(self.tokenizer))

    def forward(self, pictures: Tensor, captions: list[str]) -> Tensor:
        """Compares pictures with captions.

        Args:
            pictures: (B, 3, 64, 64), values -1 to 1.
            captions: B captions.

        Returns:
            Scaled cosines (B, B), pictures in rows.
        """
        words = self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        output = self.clip(
            pixel_values=pictures,
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
        )
        return output.logits_per_image

    @torch.no_grad()
    def limit_scale(self, largest: float = 100.0) -> None:
        """Keeps the factor on the cosines from growing beyond that of CLIP."""
        self.clip.logit_scale.clamp_(max=torch.tensor(largest).log())
