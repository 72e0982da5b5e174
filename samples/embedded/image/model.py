"""Builds the untrained parts of the embedded image model and puts them into a pipeline."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

SPECIAL_WORDS = ("[PAD]", "[EOS]", "[UNK]")
POOLED_WORDS = 32  # longest caption of the pooled encoder, end word included
CAPTION_WORDS = 32  # recommended max_sequence_length
FAR_WORDS = 24  # from this distance on, words of a caption do not see each other
SEQUENCE_ENCODER = {  # of T5 and its like
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": FAR_WORDS,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
    "use_cache": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
WIDTH = 256  # of the transformer
HEAD_DIM = 64
AXES = (8, 28, 28)  # rotary dimensions of frame, row and column
NEVER = -30.0  # attention bias that rules a key out


def new_tokenizer(words: Iterable[str], length: int) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per lower-case word; unknown words become [UNK].

    Args:
        words: The words that it knows.
        length: Longest sequence, the end word included.
    """
    known = [*SPECIAL_WORDS, *sorted(set(words))]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^a-z0-9]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", special_tokens=[("[EOS]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        model_max_length=length,
        clean_up_tokenization_spaces=False,
    )


def new_pooled_encoder(words: int) -> CLIPTextModel:
    """Builds the encoder whose end word summarises the caption."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=POOLED_WORDS,
            hidden_act="gelu",
            projection_dim=128,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def new_sequence_encoder(words: int) -> T5EncoderModel:
    """Builds the encoder of the word sequence.

    The pipeline pads captions to up to 512 tokens without a mask. So that the number of pads
    does not change what the words become, attention beyond `FAR_WORDS` is ruled out through the
    relative position bias.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=words,
            is_decoder=False,
            **SEQUENCE_ENCODER,
        )
    )
    with torch.no_grad():
        encoder.shared.weight.normal_(0, 0.5)
    give_order(encoder)
    return encoder


@torch.no_grad()
def give_order(encoder: T5EncoderModel) -> None:
    """Lets words know what comes before and after them, so that they bind to places.

    The order of words enters through the relative position bias alone, and from small random
    values it was not learned at all: the first and the second object of a caption looked alike.
    One head sees the past, one the future, one the close neighbours, one everything.
    """
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    before, after, far = slice(1, 16), slice(17, 32), (15, 31)  # buckets of distances
    bias.zero_()
    bias[after, 0] = NEVER
    bias[before, 1] = NEVER
    bias[after, 1] = -0.3 * torch.arange(15)
    bias[before, 2] = bias[after, 2] = -0.7 * torch.arange(1, 16)
    bias[far, :] = NEVER


