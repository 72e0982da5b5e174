"""The named combinations: their parts, their knobs, on the command line and on pipelines."""

from importlib import import_module

import pytest
import torch
from block_calls import smooth_tokens
from tiny_pipelines import flux, wan21

import diffaccel
from diffaccel import methods
from diffaccel.cli.options.method_options import knobs_of, parse_method
from diffaccel.layout import TokenLayout
from diffaccel.methods import SparseAttn
from diffaccel.methods.block_sparse.published import PublishedSparseAttn
from diffaccel.methods.names import METHODS

NAMED = {
    name: getattr(import_module(path.partition(":")[0]), path.partition(":")[2])
    for name, path in METHODS.items()
    if "block_sparse" in path and name not in ("sparse", "rectified")
}
SMALL = {
    "hip": {"tokens": 32, "sink": 16, "window": 16},
    "sliding-tile": {"window": (1, 4, 4)},
    "radial": {"decay": 0.01, "sink": False},
    "hyper": {"bucket": 32},
    "flexprefill": {"mass": 0.5, "least": 16},
    "sparge": {"similarity": 0.2},
}
LAYOUT = TokenLayout.video(6, 6, 9, text_before=5)
named = pytest.mark.parametrize("name", NAMED)


def small(name, **knobs):
    """The method with sizes that leave something out of few tokens, all layers sparse."""
    return NAMED[name](**{"block": 16, "dense_layers": 0, **SMALL.get(name, {}), **knobs})


def test_all_published_combinations_have_names():
    # a class with slots is made twice, and both are subclasses
    known = {cls.__name__ for cls in PublishedSparseAttn.__subclasses__()}
    assert {cls.__name__ for cls in NAMED.values()} == known
    for cls in NAMED.values():
        assert getattr(diffaccel, cls.__name__) is cls
        assert getattr(methods, cls.__name__) is cls


@named
def test_a_named_method_is_its_configuration_and_is_built_on_the_command_line(name):
    method = NAMED[name]()
    assert parse_method(name, ()) == method
    assert eval(repr(method), {type(method).__name__: type(method)}) == method
    assert {"order", "block", "corrector", "dense_steps"} <= set(knobs_of(name))
    assert parse_method(name, ("block=32", "corrector=means")).block == 32


@named
def test_a_named_method_is_a_combination_that_sparse_attention_can_make(name):
    tokens = smooth_tokens(LAYOUT, noise=0.2, batch=2)
    method = small(name)
    parts = method.parts()
    made = SparseAttn(
        parts.keep,
        selector=parts.selector,
        budget=parts.budget,
        corrector=parts.corrector,
        block=16,
        order=method.order,
    )
    assert method.shape_reason(LAYOUT) == "" and method.compares_heads == made.compares_heads
    output, density = method.attend_with_density(*tokens, LAYOUT, layer=1)
    assert torch.equal(output, made.attend(*tokens, LAYOUT, layer=1)) and float(density) < 1


@pytest.mark.parametrize(
    ("name", "build"),
    [*((name, wan21) for name in NAMED), *((name, flux) for name in ("sol", "radial", "svg"))],
)
def test_a_named_method_runs_on_a_pipeline_and_leaves_it_as_it_was(name, build):
    tiny = build()
    stock = tiny.sample()
    with tiny.pipe.set_attn_processor(small(name, dense_steps=0), always=True) as attachment:
        changed = tiny.sample()
        report = attachment.report()
    assert changed.isfinite().all()
    layers = [layer for denoiser in report.denoisers for layer in denoiser.layers]
    images_are_dense = build is flux and name == "radial"
    if not images_are_dense:
        assert any(layer.sparse_calls for layer in layers)
    assert torch.equal(tiny.sample(), stock)


@named
def test_any_corrector_goes_with_a_named_method(name):
    query, key, value = smooth_tokens(LAYOUT, noise=0.2)
    constant = value[:, :1].expand_as(value)
    output = small(name, corrector="output").attend(query, key, constant, LAYOUT)
    torch.testing.assert_close(output, constant, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "knobs", "words"),
    [
        ("moba", {"keep": 0.0}, "keep must lie above 0"),
        ("biformer", {"keep": 1.5}, "keep must lie above 0"),
        ("vggt", {"mass": 2.0}, "mass must lie in 0 to 1"),
        ("vmoba", {"ranking": "all"}, "ranking must be one of"),
        ("vmoba", {"threshold": -1.0}, "threshold must lie in 0 to 1"),
        ("sol", {"diagonal": -3}, "diagonal must be at least -1"),
        ("sol", {"tau": "high"}, "tau must be a number"),
        ("radial", {"decay": 0.0}, "decay must be above 0"),
        ("sliding-tile", {"window": (1, 2)}, "window must be three integers"),
        ("sliding-tile", {"tile": (0, 2, 2)}, "tile must be three integers"),
        ("flexprefill", {"divergence": -1.0}, "divergence and least must be at least 0"),
        ("sparge", {"similarity": 3.0}, "similarity must lie in -1 to 1"),
        ("hip", {"tokens": 0}, "tokens must be at least 1"),
        ("hyper", {"projections": 40}, "projections must lie in 1 to 16"),
        ("power", {"window": -1}, "window and sinks must be at least 0"),
        ("svg", {"keep": 0.0}, "keep must lie above 0"),
        ("sub-block", {"key_parts": 3}, "key_parts must be a power of two"),
        ("sub-block", {"corrector": "magic"}, "corrector must be a Corrector or one of"),
        ("power", {"corrector": 3}, "corrector must be a Corrector or one of"),
    ],
)
def test_wrong_knobs_are_refused(name, knobs, words):
    with pytest.raises(ValueError, match=words):
        NAMED[name](**knobs)


def test_sol_attention_takes_a_share_instead_of_tau():
    tokens = smooth_tokens(LAYOUT, noise=0.2)
    method = small("sol", keep=0.2)
    density = float(method.attend_with_density(*tokens, LAYOUT)[1])
    assert density == pytest.approx(method.expected_density(LAYOUT), abs=0.03)
    assert small("sparge", keep=0.2, similarity=-1.0).expected_density(LAYOUT) < 0.3


def test_parts_of_the_schedule_that_authors_run_dense_are_none_of_a_few_steps():
    assert NAMED["vmoba"]().dense_steps == 0.24 and NAMED["sol"]().dense_layers == 2
    method, tokens = NAMED["sub-block"](block=16), smooth_tokens(LAYOUT)
    assert method.attend_with_density(*tokens, LAYOUT)[1] < 1.0
