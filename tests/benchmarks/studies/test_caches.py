"""The benchmark of caches beside methods: what is compared, and what a table says."""

import csv
import math

import pytest
import torch

from diffaccel.benchmarks.studies import caches
from diffaccel.pipelines.embedded import EMBEDDED_UNET

needs_model = pytest.mark.skipif(
    not EMBEDDED_UNET.is_dir(), reason="the embedded U-Net has not been made"
)


@needs_model
@pytest.mark.slow
def test_the_table_and_the_sheet_are_written(tmp_path, capsys):
    path, sheet = tmp_path / "caches.csv", tmp_path / "sheet.jpg"
    told = ["--models", "unet", "--count", "1", "--size", "256", "--steps", "6"]
    assert caches.main([*told, "--csv", str(path), "--sheet", str(sheet)]) == 0
    assert sheet.stat().st_size > 10_000
    dense, cached, method, both = csv.DictReader(path.open())
    assert [row["cache"] for row in (dense, cached)] == ["none", "PyramidAttentionBroadcast"]
    assert dense["method"] == cached["method"] == "FullAttn()" and "Agent" in both["method"]
    assert float(dense["speed_up"]) == 1.0 and math.isinf(float(dense["psnr"]))
    assert float(cached["attention_calls"]) < 1.0 == float(cached["density"])
    assert float(method["density"]) < 1.0 == float(method["attention_calls"])
    assert all(10 < float(row["psnr"]) < 100 for row in (cached, method, both))
    assert "cache-dit" in dense["versions"]
    assert "times as fast" in capsys.readouterr().out


@needs_model
@pytest.mark.slow
def test_a_cache_ends_with_its_block():
    run = caches.unet_run(size=64, steps=4)
    plain = run.draw("a red apple", 0, run.next_timestep)
    with caches.caching(run, "PyramidAttentionBroadcast"):
        cached = run.draw("a red apple", 0, run.next_timestep)
    assert not torch.equal(cached, plain)
    assert torch.equal(run.draw("a red apple", 0, run.next_timestep), plain)
