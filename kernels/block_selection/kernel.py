"""The Triton kernel of block selection: one program bisects, picks and compacts one row."""

# ruff: noqa: ANN001, ANN201, ANN202 (annotations of a jit function mean tl.constexpr)

import triton
import triton.language as tl

# Non-negative floats order like their bit patterns, so 31 halvings of the range of patterns
# find a threshold exactly. The top is the pattern after infinity.
_HALVINGS = tl.constexpr(31)
_TOP = tl.constexpr(0x7F800001)


@triton.jit
def select_blocks_kernel(
    scores_ptr,
    text_ptr,
    forced_ptr,
    budgets_ptr,
    indices_ptr,
    counts_ptr,
    kept_ptr,
    stride_sb,
    stride_sh,
    stride_sr,
    stride_tb,
    stride_th,
    stride_tr,
    stride_gb,
    stride_gh,
    heads,
    rows,
    blocks,
    top_k,
    max_count,
    p_remain,
    BLOCK: tl.constexpr,
    HAS_MASS: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    HAS_BUDGETS: tl.constexpr,
    HAS_KEPT: tl.constexpr,
):
    """One program lists the kept blocks of one row (batch, head, query block)."""
    pid = tl.program_id(0).to(tl.int64)
    off_r = pid % rows
    off_h = (pid // rows) % heads
    off_b = pid // rows // heads
    off_m = tl.arange(0, BLOCK)
    is_block = off_m < blocks
    scores_ptr += off_b * stride_sb + off_h * stride_sh + off_r * stride_sr
    score = tl.load(scores_ptr + off_m, mask=is_block, other=0.0)
    score = tl.where(score == score, score, float("inf"))  # NaN comes first
    bits = tl.maximum(score.to(tl.int32, bitcast=True), 0)
    bits = tl.where(is_block, bits, -1)

    if HAS_BUDGETS:
        budget = tl.load(budgets_ptr + off_b * stride_gb + off_h * stride_gh)
        top_k = tl.minimum(tl.maximum(budget, 1), top_k)
    needed = top_k
    if HAS_MASS:
        text = 0.0
        if HAS_TEXT:
            text = tl.load(text_ptr + off_b * stride_tb + off_h * stride_th + off_r * stride_tr)
        covered = _count_covered(score, bits, text, p_remain)
        needed = tl.minimum(tl.maximum(covered + 1, top_k), blocks)
    threshold = _nth_largest(bits, needed)

    is_above = bits > threshold
    is_tied = bits == threshold
    room = needed - tl.sum(is_above.to(tl.int32), 0)
    kept = is_above | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 0) <= room))
    if HAS_FORCED:
        forced = tl.load(forced_ptr + off_r * blocks + off_m, mask=is_block, other=0)
        kept = kept | (forced != 0)
    kept = kept & (score > 0)

    position = tl.cumsum(kept.to(tl.int32), 0)
    count = tl.minimum(tl.sum(kept.to(tl.int32), 0), max_count)
    indices_ptr += pid * max_count
    tl.store(indices_ptr + position - 1, off_m, mask=kept & (position <= max_count))
    tl.store(indices_ptr + off_m, 0, mask=(off_m >= count) & (off_m < max_count))
    tl.store(counts_ptr + pid, count)
    if HAS_KEPT:
        tl.store(kept_ptr + pid * blocks + off_m, kept.to(tl.uint8), mask=is_block)


@triton.jit
def _nth_largest(bits, n):
    """The largest pattern that at least n blocks reach."""
    low = tl.full([], 0, tl.int32)
    high = tl.full([], _TOP, tl.int32)
    for _ in range(_HALVINGS):
        middle = low + (high - low) // 2
        is_low = tl.sum((bits >= middle).to(tl.int32), 0) >= n
        low = tl.where(is_low, middle, low)
        high = tl.where(is_low, high, middle)
    return low


@triton.jit
def _count_covered(score, bits, text, p_remain):
    """How many of the largest scores can join the text without the sum exceeding p_remain."""
    low = tl.full([], -1, tl.int32)
    high = tl.full([], _TOP, tl.int32)
    for _ in range(_HALVINGS):
        middle = low + (high - low) // 2
        fits = text + tl.sum(tl.where(bits >= middle, score, 0.0), 0) <= p_remain
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle)
    # every score from `high` on fits; of the next value, which may occur often, the first few
    count = tl.sum((bits >= high).to(tl.int32), 0)
    mass = text + tl.sum(tl.where(bits >= high, score, 0.0), 0)
    following = tl.max(tl.where((bits < high) & (score > 0), score, 0.0), 0)
    more = tl.floor((p_remain - mass) / tl.where(following > 0, following, 1.0))
    more = tl.maximum(more, 0.0)
    more = tl.where(mass + more * following > p_remain, more - 1.0, more)  # by rounding
    more = tl.where(mass + (more + 1.0) * following <= p_remain, more + 1.0, more)
    return count + tl.where(following > 0, tl.maximum(more, 0.0), 0.0).to(tl.int32)
