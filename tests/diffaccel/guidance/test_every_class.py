"""Guidance on every bound class, against stock attention that is damaged or guided by hand."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from functools import cache, partial
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from tiny_models import MODELS
from tiny_models.base import asking

from diffaccel import (
    HeadPerturbation,
    NormalizedAttention,
    PermuteTokens,
    SkipLayers,
    set_guidance,
)
from diffaccel.attach.state import state_of
from diffaccel.bindings import binding_of
from diffaccel.errors import ModelError

pytestmark = pytest.mark.usefixtures("one_thread")
SCALE = 3.0
UNGUIDED = [name for name, build in MODELS.items() if binding_of(build().model).unguided]
GUIDED = [name for name in MODELS if name not in UNGUIDED]
BATCHED = [name for name in GUIDED if binding_of(MODELS[name]().model).batches_prompts]
STORING = ["Flux2Transformer2DModel:cached", "Flux2Transformer2DModel:caching"]
STORING += ["GlmImageTransformer2DModel:editing"]
NOT_DOUBLED = ["ConsisIDTransformer3DModel", "EasyAnimateTransformer3DModel:inpaint"]
NOT_DOUBLED += ["HunyuanVideoFramepackTransformer3DModel:one"]
"""What `doubled` does not know to put in a batch twice."""
MASKS = ("encoder_hidden_states_mask", "attention_mask", "encoder_attention_mask")


def takes_two_prompts(name):
    """Whether text and image attend jointly, and a call may have rows of another prompt."""
    model = MODELS[name]().model
    binding = binding_of(model)
    arguments = inspect.signature(type(model).forward).parameters
    kinds = {layer.kind for layer in binding.layers(model)}
    apart = binding.one_prompt or binding.cuts_text or "encoder_hidden_states" not in arguments
    return "joint" in kinds and not apart


JOINT = [
    name for name in GUIDED if name not in (*STORING, *NOT_DOUBLED) and takes_two_prompts(name)
]


class Held(DiffusionPipeline):
    """A pipeline that calls a tiny model as it is told to."""

    guidance_scale = 1.0
    do_classifier_free_guidance = False

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        scheduler.set_timesteps(2)

    @torch.no_grad()
    def __call__(self, arguments):
        output = self.transformer(**arguments, return_dict=False)
        return output if isinstance(output, torch.Tensor) else output[0]


class HeldTwice(Held):
    """The same, the negative prompt first in each batch."""

    do_classifier_free_guidance = True


def held(tiny, kind=Held):
    return kind(tiny.model, FlowMatchEulerDiscreteScheduler())


def damaged_at(tiny, name):
    return tiny.attending(itself, {re.escape(name): tiny._layout(name, tiny.layouts)})


def itself(plain, query, key, value, mask, layout):
    """Every token sees itself alone."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    count = query.shape[-2]
    return value if count == layout.length else value[:, :, asking(layout, count)]


@pytest.mark.parametrize("name", GUIDED)
def test_perturbed_attention_guidance_is_its_formula(name):
    tiny = MODELS[name]()
    layers = binding_of(tiny.model).layers(tiny.model)
    stock = tiny.predict()
    with damaged_at(tiny, layers[-1].name):
        damaged = tiny.predict()
    assert not torch.allclose(damaged, stock, atol=1e-4)
    pipe = held(tiny)
    pag = HeadPerturbation(layers=(len(layers) - 1,))
    with set_guidance(pipe, pag, scale=SCALE) as guidance:
        output = pipe(tiny.arguments)
        assert guidance.report().guided_steps == 1
    expected = stock + SCALE * (stock - damaged)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(pipe(tiny.arguments), stock)


@pytest.mark.parametrize("name", BATCHED)
def test_only_the_rows_of_the_prompt_are_damaged(name):
    """Every argument of a call is cut to these rows, whatever its axes are."""
    tiny = MODELS[name]()
    layers = binding_of(tiny.model).layers(tiny.model)
    stock = tiny.predict()
    with damaged_at(tiny, layers[-1].name):
        damaged = tiny.predict()
    pipe = held(tiny, HeldTwice)
    with set_guidance(pipe, HeadPerturbation(layers=(len(layers) - 1,)), scale=SCALE):
        output = pipe(tiny.arguments)
    expected = stock + SCALE * (stock - damaged)[1:]
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GUIDED)
def test_a_skipped_last_layer_and_a_shared_prefix_fit_every_class(name):
    tiny = MODELS[name]()
    layers = binding_of(tiny.model).layers(tiny.model)
    pipe = held(tiny)
    stock = pipe(tiny.arguments)
    with set_guidance(pipe, SkipLayers((len(layers) - 1,)), scale=SCALE) as guidance:
        output = pipe(tiny.arguments)
        assert guidance.report().guided_steps == 1
    assert output.isfinite().all() and not torch.allclose(output, stock, atol=1e-4)
    assert torch.equal(pipe(tiny.arguments), stock)


