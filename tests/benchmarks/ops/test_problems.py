"""Shapes, random tensors and lists: what the kernel benchmark measures on."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

import diffaccel.benchmarks
from diffaccel import RectifiedSpaAttn, SparseAttn
from diffaccel.benchmarks.ops.block_lists import BlockPlan, kept_pairs, random_plan
from diffaccel.benchmarks.ops.competitors.other_sparse import flex_mask
from diffaccel.benchmarks.ops.problems import draw_inputs, draw_problem
from diffaccel.benchmarks.ops.run import OPS
from diffaccel.benchmarks.ops.shapes import SHAPES, Shape
from diffaccel.benchmarks.ops.windows import window_for, window_mask, window_pairs
from diffaccel.kernels import reference
from diffaccel.methods.block_sparse.order import token_order

TINY = Shape("tiny", (1, 9, 13), 5, 2, 32)  # 117 tokens: blocks of 32 are ragged
TINY_VIDEO = Shape("tiny video", (3, 5, 7), 0, 2, 32)


def tiny_problem(density=0.5, shape=TINY):
    return draw_problem(shape, density, 32, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("name", "tokens", "heads", "dim"),
    [
        ("flux-1k", 4096 + 512, 24, 128),
        ("flux-4k", 65536 + 512, 24, 128),
        ("sd3-1k", 4096 + 333, 24, 64),
        ("sdxl-1024", 1024, 20, 64),
        ("wan-1.3b-480p", 32760, 12, 128),
        ("wan-14b-720p", 75600, 40, 128),
        ("hunyuan-720p", 118800, 24, 128),
        ("embedded-4k", 65536 + 32, 4, 64),
    ],
)
def test_shapes_have_the_tokens_of_their_models(name, tokens, heads, dim):
    shape = SHAPES[name]
    assert (shape.layout.length, shape.heads, shape.dim) == (tokens, heads, dim)


def test_inputs_are_repeatable_contiguous_and_of_unit_variance():
    shape = Shape("grid", (1, 24, 24), 7, 2, 64)
    first, second = (draw_inputs(shape, torch.float32, "cpu", seed=3) for _ in range(2))
    for name in ("query", "key", "value", "text_key", "text_value"):
        tensor = getattr(first, name)
        assert torch.equal(tensor, getattr(second, name)), name
        assert tensor.is_contiguous(), name
        assert tensor.std().item() == pytest.approx(1.0, abs=0.05), name
    assert not torch.equal(first.query, first.key)
    assert not torch.equal(first.query, draw_inputs(shape, torch.float32, "cpu", seed=4).query)
    assert torch.equal(first.all_keys[:, :7], first.text_key)


def test_queries_resemble_the_keys_of_their_neighbours():
    """Without it a real selector would have nothing to find, and its lists no locality."""
    inputs = draw_inputs(Shape("grid", (1, 24, 24), 0, 1, 64), torch.float32, "cpu", seed=0)
    query, key = inputs.query[0, :, 0], inputs.key[0, :, 0]
    near = (query[:-1] * key[1:]).sum(-1).mean()
    far = (query[:288] * key[288:]).sum(-1).mean()
    assert near > 20 and far < near / 4


def test_random_lists_ascend_and_have_the_length_of_the_methods():
    problem = tiny_problem(0.6)  # of 4 blocks: 2
    plan = random_plan(problem, seed=1)
    assert plan.counts.eq(2).all() and plan.indices.shape == (1, 2, 4, 2)
    assert (plan.indices.diff(dim=-1) > 0).all()
    assert plan.indices.min() >= 0 and plan.indices.max() <= 3
    assert not torch.equal(plan.indices, random_plan(problem, seed=2).indices)


def test_kept_pairs_of_lists_match_the_mask_of_the_oracle():
    indices = torch.tensor([[[[0, 3, 9], [3, 9, 9], [1, 2, 3], [0, 9, 9]]]], dtype=torch.int32)
    counts = torch.tensor([[[2, 1, 3, 1]]], dtype=torch.int32)
    plan = BlockPlan(indices.clamp(max=3), counts, None, None)
    mask = reference.block_mask(
        plan.indices, counts, block_q=32, block_k=32, queries=117, keys=117
    )
    assert kept_pairs(plan, 117, 0, 32) == mask.sum().item()
    assert kept_pairs(plan, 117, 5, 32) == mask.sum().item() + 117 * 5


@pytest.mark.parametrize("shape", [TINY, TINY_VIDEO], ids=["image", "video"])
def test_windows_match_the_masks_of_the_oracle(shape):
    kernel, stride = window_for(shape, 0.3), (1, 2, 3)
    axes = zip(shape.grid, kernel, stride, strict=True)
    frames, height, width = (reference.neighborhood_mask(*axis).int() for axis in axes)
    whole = torch.kron(torch.kron(frames, height), width).bool()
    rows = torch.tensor([0, 1, 50, shape.visual - 1])
    assert torch.equal(window_mask(shape, kernel, stride)(rows), whole[rows])
    text = shape.heads * shape.visual * shape.text
    assert window_pairs(shape, kernel) == shape.heads * whole.sum().item() + text


@pytest.mark.parametrize("density", [0.05, 0.25, 0.5, 1.0])
def test_windows_have_about_the_density_that_was_asked_for(density):
    for name in ("flux-4k", "wan-14b-720p"):
        kernel, shape = window_for(SHAPES[name], density), SHAPES[name]
        kept = torch.tensor(kernel).prod() / shape.visual
        assert kept.item() == pytest.approx(density, rel=0.1)
        assert all(k <= length for k, length in zip(kernel, shape.grid, strict=True))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (
            "block-sparse",
            SparseAttn(keep=0.5, block=32, order="hilbert", selector="pooled", corrector="none"),
        ),
        (
            "block-rectified",
            RectifiedSpaAttn(drop=0.5, p_remain=0.0, neighbors=False, block=32),
        ),
    ],
)
def test_what_is_timed_is_what_the_method_computes(name, method):
    """The benchmark composes a method's public pieces itself and must not drift from it."""
    problem = tiny_problem(0.5)
    inputs, layout = problem.sets[0], TINY.layout
    output = OPS[name].prepare(problem, inputs).run()
    curve = token_order(TINY.grid, "hilbert", 32)
    text_query = torch.zeros_like(inputs.text_key)
    whole = method.attend(
        torch.cat([text_query, inputs.query], 1), inputs.all_keys, inputs.all_values, layout
    )
    torch.testing.assert_close(output[:, curve.inverse], whole[:, layout.visual_slice])


