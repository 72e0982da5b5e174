"""Threads: one model serves one run at a time, and nothing is exchanged while it runs."""

from __future__ import annotations

import threading

import pytest
import torch

from diffaccel import (
    FullAttn,
    HeadPerturbation,
    NeighborhoodAttn,
    PermuteTokens,
    SkipLayers,
    SparseAttn,
    restore_attn_processor,
    restore_guidance,
    set_attn_processor,
    set_guidance,
)
from diffaccel.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=1, dense_layers=())
GUIDANCE = {
    "heads": HeadPerturbation(layers=(1,), strength=0.7),
    "skip": SkipLayers((1,)),
    "permute": PermuteTokens((1,)),
}
CHANGES = {
    "set": lambda pipe: set_attn_processor(pipe, FullAttn()),
    "restore": restore_attn_processor,
    "guide": lambda pipe: set_guidance(pipe, GUIDANCE["heads"]),
    "skip": lambda pipe: set_guidance(pipe, GUIDANCE["skip"]),
    "unguide": restore_guidance,
}


def attach(tiny, state):
    """Attaches what a run has: nothing, a method, or guidance."""
    if state in GUIDANCE:
        return set_guidance(tiny.pipe, GUIDANCE[state], scale=2.0)
    return set_attn_processor(tiny.pipe, METHOD, always=True) if state else None


def elsewhere(act):
    """Runs a function in another thread, waits for it, and returns its result or exception."""
    results = []

    def run():
        try:
            results.append(act())
        except Exception as problem:
            results.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


def during(tiny, acts, at):
    """Returns a picture, and what functions gave that another thread called meanwhile.

    Args:
        tiny: The pipeline.
        acts: The functions.
        at: "call": in the middle of the first model call; "run": between two of them.
    """
    results = []

    def meanwhile(*_):
        if not results:
            results.extend(elsewhere(act) for act in acts)

    def between(pipe, step, timestep, inputs):
        meanwhile()
        return inputs

    if at == "run":
        return tiny.sample(callback_on_step_end=between), results
    model = next(iter(tiny.denoisers().values()))
    block = model.transformer_blocks if hasattr(model, "transformer_blocks") else model.down_blocks
    handle = block[0].register_forward_hook(meanwhile)
    try:
        return tiny.sample(), results
    finally:
        handle.remove()


@pytest.mark.parametrize("at", ["call", "run"])
@pytest.mark.parametrize("state", ["", "method", *GUIDANCE])
@pytest.mark.parametrize("name", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_nothing_is_exchanged_while_a_model_runs(tiny_pipelines, name, state, at):
    tiny = tiny_pipelines.BUILDERS[name]()
    attachment = attach(tiny, state)
    expected = tiny.sample()
    changes = [lambda change=change: change(tiny.pipe) for change in CHANGES.values()]
    if attachment is not None:
        changes.append(attachment.remove)
    found, refusals = during(tiny, changes, at)
    assert len(refusals) == len(changes)
    for refusal in refusals:
        assert isinstance(refusal, ModelError) and "runs in another thread" in str(refusal)
    assert torch.equal(found, expected)
    assert torch.equal(tiny.sample(), expected)
    if attachment is not None:
        assert elsewhere(attachment.remove) is None  # another thread may, once it is done
        assert not next(iter(tiny.denoisers().values()))._forward_pre_hooks


@pytest.mark.parametrize("at", ["call", "run"])
@pytest.mark.parametrize("state", ["method", *GUIDANCE])
@pytest.mark.parametrize("name", ["flux", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_run_in_another_thread_is_refused_and_disturbs_none(tiny_pipelines, name, state, at):
    """It has a pipeline of its own, as by `from_pipe`: only the model is shared."""
    tiny, other = (tiny_pipelines.BUILDERS[name]() for _ in range(2))
    for part, model in tiny.denoisers().items():
        setattr(other.pipe, part, model)
    attach(tiny, state)
    expected, others = tiny.sample(), other.sample(seed=3)
    found, (refusal,) = during(tiny, [lambda: other.sample(seed=3)], at)
    assert isinstance(refusal, ModelError) and "one thread at a time" in str(refusal)
    assert torch.equal(found, expected)
    assert torch.equal(elsewhere(lambda: other.sample(seed=3)), others)
    assert torch.equal(tiny.sample(), expected)


def test_a_pipeline_with_two_denoisers_changes_both_or_none(tiny_pipelines):
    tiny = tiny_pipelines.wan22()
    attachment = set_attn_processor(tiny.pipe, METHOD)
    second, refusals = tiny.pipe.transformer_2, []

    def meanwhile(*_):
        refusals.append(elsewhere(lambda: set_attn_processor(tiny.pipe, FullAttn())))

    with torch.no_grad(), second.blocks[0].register_forward_hook(meanwhile):
        second(torch.zeros(1, 16, 3, 8, 12), torch.tensor([500.0]), torch.zeros(1, 16, 32))
    assert isinstance(refusals[0], ModelError)
    assert all("SparseAttn" in part.method for part in attachment.report().denoisers)
    attachment.remove()
    for model in tiny.denoisers().values():
        assert not model._forward_pre_hooks


def test_two_pipelines_run_at_the_same_time(tiny_pipelines):
    plans = {
        "flux": (METHOD, GUIDANCE["heads"]),
        "sdxl": (NeighborhoodAttn(5, dense_steps=0, dense_layers=()), GUIDANCE["skip"]),
    }
    runs, expected = [], []
    for name, (method, perturbation) in plans.items():
        tiny = tiny_pipelines.BUILDERS[name]()
        set_attn_processor(tiny.pipe, method, always=True)
        set_guidance(tiny.pipe, perturbation, scale=2.0)
        runs.append(tiny)
        expected.append(tiny.sample(num_inference_steps=4))
    barrier, found = threading.Barrier(2), {}

    def run(index):
        barrier.wait()
        found[index] = [runs[index].sample(num_inference_steps=4) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, once in enumerate(expected):
        assert all(torch.equal(again, once) for again in found[index])


def test_a_model_serves_two_pipelines_one_after_the_other(tiny_pipelines):
    tiny, other = (tiny_pipelines.flux() for _ in range(2))
    other.pipe.transformer = tiny.pipe.transformer
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    for pipe, steps in ((tiny, 4), (other, 3), (tiny, 2)):
        alone = tiny_pipelines.flux()
        set_attn_processor(alone.pipe, METHOD, always=True)
        found = pipe.sample(num_inference_steps=steps)
        assert torch.equal(found, alone.sample(num_inference_steps=steps))
        (denoiser,) = attachment.report().denoisers
        assert denoiser.steps == steps and list(denoiser.dense_steps) == [0]