@pytest.mark.parametrize("name", UNGUIDED)
def test_what_no_guidance_can_serve_says_why(name):
    tiny = MODELS[name]()
    with pytest.raises(ModelError, match=f"{type(tiny.model).__name__} cannot be guided: "):
        set_guidance(held(tiny), HeadPerturbation(layers=(0,)))
    assert state_of(tiny.model) is None


VISUAL = ("hidden_states", "x", "visual_embed", "vis")
"""Names that visual tokens have in blocks."""


@cache
def layers_of_other_than_tokens(name):
    """Layers whose blocks get more tokens than the truth has, text left out, or images."""
    tiny = MODELS[name]()
    found = set()

    def compare(layer, layout, block, args, kwargs):
        given = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        shape = next(given[key] for key in VISUAL if key in given).shape
        parts = [part.length for part in layout.segments if part.kind != "text"]
        some = (sum(x) for n in range(len(parts)) for x in combinations(parts, n + 1))
        if len(shape) != 3 or shape[1] not in some:
            found.add(layer)

    for layer in binding_of(tiny.model).layers(tiny.model):
        hook = partial(compare, layer.name, tiny._layout(layer.name, tiny.layouts))
        block = tiny.model.get_submodule(layer.block)
        block.register_forward_pre_hook(hook, with_kwargs=True)
    tiny.predict()
    return found


@pytest.mark.parametrize("name", GUIDED)
def test_tokens_are_shuffled_only_where_text_is_apart(name):
    tiny = MODELS[name]()
    ways = [way for way in GUIDED if way.partition(":")[0] == name.partition(":")[0]]
    others = set().union(*map(layers_of_other_than_tokens, ways))
    layers = binding_of(tiny.model).layers(tiny.model)
    pipe = held(tiny)
    stock = pipe(tiny.arguments)
    for layer in layers:
        method = PermuteTokens((layer.index,))
        if layer.name in others:
            with pytest.raises(ModelError, match="visual tokens alone"):
                set_guidance(pipe, method)
        elif layer in (layers[0], layers[-1]):
            with set_guidance(pipe, method, scale=SCALE):
                assert not torch.allclose(pipe(tiny.arguments), stock, atol=1e-4)


def doubled(tiny, negative):
    """The arguments of a call with the negative prompt in a second half, and whose keys count."""
    arguments = dict(tiny.arguments)
    text = arguments["encoder_hidden_states"]
    length, own = text.shape[1], negative.shape[1]
    both = {
        key: torch.cat([x, x]) if isinstance(x, torch.Tensor) and len(x) == 2 else x
        for key, x in arguments.items()
        if key not in ("img_ids", "txt_ids") and not key.startswith("indices_")
    }
    both |= {key: x * 2 for key, x in arguments.items() if isinstance(x, list)}
    filled = F.pad(negative, (0, 0, 0, length - own)).expand(2, -1, -1)
    both["encoder_hidden_states"] = torch.cat([text, filled])
    counts = torch.arange(length) < torch.tensor([length, length, own, own])[:, None]
    for key in MASKS:
        if key in both:
            both[key][2:] = counts[2:].to(both[key].dtype)
    return arguments | both, counts


@pytest.mark.parametrize("name", JOINT)
def test_a_negative_prompt_inside_of_joint_attention_is_its_formula(name):
    tiny = MODELS[name]()
    width = tiny.arguments["encoder_hidden_states"].shape[-1]
    negative = torch.randn(1, 4, width, generator=torch.Generator().manual_seed(9))
    method = NormalizedAttention(negative)
    arguments, counts = doubled(tiny, negative)

    def guided(plain, query, key, value, mask, layout):
        seen = torch.ones(4, layout.length, dtype=torch.bool)
        place = 0
        for segment in layout.segments:
            if segment.kind == "text":
                seen[:, place : place + segment.length] = counts
            place += segment.length
        seen = seen[:, None, None] if mask is None else mask
        output = plain(query, key, value, attn_mask=seen)
        whole = query.shape[-2] == layout.length
        rows = layout.visual_slice if whole else slice(None)
        plus, minus = (half[:, :, rows].transpose(1, 2) for half in output.chunk(2))
        pushed = plus + SCALE * (plus - minus)
        norm, grown = (x.abs().sum((-2, -1), keepdim=True) for x in (plus, pushed))
        limited = pushed * (norm * method.limit / grown).clamp(max=1)
        mixed = (method.blend * limited + (1 - method.blend) * plus).transpose(1, 2)
        output = output.clone()
        output[:, :, rows] = torch.cat([mixed, mixed])
        return output

    with tiny.attending(guided):
        expected = tiny.predict(arguments)[:2]
    pipe = held(tiny)
    stock = pipe(tiny.arguments)
    assert not torch.allclose(expected, stock, atol=1e-3)
    with set_guidance(pipe, method, scale=SCALE):
        torch.testing.assert_close(pipe(tiny.arguments), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["PixArtTransformer2DModel", "LuminaNextDiT2DModel", "Kandinsky3UNet"]
)
def test_the_prompt_itself_as_a_negative_one_beside_it_changes_nothing(name):
    """Cross-attention: the negative text has a mask of its own, whatever its name."""
    tiny = MODELS[name]()
    arguments = {
        key: x[:1] if isinstance(x, torch.Tensor) and len(x) == 2 else x
        for key, x in tiny.arguments.items()
    }
    text = arguments["encoder_hidden_states"]
    mask = next(
        x for key, x in arguments.items() if key in ("encoder_attention_mask", "encoder_mask")
    )
    mask[:, 4:] = 0
    pipe = held(tiny)
    stock = pipe(arguments)
    with set_guidance(pipe, NormalizedAttention(text[:, :4]), scale=SCALE):
        torch.testing.assert_close(pipe(arguments), stock, rtol=1e-3, atol=2e-5)
    with set_guidance(pipe, NormalizedAttention(text[:, 4:]), scale=SCALE):
        assert not torch.allclose(pipe(arguments), stock, atol=1e-4)