@pytest.mark.parametrize(("visual", "text"), [(117, 0), (117, 20), (128, 20), (128, 64), (96, 32)])
def test_flex_attention_gets_the_same_pattern(visual, text):
    shape = Shape("flex", (1, 1, visual), text, 2, 16)
    plan = random_plan(draw_problem(shape, 0.5, 32, torch.float32, "cpu"), seed=5)
    mask = flex_mask(plan, visual, text, 32)
    keys = visual + text
    found = torch.zeros(2, visual, keys, dtype=torch.bool)
    for head in range(2):
        for query in range(visual):
            row = (0, head, query // 32)
            full = mask.full_kv_indices[row][: mask.full_kv_num_blocks[row]].tolist()
            partial = mask.kv_indices[row][: mask.kv_num_blocks[row]].tolist()
            assert not set(full) & set(partial)
            for block in full:
                found[head, query, block * 32 : block * 32 + 32] = True
            for block in partial:
                key = torch.arange(block * 32, min(block * 32 + 32, keys))
                found[head, query, key] = mask.mask_mod(torch.tensor(0), head, query, key)
    expected = reference.block_mask(
        plan.indices, plan.counts, block_q=32, block_k=32, queries=visual, keys=visual
    )[0]
    assert torch.equal(found[..., :visual], expected)
    assert found[..., visual:].all()


@pytest.mark.parametrize("room", [".", "studies", "studies/block_sparse"])
def test_no_module_hides_a_package_from_the_scripts_beside_it(room):
    """A file `kernels.py` once broke `python benchmarks/studies/agent_growth.py`.

    Python puts a script's folder first on its path, and transformers probes for a package of
    that name.
    """
    folder = Path(diffaccel.benchmarks.__file__).parent / room
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert "kernels" not in names
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != folder]
    hidden = {
        name
        for name in names
        if name in sys.stdlib_module_names or PathFinder.find_spec(name, elsewhere)
    }
    assert not hidden
