"""Where sparse attention would be slower, attached layers run dense and the report says so."""

import pytest
import torch

from diffaccel import (
    AgentAttn,
    FullAttn,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SparseAttn,
    TokenLayout,
    TokenMergingAttn,
    set_attn_processor,
)
from diffaccel.attach import forecast
from diffaccel.kernels import gathered_share
from diffaccel.methods.block_sparse.base import CHOICE_TOKENS

CPU = forecast.DeviceFacts("cpu")
H200 = forecast.DeviceFacts("cuda", capability=(9, 0), multiprocessors=132)


def slower_on_a_cpu(method, layout):
    return forecast.slower_reason(method, layout, (1, layout.length, 1, 8), torch.float32, CPU)


@pytest.mark.parametrize(
    ("method", "pays"),
    [
        (SparseAttn(keep=0.25, block=64, neighbors=False), True),
        (SparseAttn(keep=0.9, block=64, neighbors=False), False),
        (RectifiedSpaAttn(drop=0.8, block=64), True),
        (NeighborhoodAttn(16), True),
        (NeighborhoodAttn(60), False),
        (AgentAttn(), True),
        (TokenMergingAttn(0.5), True),
        (TokenMergingAttn(0.1), False),
    ],
    ids=repr,
)
def test_a_cpu_runs_dense_what_keeps_too_much(method, pays):
    layout = TokenLayout.image(64, 64, text_after=16)
    assert (slower_on_a_cpu(method, layout) == "") == pays


def test_small_shapes_are_left_to_the_method_on_a_cpu():
    layout = TokenLayout.image(32, 32)
    method = SparseAttn(keep=0.95, block=16, neighbors=False)
    assert slower_on_a_cpu(method, layout) == ""


def test_a_method_that_runs_dense_itself_is_not_judged():
    layout = TokenLayout.image(64, 64)
    for method in (FullAttn(), SparseAttn(keep=1.0), NeighborhoodAttn(64)):
        assert method.expected_cost(layout, "cpu") is None
        assert slower_on_a_cpu(method, layout) == ""


def test_the_expected_cost_follows_density_and_text():
    layout, with_text = TokenLayout.image(64, 64), TokenLayout.image(64, 64, text_after=4096)
    method = NeighborhoodAttn(16)
    assert method.expected_cost(layout, "cuda") == pytest.approx(1 / 16 / 0.6)
    assert method.expected_cost(with_text, "cuda") == pytest.approx((1 / 64 + 3 / 4) / 0.6)
    on_cpu = method.expected_cost(layout, "cpu")
    assert on_cpu > 1 / 16 / 0.65  # masked pairs and copies count there
    assert method.expected_cost(with_text, "cpu") == pytest.approx(on_cpu / 4 + 3 / 4 / 0.65)


def test_copies_count_as_pairs_when_windows_are_gathered():
    # tiles of 8 x 8 queries meet 23 x 23 keys, and each key costs 40 products more
    axes = tuple(NeighborhoodAttn(16).axes(TokenLayout.image(256, 256)))
    assert gathered_share(axes) == pytest.approx(23**2 / 256**2 * (1 + 40 / 64))


def test_a_gpu_runs_short_sequences_dense():
    method = RectifiedSpaAttn(drop=0.8)
    for side, pays in ((32, False), (256, True)):
        layout = TokenLayout.image(side, side, text_before=512)
        shape = (1, layout.length, 24, 128)
        reason = forecast.slower_reason(method, layout, shape, torch.bfloat16, H200)
        assert (reason == "") == pays


def test_the_facts_of_this_machine_are_read():
    assert forecast.device_facts(torch.device("cpu")) == CPU


@pytest.mark.usefixtures("one_thread")
def test_an_attached_layer_runs_dense_and_says_so(monkeypatch, tiny_pipelines):
    monkeypatch.setattr(forecast, "CPU_TOKENS", 1)
    monkeypatch.setitem(CHOICE_TOKENS, "cpu", 1.0)  # few tokens are not worth choosing among
    tiny = tiny_pipelines.flux()
    stock = tiny.sample()
    wide = NeighborhoodAttn((7, 11))
    small = SparseAttn(keep=0.1, block=16, selector="pooled", corrector="none")
    with set_attn_processor(tiny.pipe, wide) as attachment:
        assert torch.equal(tiny.sample(), stock)
        for layer in attachment.report().layers:
            assert not layer.sparse_calls and layer.density == 1.0
            assert all("as long as dense attention" in reason for reason in layer.dense_calls)
    for method, always in ((wide, True), (small, False)):
        with set_attn_processor(tiny.pipe, method, always=always) as attachment:
            assert not torch.equal(tiny.sample(), stock)
            assert all(layer.sparse_calls for layer in attachment.report().layers)