@pytest.mark.parametrize(
    "name", [name for name in GUIDED if binding_of(MODELS[name]().model).one_prompt]
)
def test_models_that_cannot_be_called_with_two_prompts_refuse_a_negative_one(name):
    tiny = MODELS[name]()
    with pytest.raises(ModelError, match="NormalizedAttention cannot guide"):
        set_guidance(held(tiny), NormalizedAttention(torch.zeros(1, 4, 8)))


def test_the_damaged_model_keeps_no_keys():
    """Qwen-Image 2.1 keeps the keys of the first step: those of the sound model."""
    tiny = MODELS["QwenImage21Transformer2DModel:references"]()
    stock, guided = QwenImage21KVCache(2), QwenImage21KVCache(2)
    pipe = held(tiny)
    pipe(tiny.arguments | {"kv_cache": stock, "kv_cache_mode": "extract"})
    with set_guidance(pipe, SkipLayers((0,)), scale=SCALE):
        pipe(tiny.arguments | {"kv_cache": guided, "kv_cache_mode": "extract"})
    for mine, theirs in zip(guided.layer_caches, stock.layer_caches, strict=True):
        assert torch.equal(mine.k, theirs.k) and torch.equal(mine.v, theirs.v)


def test_calls_that_keep_keys_for_later_ones_are_left_alone():
    """They predict nothing, and keys of the damaged model would be kept beside the sound ones."""
    tiny = MODELS["GlmImageTransformer2DModel"]()
    pipe, kept = held(tiny), []
    for scale in (0.0, SCALE):
        cache = GlmImageKVCache(2)
        cache.set_mode("write")
        with set_guidance(pipe, SkipLayers((0,)), scale=scale) as guidance:
            pipe({**tiny.arguments, "kv_caches": cache})
            assert guidance.report().steps == 0
        kept.append([torch.cat([*layer.k_caches, *layer.v_caches]) for layer in cache.caches])
    assert all(map(torch.equal, *kept))
    tiny = MODELS["AnyFlowFARTransformer3DModel:first"]()
    pipe, kept = held(tiny), []
    for scale in (0.0, SCALE):
        arguments = deepcopy(tiny.arguments)
        arguments["kv_cache_flag"]["is_cache_step"] = True
        with set_guidance(pipe, SkipLayers((0,)), scale=scale):
            pipe(arguments)
        kept.append([x for layer in arguments["kv_cache"] for x in layer.values()])
    assert all(map(torch.equal, *kept))
    assert not torch.equal(kept[0][0], tiny.arguments["kv_cache"][0]["full_cache"])


@pytest.mark.parametrize("length", [0, 1])
def test_what_later_stages_change_in_place_is_shared_as_it_was(length):
    """The blocks of ControlNet-XS that go up add to what the middle has returned."""
    tiny = MODELS["UNetControlNetXSModel"]()
    layers = binding_of(tiny.model).layers(tiny.model)
    first = next(x for x in layers if x.name.startswith(f"up_blocks.{length}"))
    pipe = held(tiny)
    with set_guidance(pipe, HeadPerturbation(layers=(first.index,)), scale=SCALE):
        shared = pipe(tiny.arguments)
    stock = tiny.predict()
    with damaged_at(tiny, first.name):
        expected = stock + SCALE * (stock - tiny.predict())
    torch.testing.assert_close(shared, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STORING)
def test_keys_that_are_kept_for_the_rows_of_a_run_refuse_a_negative_prompt(name):
    tiny = MODELS[name]()
    width = tiny.arguments["encoder_hidden_states"].shape[-1]
    pipe = held(tiny)
    with set_guidance(pipe, NormalizedAttention(torch.zeros(1, 4, width))):
        with pytest.raises(ModelError, match="keys that are kept for its rows"):
            pipe(tiny.arguments)
