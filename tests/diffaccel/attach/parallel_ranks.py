"""One of several processes that share models by context parallelism; compares with one process.

Usage: python parallel_ranks.py RANK RANKS MEETING_FILE
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
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

from diffaccel.attach.attachment import set_attn_processor  # noqa: E402
from diffaccel.methods import (  # noqa: E402
    FullAttn,
    NeighborhoodAttn,
    RectifiedSpaAttn,
    SparseAttn,
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

    config, plan = ContextParallelConfig(**degrees), PLANS.get(name)
    model.enable_parallelism(config=config, cp_plan=plan)
    is_ring = config.ring_degree > 1
    alone = None if is_ring else output(model, call)
    for method, one, density in zip(METHODS, expected, densities, strict=True):
        attachment = set_attn_processor(model, method)
        close(output(model, call), one)
        layers = attachment.report().layers
        assert all(layer.ranks == RANKS and "heads shared" in str(layer) for layer in layers)
        assert all((layer.sparse_calls == 1) == (method != FullAttn()) for layer in layers)
        close(torch.tensor([layer.density for layer in layers]), torch.tensor(density))
    attachment.remove()
    if alone is None:  # PyTorch's SDPA has no lse for the ring of diffusers
        refused(lambda: output(model, call), "return_lse")
    else:
        assert torch.equal(output(model, call), alone)


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
    for name in ("flux", "sd3", "qwen", "wan2.1", "cogvideox", "ltx"):
        family(name, ulysses)
    family("hunyuan", ulysses, **even)
    for name in ("flux", "qwen", "wan2.1"):
        family(name, ring)


with torch.no_grad():
    main()
torch.distributed.barrier()
# the groups that diffusers made keep threads, at whose end the interpreter aborts now and then
os._exit(0)
