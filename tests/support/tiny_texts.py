"""Tokenizers over letters, and tiny text encoders with random weights, made offline.

Each tokenizer is of the class that stock pipelines name in model_index.json, and every encoder
takes the tokens of one.
"""

from __future__ import annotations

import string
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def _numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def t5_tokenizer() -> Any:
    """Of T5 and UMT5."""
    letters = [(letter, -2.0) for letter in "▁" + string.printable.strip()]
    return transformers.T5TokenizerFast(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0
    )


def clip_tokenizer() -> Any:
    """Of CLIP: prompts are filled up to 77 tokens."""
    ends = [letter + "</w>" for letter in BYTES]
    vocab = _numbered(*BYTES, *ends, "<|startoftext|>", "<|endoftext|>")
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def llama_tokenizer() -> Any:
    """Of Llama; HunyuanVideo takes its template for 95 tokens, and these are letters."""
    vocab = _numbered("<unk>", "<s>", "</s>", "<pad>", "▁", *string.printable.strip())
    return transformers.LlamaTokenizerFast(
        vocab=vocab, merges=[], pad_token="<pad>",
        extra_special_tokens=["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    )  # fmt: skip


def gemma_tokenizer() -> Any:
    """Of Gemma."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocab = _numbered(*special, "▁", *string.printable.strip())
    return transformers.GemmaTokenizerFast(vocab=vocab, merges=[])


def qwen_tokenizer() -> Any:
    """Of Qwen 2 and 3, with a template of chats."""
    return transformers.Qwen2Tokenizer(
        vocab=_numbered("<|endoftext|>", *BYTES), merges=[], chat_template=TEMPLATE,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=2048,
    )  # fmt: skip


def glm_tokenizer() -> Any:
    """Of GLM, which has no class of its own; each text begins with a token."""
    vocab = _numbered("<pad>", "<unk>", "<sop>", "a", "red", "apple")
    words = models.WordLevel(vocab, "<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<sop> $A", special_tokens=[("<sop>", vocab["<sop>"])]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def _encoder(kind: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval()


def t5(width: int, kind: Any = transformers.T5EncoderModel) -> dict[str, Any]:
    """T5, or UMT5 by its class, and its tokenizer."""
    tokenizer = t5_tokenizer()
    config = kind.config_class(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return {"text_encoder": _encoder(kind, config), "tokenizer": tokenizer}


def clip(width: int, projected: int | None = None) -> dict[str, Any]:
    """CLIP's text model and its tokenizer; one with a projection has another class."""
    tokenizer = clip_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=projected or width,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return {"text_encoder": _encoder(kind, config), "tokenizer": tokenizer}


def decoder_only(kind: Any, tokenizer: Any, width: int, **changes: Any) -> dict[str, Any]:
    """A language model and its tokenizer."""
    config = kind.config_class(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, **changes,
    )  # fmt: skip
    return {"text_encoder": _encoder(kind, config), "tokenizer": tokenizer}


def qwen_vl(width: int) -> dict[str, Any]:
    """Qwen 2.5 VL and its tokenizer."""
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0,
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
        "out_hidden_size": width, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    return {"text_encoder": _encoder(kind, config), "tokenizer": tokenizer}


def numbered(parts: dict[str, Any], number: int) -> dict[str, Any]:
    """The same as a further encoder of a pipeline."""
    return {f"{name}_{number}": part for name, part in parts.items()}
