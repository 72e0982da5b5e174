"""Adapters of weights beside a method: loaded, fused, swapped and unloaded around it."""

from __future__ import annotations

import pytest
import torch

from diffaccel import FullAttn, SparseAttn, restore_attn_processor, set_attn_processor

peft = pytest.importorskip("peft", reason="LoRA needs the optional package peft")
pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
QUICK = ("flux",)
FAMILIES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in (
        "flux", "sd3", "qwen", "wan2.1", "wan2.2", "wan2.2-ti2v", "hunyuan", "cogvideox", "ltx",
        "sd15", "sdxl",
    )
]  # fmt: skip


def add(model, name, config, seed):
    """Adds an adapter with weights that act."""
    model.add_adapter(config, adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for path, weight in model.named_parameters():
        if f".{name}" in path:
            noise = torch.randn(weight.shape, generator=generator)
            weight.data = weight.data + 0.3 * noise if "magnitude" in path else 0.3 * noise


def weights(tiny, seed):
    """A LoRA file of the denoisers of a pipeline, made on models of its own."""
    found = {}
    for part, model in tiny.denoisers().items():
        add(model, "made", peft.LoraConfig(r=4, target_modules=LAYERS), seed)
        state = peft.get_peft_model_state_dict(model, adapter_name="made")
        found |= {f"{part}.{name}": weight.clone() for name, weight in state.items()}
    return found


def load(tiny, name, file, **options):
    """Loads a file; that of Wan 2.2 is two, as its pipeline has it."""
    second = {n: w for n, w in file.items() if n.startswith("transformer_2.")}
    first = {n: w for n, w in file.items() if n not in second}
    tiny.pipe.load_lora_weights(first, adapter_name=name, **options)
    if second:
        second = {n.replace("transformer_2.", "transformer."): w for n, w in second.items()}
        tiny.pipe.load_lora_weights(
            second, adapter_name=name, load_into_transformer_2=True, **options
        )


def assert_acts_on_both(tiny, found):
    """A picture of the attached method is that of one attached anew; dense is stock."""
    set_attn_processor(tiny.pipe, FullAttn())
    full = tiny.sample()
    restore_attn_processor(tiny.pipe)
    stock = tiny.sample()
    assert torch.equal(full, stock)
    attachment = set_attn_processor(tiny.pipe, METHOD, always=True)
    assert torch.equal(tiny.sample(), found)
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    return stock


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_comes_and_goes_while_a_method_is_attached(tiny_pipelines, name):
    build = tiny_pipelines.BUILDERS[name]
    one, two = weights(build(), 1), weights(build(), 2)
    tiny = build()
    parts = list(tiny.denoisers())
    plain = tiny.sample()
    pipe = tiny.pipe
    changes = {
        "load": lambda: load(tiny, "one", one),
        "fuse": lambda: pipe.fuse_lora(components=parts),
        "unfuse": lambda: pipe.unfuse_lora(components=parts),
        "load another": lambda: load(tiny, "two", two),
        "weigh": lambda: pipe.set_adapters(["one", "two"], [0.5, 0.7]),
        "disable": lambda: pipe.disable_lora(),
        "enable": lambda: pipe.enable_lora(),
        "delete": lambda: pipe.delete_adapters("two"),
        "swap": lambda: load(tiny, "one", two, hotswap=True),
        "unload": lambda: pipe.unload_lora_weights(),
    }
    if len(parts) > 1:
        del changes["swap"]  # diffusers refuses it: each of the two files looks incomplete
    stock = {}
    set_attn_processor(pipe, METHOD, always=True)
    for change, act in changes.items():
        act()
        stock[change] = assert_acts_on_both(tiny, tiny.sample())

    def differ(one, other):
        return (one - other).norm() > 1e-3 * other.norm()

    for change in ("load", "fuse", "unfuse", "load another", "weigh", "enable", "delete"):
        assert differ(stock[change], plain)
    for change in ("disable", "unload"):
        assert not differ(stock[change], plain)
    assert not differ(stock["fuse"], stock["load"])
    restore_attn_processor(pipe)
    assert torch.equal(tiny.sample(), stock["unload"])


KINDS = {
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, use_rslora=True),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LAYERS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=LAYERS),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LAYERS[:1]),
}


@pytest.mark.parametrize(
    "name", ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("wan2.1", "sd15"))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_adapters(tiny_pipelines, name, kind):
    tiny = tiny_pipelines.BUILDERS[name]()
    plain = tiny.sample()
    set_attn_processor(tiny.pipe, METHOD, always=True)
    for model in tiny.denoisers().values():
        add(model, "made", KINDS[kind](), 1)
    stock = assert_acts_on_both(tiny, tiny.sample())
    assert (stock - plain).norm() > 1e-3 * plain.norm()
    for model in tiny.denoisers().values():
        model.delete_adapters("made")
    assert (assert_acts_on_both(tiny, tiny.sample()) - plain).norm() < 1e-4 * plain.norm()
