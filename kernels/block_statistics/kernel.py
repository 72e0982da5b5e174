"""The Triton kernel of block statistics: one program holds one block of one head at a time."""

# ruff: noqa: ANN001, ANN201, ANN202 (annotations of a jit function mean tl.constexpr)

import triton
import triton.language as tl


@triton.jit
def block_statistics_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    valid_ptr,
    order_ptr,
    q_mean_ptr,
    k_mean_ptr,
    v_mean_ptr,
    q_spread_ptr,
    k_spread_ptr,
    q_variance_ptr,
    k_variance_ptr,
    v_squares_ptr,
    counts_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    heads,
    tokens,
    blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_VALUE_MEAN: tl.constexpr,
    HAS_QUERY_SPREAD: tl.constexpr,
    HAS_KEY_SPREAD: tl.constexpr,
    HAS_QUERY_VARIANCE: tl.constexpr,
    HAS_KEY_VARIANCE: tl.constexpr,
    HAS_VALUE_DEVIATION: tl.constexpr,
):
    """One program summarises BLOCK_D channels of one block of one head of q, k and v.

    Of the variance of v it stores the sum over its channels, (B, H, NB, D_TILES).
    """
    D_TILES: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    # channels and heads run fastest: neighbouring programs read neighbouring memory
    pid = tl.program_id(0)
    pid_row = pid // D_TILES
    off_h = (pid_row % heads).to(tl.int64)
    off_block = ((pid_row // heads) % blocks).to(tl.int64)
    off_b = (pid_row // heads // blocks).to(tl.int64)

    in_block = tl.arange(0, BLOCK_N)
    off_n = off_block * BLOCK + in_block
    is_token = (in_block < BLOCK) & (off_n < tokens)
    if HAS_ORDER:
        off_n = tl.load(order_ptr + off_n, mask=is_token, other=0).to(tl.int64)
        off_n = tl.minimum(tl.maximum(off_n, 0), tokens - 1)
    if HAS_VALID:
        is_token &= tl.load(valid_ptr + off_b * tokens + off_n, mask=is_token, other=0) != 0
    count = tl.sum(is_token.to(tl.float32), 0)
    is_first = (off_h == 0) & (pid % D_TILES == 0)
    if not HAS_VALID:  # one row of counts serves all samples
        is_first &= off_b == 0
    tl.store(counts_ptr + off_b * blocks + off_block, count, mask=is_first)

    divisor = tl.maximum(count, 1.0)
    off_d = (pid % D_TILES) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = off_d < HEAD_DIM
    off_out = ((off_b * heads + off_h) * blocks + off_block) * HEAD_DIM + off_d
    channels = (off_d, mask_d, off_out)
    q_ptr += off_b * stride_qb + off_h * stride_qh
    _summarize(
        q_ptr, (off_n * stride_qn, is_token, divisor), channels,
        (q_mean_ptr, q_spread_ptr, q_variance_ptr), True, HAS_QUERY_SPREAD, HAS_QUERY_VARIANCE,
    )  # fmt: skip
    k_ptr += off_b * stride_kb + off_h * stride_kh
    _summarize(
        k_ptr, (off_n * stride_kn, is_token, divisor), channels,
        (k_mean_ptr, k_spread_ptr, k_variance_ptr), True, HAS_KEY_SPREAD, HAS_KEY_VARIANCE,
    )  # fmt: skip
    if HAS_VALUE_MEAN or HAS_VALUE_DEVIATION:
        v_ptr += off_b * stride_vb + off_h * stride_vh
        variance = _summarize(
            v_ptr, (off_n * stride_vn, is_token, divisor), channels,
            (v_mean_ptr, v_mean_ptr, v_mean_ptr), HAS_VALUE_MEAN, False, False,
            HAS_VALUE_DEVIATION,
        )  # fmt: skip
        if HAS_VALUE_DEVIATION:
            off_squares = ((off_b * heads + off_h) * blocks + off_block) * D_TILES + pid % D_TILES
            tl.store(v_squares_ptr + off_squares, tl.sum(variance, 0))


@triton.jit
def _summarize(
    x_ptr,
    rows,
    channels,
    results,
    HAS_MEAN: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_VARIANCE: tl.constexpr,
    RETURNS_VARIANCE: tl.constexpr = False,
):
    """Reads a tile (BLOCK_N, BLOCK_D) once and stores its mean and the deviations from it.

    `rows` are (offsets, mask, divisor), `channels` (offsets, mask, offsets of the results), and
    `results` pointers to mean, spread and variance. Returns the variance, or else the mean.
    """
    off_row, is_token, divisor = rows
    off_d, mask_d, off_out = channels
    mean_ptr, spread_ptr, variance_ptr = results
    inside = is_token[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + off_row[:, None] + off_d[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = tl.sum(x, 0) / divisor
    if HAS_MEAN:
        tl.store(mean_ptr + off_out, mean, mask=mask_d)
    if HAS_SPREAD:
        deviation = tl.where(inside, tl.abs(x - mean[None, :]), 0.0)
        tl.store(spread_ptr + off_out, tl.sum(deviation, 0) / divisor, mask=mask_d)
    result = mean
    if HAS_VARIANCE or RETURNS_VARIANCE:
        # in terms of a token, the largest: the mean of equal ones may be rounded
        largest = tl.max(tl.where(inside, x, float("-inf")), 0)
        x = tl.where(inside, x - largest[None, :], 0.0)
        x = tl.where(inside, x - (tl.sum(x, 0) / divisor)[None, :], 0.0)
        result = tl.sum(x * x, 0) / divisor
    if HAS_VARIANCE:
        tl.store(variance_ptr + off_out, result, mask=mask_d)
    return result
