"""The block-sparse study: what it captures, how it measures, and what it reads off curves."""

from dataclasses import replace

import pytest
import torch

from diffaccel.benchmarks.rows import read_rows
from diffaccel.benchmarks.studies.block_sparse import captures, contenders, drawings, layers
from diffaccel.benchmarks.studies.block_sparse.cost import added_cost, added_parts
from diffaccel.benchmarks.studies.block_sparse.curves import error_at, mean_at
from diffaccel.benchmarks.studies.block_sparse.synthetic import KINDS, synthetic
from diffaccel.kernels import dense_attention
from diffaccel.layout import TokenLayout
from diffaccel.methods import FullAttn, SparseAttn
from diffaccel.methods.block_sparse.correctors import CORRECTORS, BlockSummaries
from diffaccel.methods.block_sparse.selectors import SELECTORS, ExpectedError, PooledAttention
from diffaccel.pipelines.embedded import EMBEDDED_IMAGE
from tests.support import tiny_pipelines

GRID = (1, 12, 16)


@pytest.fixture
def call():
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout.image(*GRID[1:], text_before=5)
    tokens = (torch.randn(1, layout.length, 2, 16, generator=generator) for _ in range(3))
    return captures.Captured("drawn", 1, 2, *tokens, layout, 0.5)


def test_density_is_that_of_visual_pairs(call):
    method = SparseAttn(0.5, selector="pooled", corrector="none", block=16, order="raster")
    _, density = layers.attended(method, call)
    assert density == pytest.approx(0.5)  # text, exact everywhere, does not count


def test_the_error_of_a_method_is_that_against_dense_attention(call):
    dense = layers.attended(FullAttn(), call)[0]
    all_rows = dense_attention(call.query, call.key, call.value, scale=call.scale)
    torch.testing.assert_close(dense, all_rows[:, call.layout.visual_slice])
    contender = contenders.Contender(
        "plain", "raster", 16, (0.25, 1.0), contenders.combined("pooled", "none")
    )
    part, whole = layers.errors(call, dense, contender, "image")
    assert part.error > 0.1
    assert whole.error < 1e-6
    assert part.density == pytest.approx(0.25)
    assert whole.density == 1.0


def test_a_stopped_measurement_goes_on(call, tmp_path):
    some = [replace(contenders.reference()[0], block=16, keeps=(0.25, 0.5))]
    layers.measure([call], some, "image", tmp_path, 1)
    path = tmp_path / "drawn.csv"
    first = read_rows(path, layers.CallRow)[0]
    layers.measure([call], some, "image", tmp_path, 2)
    rows = read_rows(path, layers.CallRow)[0]
    assert [row.keep for row in rows] == [0.25, 0.5]
    assert rows[0] == first[0]


def test_the_summary_compares_with_the_default_in_the_same_call():
    def row(source, name, density, error):
        return layers.CallRow(
            "image", source, 0, 0, name, "raster", 64, density, density, error, 0.0
        )

    default, other = contenders.reference()[0], contenders.variants()[0]
    points = ((0.1, 0.04), (0.2, 0.02))
    rows = [row(source, default.name, *point) for source in "ab" for point in points]
    rows += [
        row(source, other.name, *point) for source in "ab" for point in ((0.1, 0.08), (0.2, 0.04))
    ]
    found = {row.contender: row for row in layers.summary(rows, [default, other])}
    assert found[other.name].ratio == pytest.approx(2.0)
    assert found[default.name].ratio == pytest.approx(1.0)
    assert found[default.name].at_10 == pytest.approx(0.04)
    assert found[default.name].calls == 2
    assert found[default.name].at_30 is None
    # Straight between logarithms: half as large from .10 to .20, also from .15 to .30.
    assert found[default.name].at_15 == pytest.approx(0.04 * 0.1 / 0.15)


def test_a_curve_does_not_reach_beyond_its_ends():
    points = [(0.1, 0.4), (0.2, 0.2)]
    assert error_at(points, 0.05) is None
    assert error_at([], 0.05) is None
    assert mean_at([points, [(0.3, 0.1)]], 0.15) is None


def test_costs_are_those_of_the_definition():
    selector = ExpectedError()
    assert added_cost(selector, BlockSummaries(), 64) == pytest.approx(0.049, abs=5e-4)
    assert added_cost(selector, BlockSummaries(value_term=False), 64) == pytest.approx(
        0.0257, abs=5e-4
    )
    assert added_parts(selector, CORRECTORS["variance"], 128) == pytest.approx(
        {"selector": 1 / 128**2, "summaries": 1 / 128, "variance": 1 / 256}
    )
    assert added_cost(PooledAttention(), CORRECTORS["none"], 64) == 1 / (2 * 64**2)


def test_every_selector_meets_every_corrector_in_the_grid():
    found = {each.name for each in contenders.grid()}
    assert found == {f"{one} + {other}" for one in SELECTORS for other in CORRECTORS}


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_heads_attend_where_they_are_said_to(kind):
    call = synthetic(kind, 0, (2, 8, 8))
    assert torch.equal(call.query, synthetic(kind, 0, (2, 8, 8)).query)
    scores = torch.einsum("nhd,mhd->hnm", call.query[0], call.key[0]) * call.scale
    weights = scores.softmax(-1)
    largest = weights[0].amax(-1).mean() * weights.shape[-1]
    assert largest > 2.0  # times the mean: not spread evenly
    if kind == "stripes":
        itself = weights[:, :64, :64].diagonal(dim1=1, dim2=2).mean()
        same_place = weights[:, :64, 64:].diagonal(dim1=1, dim2=2).mean()
        assert same_place > 0.4 * itself


def test_a_hook_answers_with_the_method_at_full_size_alone():
    tiny = tiny_pipelines.flux()
    stock = tiny.sample()
    hooks = {
        "dense": drawings.AnswerAttention(FullAttn(), (1, 8, 12)),
        "other size": drawings.AnswerAttention(FullAttn(), (1, 4, 4)),
        "rounded": drawings.AnswerAttention(FullAttn(), (1, 8, 12), rounds=True),
    }
    found = {}
    for name, hook in hooks.items():
        with captures.hooked(tiny.pipe.transformer, hook):
            found[name] = tiny.sample()
    torch.testing.assert_close(found["dense"], stock)
    assert torch.equal(found["other size"], stock)
    assert 1e-5 < (found["rounded"] - stock).abs().max() < 0.1
    assert hooks["dense"].densities == [1.0] * 4 * tiny.calls
    assert hooks["dense"].seconds > 0.0
    assert not hooks["other size"].densities


@pytest.mark.slow
@pytest.mark.skipif(not EMBEDDED_IMAGE.is_dir(), reason="the embedded model has not been made")
def test_every_layer_of_the_chosen_steps_is_captured_once():
    drawing = captures.Drawing("a red apple", (384, 320), (1,))
    pipe = captures.pipeline_for(drawing)
    calls = captures.capture(pipe, drawing)
    blocks = pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks
    assert [call.layer for call in calls] == list(range(sum(map(len, blocks))))
    assert {call.step for call in calls} == {1}
    assert {call.layout.grid for call in calls} == {(1, 20, 24)}
    assert not pipe.transformer._forward_pre_hooks
