"""Methods beside the caches of diffusers and cache-dit, on every family that a cache runs on."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from cached_pipelines import DIT, PAIRS, RUNS, STEPS, Cached

from diffaccel import FullAttn, HeadPerturbation, SparseAttn, set_attn_processor, set_guidance
from diffaccel.attach.caches import CACHES, caches_bypassed, caches_of

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())


class Watch:
    """What the layers and denoisers of a pipeline did, seen at their projections.

    Attributes:
        calls: (denoiser, layer, step of the pipeline) of each attention computed.
        steps: Denoiser -> steps in which it was called.
        layers: Denoiser -> its layers that a method serves, in their order.
    """

    def __init__(self, cached: Cached) -> None:
        self._cached = cached
        self._step = 0
        self.calls: list[tuple[str, str, int]] = []
        self.steps: dict[str, set[int]] = {}
        with set_attn_processor(cached.tiny.pipe, FullAttn()) as attachment:
            parts = attachment.report().denoisers
        self.layers = {part.component: [layer.name for layer in part.layers] for part in parts}
        for component, model in cached.tiny.denoisers().items():
            self.steps[component] = set()
            model.register_forward_pre_hook(self._called(component))
            for layer in self.layers[component]:
                projection = model.get_submodule(layer).to_q
                projection.register_forward_hook(self._computed(component, layer))

    def sample(self) -> torch.Tensor:
        """Draws, watched from the start."""
        self._step = 0
        self.calls.clear()
        for steps in self.steps.values():
            steps.clear()
        return self._cached.sample(callback_on_step_end=self._next)

    def _next(self, pipe, step, timestep, kwargs):
        self._step = step + 1
        return kwargs

    def _called(self, component):
        return lambda *_: self.steps[component].add(self._step)

    def _computed(self, component, layer):
        return lambda *_: self.calls.append((component, layer, self._step))


def assert_reported(report, watch):
    """The report has the calls that happened and no other, and every step of the scheduler."""
    happened = Counter(call[:2] for call in watch.calls)
    for denoiser in report.denoisers:
        steps = watch.steps[denoiser.component]
        first = min(steps)  # the second transformer of Wan 2.2 counts from where it begins
        busy = {step for component, _, step in watch.calls if component == denoiser.component}
        assert denoiser.steps == len(steps)
        assert denoiser.idle_steps == tuple(sorted(step - first for step in steps - busy))
        for layer in denoiser.layers:
            called = layer.sparse_calls + sum(layer.dense_calls.values())
            assert called == happened[denoiser.component, layer.name]


@pytest.mark.parametrize(("name", "cache"), PAIRS)
def test_a_method_and_a_cache_do_what_each_does(name, cache, watched):
    with Cached(name, cache) as cached:
        watch = Watch(cached)
        plain = watch.sample()
        everything = len(watch.calls)
        cached.enable()
        stock = watch.sample()
        computed = list(watch.calls)
        assert not torch.equal(stock, plain) and len(computed) < everything
        assert all(caches_of(model) == {cache} for model in cached.tiny.denoisers().values())

        with set_attn_processor(cached.tiny.pipe, FullAttn()) as attachment:
            for _ in range(2):
                assert torch.equal(watch.sample(), stock)
                assert watch.calls == computed
                assert_reported(attachment.report(), watch)
            cached.disable()
            assert torch.equal(watch.sample(), plain) and len(watch.calls) == everything
            assert_reported(attachment.report(), watch)
            cached.enable()
            assert torch.equal(watch.sample(), stock)

        with set_attn_processor(cached.tiny.pipe, SPARSE) as attachment:
            sparse = watch.sample()
            assert watch.calls == computed and not torch.equal(sparse, stock)
            assert sum(layer.sparse_calls for layer in attachment.report().layers) == len(computed)
            assert_reported(attachment.report(), watch)
            assert torch.equal(watch.sample(), sparse)

        with set_attn_processor(cached.tiny.pipe, watched):
            watch.sample()
        first = {component: min(steps) for component, steps in watch.steps.items()}
        assert [(call.layer, call.step) for call in watched.calls] == [
            (watch.layers[part].index(layer), step - first[part]) for part, layer, step in computed
        ]
        assert torch.equal(watch.sample(), stock)


@pytest.mark.parametrize(("name", "cache"), [("flux", "mag_cache"), ("wan2.1", "sea_cache")])
def test_dense_steps_are_those_of_the_scheduler(name, cache):
    with Cached(name, cache) as cached:
        watch = Watch(cached)
        cached.enable()
        method = SparseAttn(keep=0.5, block=16, dense_steps=STEPS - 1, dense_layers=())
        with set_attn_processor(cached.tiny.pipe, method) as attachment:
            watch.sample()
            (denoiser,) = attachment.report().denoisers
        late = [call for call in watch.calls if call[2] == STEPS - 1]
        assert sum(layer.sparse_calls for layer in denoiser.layers) == len(late)
        assert set(denoiser.dense_steps) == {step for _, _, step in watch.calls} - {STEPS - 1}
        assert f"steps without attention: {len(denoiser.idle_steps)}" in str(denoiser)


@pytest.mark.parametrize("cache", RUNS)
def test_a_bypassed_cache_computes_everything_and_comes_back(cache):
    with Cached("flux" if "flux" in RUNS[cache] else "wan2.1", cache) as cached:
        plain = cached.sample()
        cached.enable()
        stock = cached.sample()
        (model,) = cached.tiny.denoisers().values()
        with caches_bypassed(model):
            assert torch.equal(cached.sample(), plain)
        assert torch.equal(cached.sample(), stock)
        cached.disable()
        assert not caches_of(model) and torch.equal(cached.sample(), plain)


@pytest.mark.parametrize("cache", [None, *sorted(RUNS)])
def test_guidance_tells_what_it_ran_again(cache):
    """Beside a cache nothing is shared with the pipeline's own forward."""
    with Cached("flux" if not cache or "flux" in RUNS[cache] else "wan2.1", cache or "") as cached:
        if cache:
            cached.enable()
        last = len(set_attn_processor(cached.tiny.pipe, FullAttn()).report().layers) - 1
        with set_guidance(
            cached.tiny.pipe, HeadPerturbation(layers=(last,)), scale=1.0
        ) as guidance:
            cached.sample()
            report = guidance.report()
        assert report.guided_steps == report.steps == STEPS
        assert report.extra_forwards == pytest.approx(STEPS * report.rerun)
        assert report.rerun == (1.0 if cache else 0.25)


def test_every_cache_of_diffusers_is_known():
    """A new one shows here: it needs a row in `CACHES`, and one in `cached_pipelines`."""
    from diffusers import hooks

    applied = {name.removeprefix("apply_") for name in dir(hooks) if name.startswith("apply_")}
    others = {"group_offloading", "layer_skip", "layerwise_casting"}
    found = {name for name in applied if name.removesuffix("_hook") not in others}
    assert {name for name in found if "parallel" not in name} == CACHES
    assert {*RUNS, "text_kv_cache"} == {*CACHES, DIT}
