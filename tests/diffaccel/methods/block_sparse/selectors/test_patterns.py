"""Selectors that look at the grid alone, against rules for single tokens."""

import pytest
import torch
from block_calls import all_rows, block_call

from diffaccel.layout import TokenLayout
from diffaccel.methods import RadialAttn, SlidingTileAttn
from diffaccel.methods.block_sparse.block_call import BlockCall
from diffaccel.methods.block_sparse.order import brick_size, token_order
from diffaccel.methods.block_sparse.selectors import (
    PowerDistances,
    RadialWindows,
    SlidingTiles,
    SpatialTemporal,
)
from diffaccel.methods.block_sparse.selectors.svg import _patterns

PATTERNS = {
    "power": PowerDistances(),
    "radial": RadialWindows(),
    "tiles": SlidingTiles((3, 8, 8)),
}
GRIDS = [(5, 12, 10), (3, 7, 9), (1, 11, 13)]


def places(order):
    """Frame, row and column of the tokens of each block."""
    _, height, width = order.grid
    tokens = [
        (i // (height * width), i // width % height, i % width) for i in order.order.tolist()
    ]
    return [tokens[i : i + order.block] for i in range(0, len(tokens), order.block)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["raster", "hilbert", "brick", "columns"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_holds_the_own_block_and_tells_its_share(pattern, name, grid):
    order = token_order(grid, name, 16)
    pairs = pattern.pairs(order)
    assert pairs.shape == (order.blocks, order.blocks) and pairs.diagonal().all()
    assert pattern.share(order) == pytest.approx(pairs.double().mean().item())


def test_power_distances():
    order = token_order((1, 16, 40), "raster", 16)
    pairs = PowerDistances(window=3, sinks=2).pairs(order)
    for n in range(40):
        for m in range(40):
            expected = abs(n - m) in (0, 1, 2, 3, 4, 8, 16, 32) or m < 2
            assert pairs[n, m] == expected


@pytest.mark.parametrize("tile", [(2, 4, 4), (1, 3, 5), None])
@pytest.mark.parametrize("name", ["raster", "hilbert", "brick"])
def test_sliding_tiles_hold_all_tokens_of_the_window_of_any_token(name, tile):
    order, window = token_order((5, 12, 10), name, 16), (3, 9, 12)
    pairs = SlidingTiles(window, tile).pairs(order)
    side = tile or brick_size(order.grid, 16)
    counts = [-(-n // s) for n, s in zip(order.grid, side, strict=True)]
    radius = [max(0, round((w / s - 1) / 2)) for w, s in zip(window, side, strict=True)]

    def sees(query, key):
        for q, k, s, r, count in zip(query, key, side, radius, counts, strict=True):
            center = min(max(q // s, r), max(r, count - 1 - r))
            if abs(center - k // s) > r:
                return False
        return True

    blocks = places(order)
    for n in range(0, len(blocks), 7):
        for m in range(len(blocks)):
            assert pairs[n, m] == any(sees(q, k) for q in blocks[n] for k in blocks[m])


def test_a_window_as_large_as_the_grid_is_dense_and_says_so():
    layout = TokenLayout.video(5, 12, 10)
    assert SlidingTileAttn(block=16).shape_reason(layout)
    assert SlidingTileAttn((1, 4, 4), block=16).shape_reason(layout) == ""


def test_radial_windows_halve_as_the_distance_doubles():
    order = token_order((9, 8, 16), "raster", 16)
    selector = RadialWindows(decay=1.0, sink=False)
    reach = selector._reach(9, 128, 16)
    assert reach.tolist() == [128, 128, 64, 64, 32, 32, 32, 32, 16]
    narrow = RadialWindows(decay=0.25)._reach(9, 128, 16)
    # nominal widths 16, 8 and 4 of blocks of 16: every distance, every second, every fourth
    assert narrow.tolist() == [128, 128, 16, 16, 16, 0, 16, 0, 16]
    pairs = selector.pairs(order)
    token = torch.arange(9 * 128)
    apart = (token[:, None] // 128 - token // 128).abs()
    is_near = (token[:, None] % 128 - token % 128).abs() < reach[apart]
    share = is_near.float().view(72, 16, 72, 16).mean((1, 3))
    is_clear = (share - 0.2).abs() > 0.1  # half of the tokens of a block are looked at
    assert torch.equal(pairs[is_clear], share[is_clear] > 0.2) and is_clear.float().mean() > 0.7


def test_radial_frames_next_to_each_other_and_the_first_are_seen_whole():
    order = token_order((9, 8, 16), "raster", 16)  # 8 blocks per frame
    pairs = RadialWindows(decay=0.01).pairs(order)
    frame = torch.arange(72) // 8
    near = (frame[:, None] - frame).abs() <= 1
    assert pairs[near].all() and pairs[:, :8].all()
    assert pairs.float().mean() < RadialWindows(decay=1.0).pairs(order).float().mean()
    without = RadialWindows(decay=0.01, sink=False).pairs(order)
    assert not without[40:, :8].all()


def test_radial_attention_of_an_image_is_dense_and_says_so():
    assert RadialAttn(block=16).shape_reason(TokenLayout.image(16, 20))
    assert RadialAttn(block=16).shape_reason(TokenLayout.video(9, 16, 20)) == ""


def video_call(looks_at):
    """Head h attends to tokens of its frame ("frame") or of its place ("place")."""
    frames, height, width, dim = 4, 8, 8, 48
    order = token_order((frames, height, width), "raster", 16)
    base = block_call(tokens=256, text=0, batch=1, heads=len(looks_at), dim=dim)
    generator = torch.Generator().manual_seed(0)
    frame = torch.nn.functional.one_hot(torch.arange(frames), dim).float()
    place = torch.zeros(height * width, dim)
    place[:, 4:] = torch.nn.functional.normalize(
        torch.randn(height * width, dim - 4, generator=generator), dim=-1
    )
    for head, name in enumerate(looks_at):
        codes = frame.repeat_interleave(64, 0) if name == "frame" else place.repeat(frames, 1)
        base.visual.query[0, :, head] = base.visual.key[0, :, head] = 9 * codes
    return BlockCall(base.visual, base.exact, order, base.statistics, base.position)


def test_heads_choose_the_pattern_that_errs_less():
    call = video_call(["frame", "place", "frame"])
    selector = SpatialTemporal(keep=0.25, rows=64)
    spatial, temporal = _patterns(selector, call.order, torch.device("cpu"))
    score = selector.score(all_rows(call))
    assert torch.equal(score[0, 0], spatial) and torch.equal(score[0, 2], spatial)
    assert torch.equal(score[0, 1], temporal)
    frame, row = torch.arange(16) // 4, torch.arange(16) % 4
    assert torch.equal(spatial > 0, frame[:, None] == frame)
    assert torch.equal(temporal > 0, row[:, None] == row)


@pytest.mark.parametrize("grid", GRIDS)
def test_both_patterns_of_a_head_keep_what_was_asked_for_and_the_own_block(grid):
    order = token_order(grid, "raster", 16)
    selector = SpatialTemporal(keep=0.3)
    for pattern in _patterns(selector, order, torch.device("cpu")):
        assert (pattern > 0).sum(-1).unique().tolist() == [max(1, int(0.3 * order.blocks))]
        assert (pattern.diagonal() == 1).all()
    assert selector.share(order) == max(1, int(0.3 * order.blocks)) / order.blocks
