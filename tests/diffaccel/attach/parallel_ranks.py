"""One of several processes that share models by context parallelism; compares with one process.

Usage: python parallel_ranks.py RANK RANKS MEETING_FILE [PART ...]
"""

from __future__ import annotations

import copy
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
RANK, RANKS, MEETING = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ.update(RANK=str(RANK), LOCAL_RANK=str(RANK), WORLD_SIZE=str(RANKS))
sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

import tiny_pipelines  # noqa: E402
import torch  # noqa: E402
from diffusers import ContextParallelConfig  # noqa: E402
from diffusers.models._modeling_parallel import (  # noqa: E402
    ContextParallelInput as Split,
)
from diffusers.models._modeling_parallel import (  # noqa: E402
    ContextParallelOutput as Gather,
)

from diffaccel import (  # noqa: E402
    HeadPerturbation,
    NormalizedAttention,
    PermuteTokens,
    SkipLayers,
    restore_guidance,
    set_attn_processor,
)
from diffaccel.methods import (  # noqa: E402
    FullAttn,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SparseAttn,
    TokenMergingAttn,
)

OPTIONS = {"block": 16, "dense_steps": 0, "dense_layers": ()}
SPARSE = SparseAttn(keep=0.4, **OPTIONS)
METHODS = (
    FullAttn(),
    SPARSE,
    RectifiedSpaAttn(drop=0.7, p_remain=0.4, neighbors=False, first_frame=False, **OPTIONS),
    NeighborhoodAttn(3, dense_steps=0, dense_layers=()),
)

STREAMS = {"hidden_states": Split(1, 3), "encoder_hidden_states": Split(1, 3)}
PLANS: dict[str, Any] = {
    "sd3": {"transformer_blocks.0": STREAMS, "proj_out": Gather(1, 3)},
    "hunyuan": {
        "transformer_blocks.0": STREAMS,
        "rope": {index: Split(0, 2, split_output=True) for index in range(2)},
        "proj_out": Gather(1, 3),
    },
    "cogvideox": {
        "": {"image_rotary_emb": [Split(0, 2)] * 2},
        "transformer_blocks.0": STREAMS,
        "proj_out": Gather(1, 3),
    },
}
"""Plans of models that have none of their own."""


