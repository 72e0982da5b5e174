"""Dense attention over heads-last tensors through PyTorch's own kernels."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    """Computes exact attention with whichever SDPA backend is active.

    Without a mask the result is bit-identical to `scaled_dot_product_attention` on transposed
    views. Padded keys and values may hold anything, NaN included.

    Args:
        query: (B, N, H, D), any float dtype and strides.
        key: (B, M, H, D), dtype of `query`.
        value: (B, M, H, D), dtype of `query`.
        scale: Factor on the scores; None for D ** -0.5.
        key_padding_mask: (B, M) bool, True where the key may be attended. An all-true mask on
            the CPU is dropped; on CUDA that would need a host sync, so pass None instead, since
            any mask rules out the flash backend.
        key_bias: (B or 1, M), any float dtype, added to the scores of a key in every row, such
            as the logarithm of how many keys it stands for.

    Returns:
        The output (B, N, H, D) in the dtype of `query`.
    """
    mask = None
    if key_padding_mask is not None and not _is_known_all_true(key_padding_mask):
        padded = ~key_padding_mask[:, :, None, None]
        key, value = key.masked_fill(padded, 0.0), value.masked_fill(padded, 0.0)
        mask = key_padding_mask[:, None, None, :]
    if key_bias is not None:
        bias = key_bias.to(query.dtype)[:, None, None, :]
        mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.transpose(1, 2)


def _is_known_all_true(mask: Tensor) -> bool:
    """Says whether a mask hides nothing, where that is known without a host sync."""
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(mask.all())
