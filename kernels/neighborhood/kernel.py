"""The Triton kernel of neighborhood attention: windows are computed, never looked up.

One program holds one tile of queries, a small box of the grid, and walks the union of their
windows in boxes of keys. Rows are loaded by their coordinates, so that neither a permutation of
the tokens nor a multiple of anything is needed; boxes that every query sees skip the mask.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (annotations of a jit function mean tl.constexpr)

import triton
import triton.language as tl

from diffaccel.kernels.block_sparse.kernel import add_scores


@triton.jit
def neighborhood_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    extra_k_ptr,
    extra_v_ptr,
    extra_mask_ptr,
    stride_qb,
    stride_q0,
    stride_q1,
    stride_q2,
    stride_qh,
    stride_kb,
    stride_k0,
    stride_k1,
    stride_k2,
    stride_kh,
    stride_vb,
    stride_v0,
    stride_v1,
    stride_v2,
    stride_vh,
    stride_ekb,
    stride_ekn,
    stride_ekh,
    stride_evb,
    stride_evn,
    stride_evh,
    length0,
    length1,
    length2,
    kernel0,
    kernel1,
    kernel2,
    run0,
    run1,
    run2,
    dilation0,
    dilation1,
    dilation2,
    phase0,
    phase1,
    phase2,
    heads,
    heads_per_key_head,
    extra,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    Q0: tl.constexpr,
    Q1: tl.constexpr,
    Q2: tl.constexpr,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    CAUSAL0: tl.constexpr,
    CAUSAL1: tl.constexpr,
    CAUSAL2: tl.constexpr,
    TRUNCATED0: tl.constexpr,
    TRUNCATED1: tl.constexpr,
    TRUNCATED2: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_EXTRA_MASK: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """One program computes Q0 x Q1 x Q2 queries of one dilation group and head."""
    BLOCK_M: tl.constexpr = Q0 * Q1 * Q2
    BLOCK_N: tl.constexpr = K0 * K1 * K2
    # the largest dilation group sets the number of tiles; a smaller one may leave some empty
    tiles0 = tl.cdiv(tl.cdiv(length0, dilation0), Q0)
    tiles1 = tl.cdiv(tl.cdiv(length1, dilation1), Q1)
    tiles2 = tl.cdiv(tl.cdiv(length2, dilation2), Q2)
    pid = tl.program_id(0)
    first0 = (pid // (tiles2 * tiles1)) % tiles0 * Q0
    first1 = (pid // tiles2) % tiles1 * Q1
    first2 = pid % tiles2 * Q2
    pid = pid // (tiles0 * tiles1 * tiles2)
    group2 = pid % dilation2
    group1 = (pid // dilation2) % dilation1
    group0 = (pid // (dilation2 * dilation1)) % dilation0
    pid_head = pid // (dilation0 * dilation1 * dilation2)
    off_b = (pid_head // heads).to(tl.int64)
    off_h = (pid_head % heads).to(tl.int64)
    off_g = off_h // heads_per_key_head
    size0 = tl.cdiv(length0 - group0, dilation0)
    size1 = tl.cdiv(length1 - group1, dilation1)
    size2 = tl.cdiv(length2 - group2, dilation2)

    in_q = tl.arange(0, BLOCK_M)
    at0, at1, at2 = first0 + in_q // (Q2 * Q1), first1 + in_q // Q2 % Q1, first2 + in_q % Q2
    is_query = (at0 < size0) & (at1 < size1) & (at2 < size2)
    window0 = (kernel0, run0, phase0)
    window1 = (kernel1, run1, phase1)
    window2 = (kernel2, run2, phase2)
    start0, end0 = _window(at0, size0, window0, CAUSAL0, TRUNCATED0)
    start1, end1 = _window(at1, size1, window1, CAUSAL1, TRUNCATED1)
    start2, end2 = _window(at2, size2, window2, CAUSAL2, TRUNCATED2)
    low0, high0, inner0, outer0 = _ranges(first0, size0, window0, Q0, CAUSAL0, TRUNCATED0)
    low1, high1, inner1, outer1 = _ranges(first1, size1, window1, Q1, CAUSAL1, TRUNCATED1)
    low2, high2, inner2, outer2 = _ranges(first2, size2, window2, Q2, CAUSAL2, TRUNCATED2)

    off_d = tl.arange(0, BLOCK_D)
    mask_d = off_d < HEAD_DIM
    x0 = (at0 * dilation0 + group0).to(tl.int64)
    x1 = (at1 * dilation1 + group1).to(tl.int64)
    x2 = (at2 * dilation2 + group2).to(tl.int64)
    q_rows = q_ptr + off_b * stride_qb + off_h * stride_qh
    q_rows += x0 * stride_q0 + x1 * stride_q1 + x2 * stride_q2
    mask_q = is_query[:, None] & mask_d[None, :]
    q = tl.load(q_rows[:, None] + off_d[None, :], mask=mask_q, other=0.0)
    k_ptr += off_b * stride_kb + off_g * stride_kh
    k_ptr += group0.to(tl.int64) * stride_k0 + group1.to(tl.int64) * stride_k1
    k_ptr += group2.to(tl.int64) * stride_k2
    v_ptr += off_b * stride_vb + off_g * stride_vh
    v_ptr += group0.to(tl.int64) * stride_v0 + group1.to(tl.int64) * stride_v1
    v_ptr += group2.to(tl.int64) * stride_v2

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    # 0, or NaN where a query is not finite: scores of -inf alone would look like no key
    total = tl.sum(q.to(tl.float32) * 0.0, 1)
    in_k = tl.arange(0, BLOCK_N)
    in_k0, in_k1, in_k2 = in_k // (K2 * K1), in_k // K2 % K1, in_k % K2

    # key boxes start at the union of the windows, so that aligned windows need no mask at all
    from0, to0 = tl.cdiv(inner0 - low0, K0), tl.maximum(outer0 - low0, 0) // K0
    from1, to1 = tl.cdiv(inner1 - low1, K1), tl.maximum(outer1 - low1, 0) // K1
    from2, to2 = tl.cdiv(inner2 - low2, K2), tl.maximum(outer2 - low2, 0) // K2
    full0, full1, full2 = (
        tl.maximum(to0 - from0, 0),
        tl.maximum(to1 - from1, 0),
        tl.maximum(to2 - from2, 0),
    )
    for i in range(0, full0 * full1 * full2):
        key0 = low0 + (from0 + i // (full2 * full1)) * K0 + in_k0
        key1 = low1 + (from1 + i // full2 % full1) * K1 + in_k1
        key2 = low2 + (from2 + i % full2) * K2 + in_k2
        k_rows, v_rows = _rows(
            (key0 * dilation0, key1 * dilation1, key2 * dilation2),
            (k_ptr, stride_k0, stride_k1, stride_k2), (v_ptr, stride_v0, stride_v1, stride_v2),
        )  # fmt: skip
        k = tl.load(k_rows[None, :] + off_d[:, None], mask=mask_d[:, None], other=0.0)
        v = tl.load(v_rows[:, None] + off_d[None, :], mask=mask_d[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee")
        acc, peak, total = add_scores(acc, peak, total, scores * scale_log2, v)
    all1, all2 = tl.cdiv(high1 - low1, K1), tl.cdiv(high2 - low2, K2)
    for i in range(0, tl.cdiv(high0 - low0, K0) * all1 * all2):
        box0, box1, box2 = i // (all2 * all1), i // all2 % all1, i % all2
        is_full = (box0 >= from0) & (box0 < to0) & (box1 >= from1) & (box1 < to1)
        if not (is_full & (box2 >= from2) & (box2 < to2)):
            key0 = low0 + box0 * K0 + in_k0
            key1 = low1 + box1 * K1 + in_k1
            key2 = low2 + box2 * K2 + in_k2
            is_key = (key0 < high0) & (key1 < high1) & (key2 < high2)
            seen = (key0[None, :] >= start0[:, None]) & (key0[None, :] < end0[:, None])
            seen &= (key1[None, :] >= start1[:, None]) & (key1[None, :] < end1[:, None])
            seen &= (key2[None, :] >= start2[:, None]) & (key2[None, :] < end2[:, None])
            k_rows, v_rows = _rows(
                (key0 * dilation0, key1 * dilation1, key2 * dilation2),
                (k_ptr, stride_k0, stride_k1, stride_k2), (v_ptr, stride_v0, stride_v1, stride_v2),
            )  # fmt: skip
            inside = is_key[None, :] & mask_d[:, None]
            k = tl.load(k_rows[None, :] + off_d[:, None], mask=inside, other=0.0)
            inside = is_key[:, None] & mask_d[None, :]
            v = tl.load(v_rows[:, None] + off_d[None, :], mask=inside, other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * scale_log2
            scores = tl.where(seen & is_key[None, :], scores, float("-inf"))
            acc, peak, total = add_scores(acc, peak, total, scores, v)
    if HAS_EXTRA:
        extra_k_ptr += off_b * stride_ekb + off_g * stride_ekh
        extra_v_ptr += off_b * stride_evb + off_g * stride_evh
        for begin in range(0, extra, BLOCK_N):
            number = (begin + in_k).to(tl.int64)
            is_key = number < extra
            if HAS_EXTRA_MASK:
                mask_ptrs = extra_mask_ptr + off_b * extra + number
                is_key &= tl.load(mask_ptrs, mask=is_key, other=0) != 0
            inside = is_key[None, :] & mask_d[:, None]
            k_ptrs = extra_k_ptr + number[None, :] * stride_ekn + off_d[:, None]
            k = tl.load(k_ptrs, mask=inside, other=0.0)
            inside = is_key[:, None] & mask_d[None, :]
            v_ptrs = extra_v_ptr + number[:, None] * stride_evn + off_d[None, :]
            v = tl.load(v_ptrs, mask=inside, other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * scale_log2
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            acc, peak, total = add_scores(acc, peak, total, scores, v)

    divisor = tl.where(total == 0, 1.0, total)
    token = ((off_b * length0 + x0) * length1 + x1) * length2 + x2
    row = token * heads + off_h
    o_ptrs = o_ptr + row[:, None] * HEAD_DIM + off_d[None, :]
    tl.store(o_ptrs, (acc / divisor[:, None]).to(o_ptr.dtype.element_ty), mask=mask_q)
    if HAS_LSE:
        lse = tl.where(total == 0, float("-inf"), (peak + tl.log2(divisor)) * 0.6931471805599453)
        tl.store(lse_ptr + row, lse, mask=is_query)


@triton.jit
def _window(at, size, window, CAUSAL: tl.constexpr, TRUNCATED: tl.constexpr):
    """First and one past the last key of queries; queries beyond the group take its last.

    `window` is (keys, queries that share them, phase).
    """
    kernel, run, phase = window
    at = tl.minimum(at, size - 1)
    shared = at - (at + phase) % run
    if CAUSAL:
        leader = tl.minimum(shared + run - 1, size - 1)
        start = tl.maximum(leader - kernel + 1, 0)
        end = at + 1
    elif TRUNCATED:
        end = shared + run // 2 - kernel // 2 + kernel
        start = tl.maximum(end - kernel, 0)
        end = tl.minimum(end, size)
    else:
        leader = tl.minimum(shared + run // 2, size - 1)
        start = tl.minimum(tl.maximum(leader - kernel // 2, 0), size - kernel)
        end = start + kernel
    return start, end


@triton.jit
def _ranges(
    first, size, window, COUNT: tl.constexpr, CAUSAL: tl.constexpr, TRUNCATED: tl.constexpr
):
    """Of COUNT queries: the union of their windows, and what all of them see."""
    low, least = _window(first, size, window, CAUSAL, TRUNCATED)
    most, high = _window(first + COUNT - 1, size, window, CAUSAL, TRUNCATED)
    return low, high, most, least


@triton.jit
def _rows(at, keys, values):
    """Pointers to the keys and values at coordinates; both are (pointer, stride per axis)."""
    x0, x1, x2 = at
    k_ptr, stride_k0, stride_k1, stride_k2 = keys
    v_ptr, stride_v0, stride_v1, stride_v2 = values
    x0, x1, x2 = x0.to(tl.int64), x1.to(tl.int64), x2.to(tl.int64)
    k_rows = k_ptr + x0 * stride_k0 + x1 * stride_k1 + x2 * stride_k2
    v_rows = v_ptr + x0 * stride_v0 + x1 * stride_v1 + x2 * stride_v2
    return k_rows, v_rows