def model_and_call(name: str, **changes: Any) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Returns the denoiser of a tiny pipeline and its first call, for two different prompts."""
    tiny = tiny_pipelines.BUILDERS[name]()
    model, calls = tiny.pipe.transformer, []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    arguments = {**tiny.arguments, **changes}
    prompts = {key: x for key, x in arguments.items() if isinstance(x, torch.Tensor)}
    tiny.sample(**arguments | {key: torch.cat([x, other(x)]) for key, x in prompts.items()})
    handle.remove()
    if name == "ltx":  # diffusers fails here with a mask, which it repeats for each head
        calls[0]["encoder_attention_mask"] = None
    return model, calls[0]


def other(prompt: torch.Tensor) -> torch.Tensor:
    """Another prompt; its mask lets all tokens be seen."""
    return prompt.flip(2) if prompt.is_floating_point() and prompt.ndim == 3 else prompt**0


def output(model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    return model(**{**call, "return_dict": False})[0]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def refused(do: Callable[[], Any], *words: str) -> None:
    try:
        do()
    except Exception as error:  # noqa: BLE001 - of any class; what it says counts
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError(f"nobody refused {words}")


def share(model: torch.nn.Module, name: str = "", **degrees: Any) -> torch.nn.Module:
    """Returns the model after it was split among the ranks."""
    config = ContextParallelConfig(**degrees)
    model.enable_parallelism(config=config, cp_plan=PLANS.get(name))
    return model


def family(name: str, degrees: dict[str, Any], **changes: Any) -> None:
    """Every method gives on two ranks what it gives on one, and is removed without a trace."""
    model, call = model_and_call(name, **changes)
    expected, densities = [], []
    for method in METHODS:
        with set_attn_processor(model, method) as attachment:
            expected.append(output(model, call))
            densities.append([layer.density for layer in attachment.report().layers])
    stock = output(model, call)
    assert torch.equal(stock, expected[0])
    assert all((stock - other).abs().max() > 1e-3 for other in expected[1:])

    reference = share(copy.deepcopy(model), name, **degrees)
    set_attn_processor(model, SPARSE)
    share(model, name, **degrees)
    close(output(model, call), expected[METHODS.index(SPARSE)])
    for method, one, density in zip(METHODS, expected, densities, strict=True):
        attachment = set_attn_processor(model, method, check=True)
        close(output(model, call), one)
        layers = attachment.report().layers
        assert all(layer.ranks == RANKS and "heads shared" in str(layer) for layer in layers)
        assert all((layer.sparse_calls == 1) == (method != FullAttn()) for layer in layers)
        close(torch.tensor([layer.density for layer in layers]), torch.tensor(density))
    attachment.remove()
    if "ring_degree" in degrees:  # PyTorch's SDPA has no lse for the ring of diffusers
        refused(lambda: output(reference, call), "return_lse")
        refused(lambda: output(model, call), "return_lse")
    else:
        assert torch.equal(output(model, call), output(reference, call))


def uneven_heads() -> None:
    """A ring needs no even number of heads, but one for each rank."""
    _, call = model_and_call("wan2.1")
    model = tiny_pipelines.wan_transformer(num_attention_heads=3)
    with set_attn_processor(model, SPARSE):
        expected = output(model, call)
    share(model, ring_degree=RANKS)
    set_attn_processor(model, SPARSE)
    close(output(model, call), expected)

    model = share(tiny_pipelines.wan_transformer(num_attention_heads=1), ring_degree=RANKS)
    set_attn_processor(model, SPARSE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused(lambda: output(model, call), "return_lse")
    assert any("1 heads cannot be shared by 2 ranks" in str(x.message) for x in caught)


def half_precision() -> None:
    model, call = model_and_call("flux")
    model.to(torch.bfloat16)
    call = {
        key: x.bfloat16() if isinstance(x, torch.Tensor) and x.ndim == 3 else x
        for key, x in call.items()
    }
    call["pooled_projections"] = call["pooled_projections"].bfloat16()
    attachment = set_attn_processor(model, SPARSE)
    expected = output(model, call)
    share(model, ulysses_degree=RANKS)
    torch.testing.assert_close(output(model, call), expected, rtol=0.05, atol=0.05)
    assert attachment.report().layers[0].sparse_calls == 2


def what_is_refused() -> None:
    model, call = model_and_call("wan2.1")
    share(model, ulysses_degree=RANKS)
    set_attn_processor(model, TokenMergingAttn())
    refused(lambda: output(model, call), "TokenMergingAttn", "over all heads")
    set_attn_processor(model, SPARSE)
    for processor in model.attn_processors.values():
        processor._parallel_config = None  # layers know of the ranks by the model
    output(model, call)

    # Text that no rank shares would be seen once for each of them.
    model, call = model_and_call("sd3")
    plan = {
        "transformer_blocks.0": {"hidden_states": Split(1, 3)}, "proj_out": Gather(1, 3),
    }  # fmt: skip
    config = ContextParallelConfig(ulysses_degree=RANKS)
    model.enable_parallelism(config=config, cp_plan=plan)
    set_attn_processor(model, SPARSE)
    refused(lambda: output(model, call), "no even share of each stream", "cp_plan")


def gradients() -> None:
    """They come from diffusers, as on one process."""
    model, call = model_and_call("wan2.1")
    share(model, ulysses_degree=RANKS)
    stock = output(model, call)
    attachment = set_attn_processor(model, SPARSE)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = output(model, call)
        found.sum().backward()
    close(found, stock)
    assert model.patch_embedding.weight.grad.abs().max() > 0
    (reason,) = attachment.report().dense_calls
    assert "gradients" in reason


def compiled() -> None:
    model, call = model_and_call("flux")
    with set_attn_processor(model, SPARSE):
        expected = output(model, call)
    share(model, ulysses_degree=RANKS)
    set_attn_processor(model, SPARSE)
    model.compile(backend="aot_eager")
    close(output(model, call), expected)


def guided(name: str, *perturbations: Any) -> None:
    """Guidance gives on two ranks what it gives on one, with a method beside it."""
    one, many = (tiny_pipelines.BUILDERS[name]() for _ in range(2))
    share(many.pipe.transformer, name, ulysses_degree=RANKS)
    for tiny in (one, many):
        tiny.pipe.set_attn_processor(SPARSE)
    for perturbation in perturbations:
        plain = isinstance(perturbation, NormalizedAttention)
        changes = {"guidance_scale": 1.0} if plain else {}
        expected, found = (
            (tiny.pipe.set_guidance(perturbation, scale=2.0), tiny.sample(**changes))[1]
            for tiny in (one, many)
        )
        close(found, expected)
        restore_guidance(one.pipe)
        assert (one.sample(**changes) - expected).abs().max() > 1e-3


def guidance() -> None:
    heads = HeadPerturbation(heads=((0, 0), (1, 1)), strength=0.7)
    image = HeadPerturbation(heads=((1, 0),), scope="image")
    text = tiny_pipelines._random(1, 8, 32, seed=5)
    guided("flux", heads, image, SkipLayers((1,)), NormalizedAttention(text))
    guided("wan2.1", heads, SkipLayers((1,)), NormalizedAttention(text.repeat(1, 2, 1)))
    wan = tiny_pipelines.wan21()
    share(wan.pipe.transformer, ulysses_degree=RANKS)
    for perturbation in (PermuteTokens((1,)), SkipLayers((0,))):
        with wan.pipe.set_guidance(perturbation):
            refused(wan.sample, type(perturbation).__name__, "context parallelism")


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{MEETING}", rank=RANK, world_size=RANKS
    )
    # diffusers counts accelerators before it counts processes.
    torch.accelerator.device_count = lambda: RANKS
    ulysses, ring = {"ulysses_degree": RANKS}, {"ring_degree": RANKS}
    even = {
        "prompt_embeds": tiny_pipelines._random(1, 12, 16),
        "prompt_attention_mask": tiny_pipelines._padded(7, 5),
    }
    odd = {"prompt_embeds": tiny_pipelines._random(1, 11, 32)}
    parts: dict[str, Callable[[], None]] = {
        **{
            name: partial(family, name, ulysses)
            for name in ("flux", "sd3", "qwen", "wan2.1", "cogvideox", "ltx")
        },
        "hunyuan": partial(family, "hunyuan", ulysses, **even),
        "flux, odd": partial(family, "flux", ulysses | {"ulysses_anything": True}, **odd),
        "flux, odd ring": partial(family, "flux", ring | {"ring_anything": True}, **odd),
        "hunyuan, odd": partial(family, "hunyuan", ulysses | {"ulysses_anything": True}),
        "qwen, ring": partial(family, "qwen", ring),
        "wan2.1, ring": partial(family, "wan2.1", ring),
        **{
            part.__name__: part
            for part in (
                uneven_heads, half_precision, what_is_refused, gradients, compiled, guidance,
            )
        },
    }  # fmt: skip
    chosen = sys.argv[4:] or parts
    for name in chosen:
        print(name, flush=True)
        parts[name]()


with torch.no_grad():
    main()
torch.distributed.barrier()
# the groups that diffusers made keep threads, at whose end the interpreter aborts now and then
os._exit(0)