def new_transformer() -> FluxTransformer2DModel:
    """Builds the velocity model: one double and four single blocks of width 256."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=WIDTH // HEAD_DIM,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=AXES,
    )
    model.register_to_config(_native_grid=(1, 16, 16))  # tokens: 256 x 256 pixels
    with torch.no_grad():  # starts close to an unmodulated network whose output is zero
        for name, weight in model.named_parameters():
            if name.startswith("proj_out"):
                weight.zero_()
            elif "norm" in name and ".linear." in name:
                weight.mul_(0.3)
    give_positions(model)
    return model


@torch.no_grad()
def give_positions(model: FluxTransformer2DModel) -> None:
    """Lets the first block tell tokens where they are, which rotary positions alone learn slowly.

    Text stands at position 0. Each head's constant query meets the constant keys of the text
    under one rotary frequency, so that its share of attention on text is a wave over the rows or
    columns: a slow and a faster one of each.
    """
    block = model.transformer_blocks[0]
    attention = block.attn
    first_row, first_column = AXES[0], AXES[0] + AXES[1]
    for projection, kept in (
        (attention.to_q, 0.05),
        (attention.add_k_proj, 0.05),
        (attention.to_k, 0.3),
        (attention.to_v, 0.5),
    ):
        projection.weight.mul_(kept)
        projection.bias.zero_()
    waves = ((first_row, 3), (first_column, 3), (first_row, 1), (first_column, 1))
    for head, (offset, index) in enumerate(waves):
        start = head * HEAD_DIM
        frequency = 10_000.0 ** (-2 * index / AXES[1])
        phase = math.pi / 2 - 7.5 * frequency  # steepest in the middle of the 16 x 16 grid
        pair = start + offset + 2 * index
        attention.to_q.bias[pair] = math.cos(phase)
        attention.to_q.bias[pair + 1] = math.sin(phase)
        attention.add_k_proj.bias[pair] = 1.0
        for projection in (attention.to_k, attention.add_k_proj):  # where queries are zero
            projection.bias[start : start + AXES[0]] = 0.6
    attention.add_v_proj.bias.normal_(0, 1.0)
    for norm in (attention.norm_q, attention.norm_k, attention.norm_added_k):
        norm.weight.fill_(1.0)
    gate = slice(2 * WIDTH, 3 * WIDTH)
    block.norm1.linear.bias[gate] = 1.0


class ImageModel(nn.Module):
    """What the diffusion stage trains: text encoders and transformer.

    Args:
        words: Words of the captions.
        sequence_length: Longest caption that the sequence tokenizer declares.
    """

    def __init__(self, words: Iterable[str], sequence_length: int = 512) -> None:
        super().__init__()
        words = list(words)
        self.tokenizer = new_tokenizer(words, POOLED_WORDS)
        self.tokenizer_2 = new_tokenizer(words, sequence_length)
        self.text_encoder = new_pooled_encoder(len(self.tokenizer))
        self.text_encoder_2 = new_sequence_encoder(len(self.tokenizer_2))
        self.transformer = new_transformer()

    @torch.no_grad()
    def adopt(self, folder: Path) -> None:
        """Takes over the weights of a pipeline folder; words that it does not know stay new."""
        old = FluxPipeline.from_pretrained(folder, vae=None)
        self.transformer.load_state_dict(old.transformer.state_dict())
        for name in ("text_encoder", "text_encoder_2"):
            mine, theirs = getattr(self, name), getattr(old, name)
            tokenizer = name.replace("text_encoder", "tokenizer")
            known = getattr(old, tokenizer).get_vocab()
            table = mine.get_input_embeddings().weight
            rows = table.clone()
            for word, index in getattr(self, tokenizer).get_vocab().items():
                if word in known:
                    rows[index] = theirs.get_input_embeddings().weight[known[word]]
            for weight, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                weight.copy_(rows if weight is table else source)

    def encode(self, captions: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Encodes captions as FluxPipeline does, without an attention mask.

        Returns:
            The pooled captions (B, 128) and their word sequences (B, length, 128).
        """
        pooled_ids = self._ids(self.tokenizer, captions, POOLED_WORDS)
        sequence_ids = self._ids(self.tokenizer_2, captions, length)
        return (
            self.text_encoder(pooled_ids).pooler_output,
            self.text_encoder_2(sequence_ids)[0],
        )

    def forward(
        self, noisy: Tensor, sigma: Tensor, captions: list[str], length: int, positions: Tensor
    ) -> Tensor:
        """Predicts the velocity, noise minus picture.

        Args:
            noisy: Packed latents (B, N, 32).
            sigma: Noise levels (B,), 0 to 1.
            captions: B captions.
            length: Words to which the sequences are padded.
            positions: (N, 3), the row and column of each token in the last two entries.
        """
        pooled, sequence = self.encode(captions, length)
        return self.transformer(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=pooled,
            encoder_hidden_states=sequence,
            txt_ids=torch.zeros(length, 3),
            img_ids=positions,
            return_dict=False,
        )[0]

    def pipeline(self, vae: AutoencoderKL, shift: float) -> FluxPipeline:
        """Puts the parts into a stock pipeline, with a constant schedule shift."""
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )

    @staticmethod
    def _ids(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> Tensor:
        return tokenizer(
            captions,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
