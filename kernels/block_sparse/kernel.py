"""The Triton kernel of block-sparse attention: one program walks the list of one query tile.

Whole tiles of keys come through plain pointers or, on Hopper and later, through tensor
descriptors (TMA): the copy engine computes the addresses and the registers stay free. Tiles that
need a mask come through pointers always, because padding may hold NaN.
"""

# ruff: noqa: ANN001, ANN201, ANN202 (annotations of a jit function mean tl.constexpr)

import triton
import triton.language as tl


@triton.jit
def block_sparse_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    o_ptr,
    lse_ptr,
    tail_ptr,
    indices_ptr,
    counts_ptr,
    key_mask_ptr,
    extra_k_ptr,
    extra_v_ptr,
    extra_mask_ptr,
    row_scale_ptr,
    row_bias_ptr,
    centroid_k_ptr,
    centroid_v_ptr,
    centroid_var_ptr,
    centroid_bias_ptr,
    listed_ptr,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ib,
    stride_ih,
    stride_iq,
    stride_cb,
    stride_ch,
    stride_cq,
    stride_ekb,
    stride_ekn,
    stride_ekh,
    stride_evb,
    stride_evn,
    stride_evh,
    heads,
    queries,
    keys,
    extra,
    max_count,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    HAS_EXTRA_MASK: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_ROW_BIAS: tl.constexpr,
    HAS_CENTROIDS: tl.constexpr,
    HAS_VARIANCE: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_TAIL: tl.constexpr,
    HAS_TMA: tl.constexpr,
):
    """One program computes BLOCK_M queries of one query block of one head."""
    Q_TILES: tl.constexpr = (BLOCK_Q + BLOCK_M - 1) // BLOCK_M
    K_TILES: tl.constexpr = (BLOCK_K + BLOCK_N - 1) // BLOCK_N
    q_blocks = tl.cdiv(queries, BLOCK_Q)
    key_blocks = tl.cdiv(keys, BLOCK_K)
    pid = tl.program_id(0)
    pid_tile = pid % (q_blocks * Q_TILES)
    pid_head = pid // (q_blocks * Q_TILES)
    block_q = pid_tile // Q_TILES
    off_b = (pid_head // heads).to(tl.int64)
    off_h = (pid_head % heads).to(tl.int64)

    in_block = (pid_tile % Q_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    off_n = block_q.to(tl.int64) * BLOCK_Q + in_block
    off_d = tl.arange(0, BLOCK_D)
    mask_d = off_d < HEAD_DIM
    mask_n = (in_block < BLOCK_Q) & (off_n < queries)
    mask_nd = mask_n[:, None] & mask_d[None, :]

    q_ptrs = q_ptr + off_b * stride_qb + off_h * stride_qh + off_n[:, None] * stride_qn
    q = tl.load(q_ptrs + off_d[None, :], mask=mask_nd, other=0.0)
    k_ptr += off_b * stride_kb + off_h * stride_kh
    v_ptr += off_b * stride_vb + off_h * stride_vh
    key_mask_ptr += off_b * keys
    indices_ptr += off_b * stride_ib + off_h * stride_ih + block_q.to(tl.int64) * stride_iq
    count = tl.load(counts_ptr + off_b * stride_cb + off_h * stride_ch + block_q * stride_cq)
    count = tl.minimum(tl.maximum(count, 0), max_count)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    # lists ascend, so only the last block of a row can be the short one
    is_ragged = (BLOCK_K % BLOCK_N != 0) or HAS_KEY_MASK
    plain = 0
    if not is_ragged:
        plain = count
        if (keys % BLOCK_K != 0) & (count > 0):
            last = tl.load(indices_ptr + count - 1)
            plain = tl.where(last >= key_blocks - 1, count - 1, count)
        in_tile = tl.arange(0, BLOCK_N)
        for i in range(0, plain * K_TILES):
            block = _clamp(tl.load(indices_ptr + i // K_TILES), key_blocks)
            start = block * BLOCK_K + (i % K_TILES) * BLOCK_N
            if HAS_TMA:
                k = k_desc.load([off_b.to(tl.int32), start, off_h.to(tl.int32), 0])
                v = v_desc.load([off_b.to(tl.int32), start, off_h.to(tl.int32), 0])
                k = tl.trans(tl.reshape(k, [BLOCK_N, BLOCK_D]))
                v = tl.reshape(v, [BLOCK_N, BLOCK_D])
            else:
                k, v = _load_tile(
                    (k_ptr + start.to(tl.int64) * stride_kn, stride_kn),
                    (v_ptr + start.to(tl.int64) * stride_vn, stride_vn),
                    in_tile, in_tile >= 0, (off_d, mask_d),
                    MASKED=False, EVEN_D=HEAD_DIM == BLOCK_D,
                )  # fmt: skip
            scores = tl.dot(q, k, input_precision="ieee")
            acc, peak, total = _add_products(acc, peak, total, scores, v, scale_log2)
    for i in range(plain * K_TILES, count * K_TILES):
        block = _clamp(tl.load(indices_ptr + i // K_TILES), key_blocks)
        in_tile = tl.arange(0, BLOCK_N)
        start = block.to(tl.int64) * BLOCK_K + (i % K_TILES) * BLOCK_N
        is_key = ((i % K_TILES) * BLOCK_N + in_tile < BLOCK_K) & (start + in_tile < keys)
        if HAS_KEY_MASK:
            is_key &= tl.load(key_mask_ptr + start + in_tile, mask=is_key, other=0) != 0
        k, v = _load_tile(
            (k_ptr + start * stride_kn, stride_kn), (v_ptr + start * stride_vn, stride_vn),
            in_tile, is_key, (off_d, mask_d), MASKED=True, EVEN_D=HEAD_DIM == BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(q, k, input_precision="ieee")
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        acc, peak, total = _add_products(acc, peak, total, scores, v, scale_log2)
    if HAS_EXTRA:
        extra_k_ptr += off_b * stride_ekb + off_h * stride_ekh
        extra_v_ptr += off_b * stride_evb + off_h * stride_evh
        for begin in range(0, extra, BLOCK_N):
            in_tile = tl.arange(0, BLOCK_N)
            is_key = begin + in_tile < extra
            if HAS_EXTRA_MASK:
                mask_ptrs = extra_mask_ptr + off_b * extra + begin + in_tile
                is_key &= tl.load(mask_ptrs, mask=is_key, other=0) != 0
            k, v = _load_tile(
                (extra_k_ptr, stride_ekn), (extra_v_ptr, stride_evn),
                in_tile, is_key, (off_d, mask_d), MASKED=True, EVEN_D=HEAD_DIM == BLOCK_D,
            )  # fmt: skip
            scores = tl.dot(q, k, input_precision="ieee")
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            acc, peak, total = _add_products(acc, peak, total, scores, v, scale_log2)
            extra_k_ptr += BLOCK_N * stride_ekn
            extra_v_ptr += BLOCK_N * stride_evn

    tokens_total = total
    if HAS_CENTROIDS:
        off_block = pid_head.to(tl.int64) * key_blocks
        listed_ptr += (pid_head.to(tl.int64) * q_blocks + block_q) * key_blocks
        q_squared = q
        if HAS_VARIANCE:  # scaled first, since a square may overflow fp16
            scaled = q.to(tl.float32) * (scale_log2 * 0.6931471805599453)
            q_squared = (0.5 * scaled * scaled).to(q.dtype)
        for begin in range(0, key_blocks, BLOCK_C):
            in_tile = begin + tl.arange(0, BLOCK_C)
            is_block = in_tile < key_blocks
            bias_ptrs = centroid_bias_ptr + off_block + in_tile
            bias = tl.load(bias_ptrs, mask=is_block, other=float("-inf"))
            is_listed = tl.load(listed_ptr + in_tile, mask=is_block, other=1) != 0
            bias = tl.where(is_listed, float("-inf"), bias) * 1.4426950408889634
            rows = (off_block + in_tile)[:, None] * HEAD_DIM + off_d[None, :]
            inside = is_block[:, None] & mask_d[None, :]
            k = tl.load(centroid_k_ptr + rows, mask=inside, other=0.0)
            v = tl.load(centroid_v_ptr + rows, mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            if HAS_VARIANCE:
                variance = tl.load(centroid_var_ptr + rows, mask=inside, other=0.0)
                second = tl.dot(q_squared, tl.trans(variance), input_precision="ieee")
                scores += second * 1.4426950408889634
            before = peak
            acc, peak, total = add_scores(acc, peak, total, scores + bias[None, :], v)
            if HAS_TAIL:  # what tokens have of the total follows the peak
                tokens_total *= tl.exp2(before - tl.where(peak == float("-inf"), 0.0, peak))

    # A row that has keys and no weight saw scores of -inf alone: its query is not finite, unless
    # all its keys are masked and all its blocks empty, which only the query tells.
    has_keys = (count > 0) | HAS_EXTRA
    empty = tl.where(has_keys, float("nan"), 1.0)
    if HAS_KEY_MASK or HAS_EXTRA_MASK or HAS_CENTROIDS:
        again = tl.load(q_ptrs + off_d[None, :], mask=mask_nd, other=0.0).to(tl.float32)
        by_query = 1.0 + tl.sum(again * 0.0, 1)
        if HAS_KEY_MASK or HAS_EXTRA_MASK:
            empty = tl.where(has_keys | HAS_CENTROIDS, by_query, 1.0)
        else:
            empty = tl.where(has_keys, float("nan"), by_query)
    is_empty = total == 0
    divisor = tl.where(is_empty, empty, total)
    acc = acc / divisor[:, None]
    off_row = pid_head.to(tl.int64) * q_blocks + block_q
    if HAS_ROW_SCALE:
        acc = acc * tl.load(row_scale_ptr + off_row)
    if HAS_ROW_BIAS:
        bias_ptrs = row_bias_ptr + off_row * HEAD_DIM + off_d
        acc = acc + tl.load(bias_ptrs, mask=mask_d, other=0.0)[None, :]
    off_token = (off_b * queries + off_n) * heads + off_h
    o_ptrs = o_ptr + off_token[:, None] * HEAD_DIM + off_d[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=mask_nd)
    if HAS_LSE:
        # -inf for an empty row; the logarithm of NaN for one that is not finite
        lse_peak = tl.where(is_empty, tl.where(empty == 1.0, float("-inf"), 0.0), peak)
        lse = (lse_peak + tl.log2(divisor)) * 0.6931471805599453
        tl.store(lse_ptr + off_token, lse, mask=mask_n)
    if HAS_TAIL:
        tail = 1.0 - tokens_total / divisor
        tail = tl.where(tail < 0.0, 0.0, tail)  # by comparison, which NaN passes
        tail = tl.where(is_empty, empty - 1.0, tail)  # 0, or NaN where the query is not finite
        tl.store(tail_ptr + off_token, tail, mask=mask_n)


@triton.jit
def add_scores(acc, peak, total, scores, v):
    """Adds keys whose base-2 scores (M, N) are known to the softmax state."""
    peak_new = tl.maximum(peak, tl.max(scores, 1))
    # a row without any key so far has peak = -inf, and -inf - -inf is NaN
    pivot = tl.where(peak_new == float("-inf"), 0.0, peak_new)
    p = tl.exp2(scores - pivot[:, None])
    alpha = tl.exp2(peak - pivot)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, peak_new, total


@triton.jit
def _clamp(block, key_blocks):
    return tl.minimum(tl.maximum(block, 0), key_blocks - 1)


@triton.jit
def _load_tile(
    keys, values, in_tile, is_key, channels, MASKED: tl.constexpr, EVEN_D: tl.constexpr
):
    """Loads keys (D, N) and values (N, D) of one tile through pointers.

    `keys` and `values` are (pointer, stride), `channels` (offsets, mask).
    """
    k_ptr, stride_kn = keys
    v_ptr, stride_vn = values
    off_d, mask_d = channels
    k_ptrs = k_ptr + in_tile[None, :] * stride_kn + off_d[:, None]
    v_ptrs = v_ptr + in_tile[:, None] * stride_vn + off_d[None, :]
    if MASKED:
        k = tl.load(k_ptrs, mask=is_key[None, :] & mask_d[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=is_key[:, None] & mask_d[None, :], other=0.0)
    elif EVEN_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=mask_d[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=mask_d[None, :], other=0.0)
    return k, v


@triton.jit
def _add_products(acc, peak, total, products, v, scale_log2):
    """Adds keys whose products with the queries (M, N) are known; the scale joins the exponent.

    The state is acc (M, D), base-2 peak and total (M,).
    """
    peak_new = tl.maximum(peak, tl.max(products, 1) * scale_log2)
    # a row without any key so far has peak = -inf, and -inf - -inf is NaN
    pivot = tl.where(peak_new == float("-inf"), 0.0, peak_new)
    p = tl.exp2(products * scale_log2 - pivot[:, None])
    alpha = tl.exp2(peak - pivot)
    total = total * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, peak_new, total
