"""`check=True`: the first attention output that is not finite is named."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from diffaccel import FullAttn, SparseAttn
from diffaccel.errors import ModelError
from diffaccel.methods.inputs import Attended

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = SparseAttn(keep=0.5, block=16, dense_steps=1, dense_layers=())


class Overflowing(FullAttn):
    """A method at fault itself."""

    __slots__ = ()

    def shape_reason(self, layout):
        return ""

    def compute(self, inputs, position):
        return Attended(inputs.dense() * torch.inf, 1.0)


def poison(tiny, step, part):
    """Makes a projection of the second block give NaN from one step on."""
    calls = []

    def damage(module, args, output):
        calls.append(None)
        return output * torch.nan if len(calls) > step else output

    getattr(tiny.pipe.transformer.transformer_blocks[1].attn, part).register_forward_hook(damage)


@pytest.mark.parametrize("method", [FullAttn(), SPARSE], ids=["full", "sparse"])
@pytest.mark.parametrize("step", [0, 2])
def test_step_and_layer_are_named(tiny_pipelines, method, step):
    tiny = tiny_pipelines.flux()
    poison(tiny, step, "to_k")
    tiny.pipe.set_attn_processor(method, always=True, check=True)
    with pytest.raises(ModelError) as error:
        tiny.sample(num_inference_steps=4)
    assert "transformer_blocks.1.attn has NaN or infinity in its output" in str(error.value)
    assert f"at step {step}, as its key had" in str(error.value)


def test_sound_inputs_are_named_as_such(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    tiny.pipe.set_attn_processor(Overflowing(), always=True, check=True)
    with pytest.raises(ModelError, match="at step 0, though query, key and value do not"):
        tiny.sample()


@pytest.mark.parametrize("name", ["flux", "qwen", "hunyuan", "wan2.1"])
def test_a_sound_run_is_unchanged(tiny_pipelines, name):
    tiny = tiny_pipelines.BUILDERS[name]()
    tiny.pipe.set_attn_processor(SPARSE, always=True)
    expected = tiny.sample()
    tiny.pipe.set_attn_processor(SPARSE, always=True, check=True)
    assert torch.equal(tiny.sample(), expected)


def test_without_the_check_nan_reaches_the_picture(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    poison(tiny, 1, "to_k")
    tiny.pipe.set_attn_processor(SPARSE, always=True)
    assert tiny.sample(num_inference_steps=3).isnan().all()


def test_compiled_layers_are_checked(tiny_pipelines):
    torch._dynamo.reset()
    tiny = tiny_pipelines.flux()
    tiny.pipe.set_attn_processor(SPARSE, always=True, check=True)
    tiny.pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    tiny.arguments["prompt_embeds"] = tiny.arguments["prompt_embeds"] * torch.nan
    with pytest.raises(ModelError, match="transformer_blocks.0.attn has NaN or infinity"):
        tiny.sample()
    torch._dynamo.reset()
