"""Offloading of weights, by diffusers and by accelerate, before and after a method is attached."""

from __future__ import annotations

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from diffaccel import (
    FullAttn,
    HeadPerturbation,
    SkipLayers,
    SparseAttn,
    restore_attn_processor,
    set_attn_processor,
    set_guidance,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
METHOD = SparseAttn(keep=0.5, block=16, dense_steps=0, dense_layers=())
FAMILIES = (
    "flux", "sd3", "qwen", "wan2.1", "wan2.2", "wan2.2-ti2v", "hunyuan", "cogvideox", "ltx",
    "sd15", "sdxl",
)  # fmt: skip


def models(tiny):
    """All models of a pipeline: some read the device of their pipeline from its first one."""
    return [part for part in tiny.pipe.components.values() if isinstance(part, nn.Module)]


def dispatched(model, folder):
    """Every other part of a model on the disk, as a `device_map` says it."""
    names = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
    places = {name: ("cpu", "disk")[index % 2] for index, name in enumerate(names)}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)


def grouped(tiny, folder=None, **options):
    """Groups of every denoiser; those of two models have the same file names."""
    for name, model in tiny.denoisers().items():
        path = {} if folder is None else {"offload_to_disk_path": str(folder / name)}
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **path, **options)


OFFLOADS = {
    "model": lambda tiny, folder: tiny.pipe.enable_model_cpu_offload(device="cpu"),
    "accelerate": lambda tiny, folder: [accelerate.cpu_offload(part) for part in models(tiny)],
    "disk": lambda tiny, folder: [
        accelerate.disk_offload(part, folder / str(index))
        for index, part in enumerate(models(tiny))
    ],
    "device map": lambda tiny, folder: [
        dispatched(part, folder / str(index)) for index, part in enumerate(models(tiny))
    ],
    "blocks": lambda tiny, folder: grouped(
        tiny, offload_type="block_level", num_blocks_per_group=1
    ),
    "leaves": lambda tiny, folder: tiny.pipe.enable_group_offload(
        CPU, CPU, offload_type="leaf_level"
    ),
    "blocks on disk": lambda tiny, folder: grouped(
        tiny, folder, offload_type="block_level", num_blocks_per_group=1
    ),
    "leaves on disk": lambda tiny, folder: grouped(
        tiny, folder, offload_type="leaf_level"
    ),
}  # fmt: skip
QUICK = {("flux", name) for name in OFFLOADS} | {
    (family, name) for family in ("wan2.2", "sd15") for name in ("accelerate", "leaves")
}
CASES = [
    pytest.param(family, name, marks=[] if (family, name) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for name in OFFLOADS
]


def hooks(tiny):
    """What accelerate and diffusers keep at the modules of the denoisers."""
    kept = ("_hf_hook", "_old_forward", "_diffusers_hook")
    return {
        (part, name, key): vars(module).get(key)
        for part, model in tiny.denoisers().items()
        for name, module in model.named_modules()
        for key in kept
    }


def assert_same(found, expected, name):
    """Groups on disk come back at other addresses, which alone changes the last bit in stock."""
    if name.endswith("on disk"):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_results_are_those_without_offload(tiny_pipelines, tmp_path, family, name):
    plain = tiny_pipelines.BUILDERS[family]()
    with set_attn_processor(plain.pipe, METHOD, always=True):
        expected = plain.sample()

    after = tiny_pipelines.BUILDERS[family]()
    OFFLOADS[name](after, tmp_path / "after")
    stock, before_attaching = after.sample(), hooks(after)
    set_attn_processor(after.pipe, FullAttn())
    assert torch.equal(after.sample(), stock)
    attachment = set_attn_processor(after.pipe, METHOD, always=True)
    found = after.sample()
    assert_same(found, expected, name)
    assert torch.equal(after.sample(), found)
    assert all(layer.sparse_calls for layer in attachment.report().layers)
    attachment.remove()
    assert torch.equal(after.sample(), stock)
    if name != "model":  # whose hooks the pipeline makes anew after each run
        assert hooks(after) == before_attaching

    before = tiny_pipelines.BUILDERS[family]()
    set_attn_processor(before.pipe, METHOD, always=True)
    OFFLOADS[name](before, tmp_path / "before")
    assert_same(before.sample(), expected, name)
    restore_attn_processor(before.pipe)
    assert_same(before.sample(), stock, name)


@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("perturbation", [HeadPerturbation(layers=(1,)), SkipLayers((1,))])
def test_guidance_is_that_without_offload(tiny_pipelines, tmp_path, name, perturbation):
    plain, offloaded = tiny_pipelines.flux(), tiny_pipelines.flux()
    with set_guidance(plain.pipe, perturbation, scale=2.0):
        expected = plain.sample()
    stock = plain.sample()
    assert not torch.equal(stock, expected)
    with set_guidance(offloaded.pipe, perturbation, scale=2.0):
        OFFLOADS[name](offloaded, tmp_path)
        assert_same(offloaded.sample(), expected, name)
    assert_same(offloaded.sample(), stock, name)
    with set_guidance(offloaded.pipe, perturbation, scale=2.0):
        assert_same(offloaded.sample(), expected, name)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="streams need an accelerator")
def test_groups_come_by_stream(tiny_pipelines):
    tiny = tiny_pipelines.flux()
    device = torch.accelerator.current_accelerator()
    tiny.pipe.enable_group_offload(device, CPU, offload_type="leaf_level", use_stream=True)
    stock = tiny.sample()
    with set_attn_processor(tiny.pipe, FullAttn()):
        assert torch.equal(tiny.sample(), stock)
