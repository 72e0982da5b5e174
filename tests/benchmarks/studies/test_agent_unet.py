"""The benchmark of agent attention on a U-Net: counts, extrapolation, files."""

import csv

import numpy as np
import pytest

from diffaccel.benchmarks.studies import agent_unet
from diffaccel.methods import AgentAttn
from diffaccel.pipelines.embedded import EMBEDDED_UNET
from diffaccel.pipelines.loading import load_image_pipeline

needs_model = pytest.mark.skipif(
    not EMBEDDED_UNET.is_dir(), reason="the embedded U-Net has not been made"
)


def test_signal_to_noise():
    picture = np.full((4, 4, 3), 100, np.uint8)
    assert agent_unet.psnr(picture, picture) == float("inf")
    assert agent_unet.psnr(picture, picture + 10) == pytest.approx(28.13, abs=0.01)


def test_every_step_has_agents():
    assert agent_unet.in_every_step(AgentAttn()).stop == 1.0
    assert agent_unet.in_every_step(None) is None


@needs_model
@pytest.mark.slow
def test_agents_count_less_and_dense_steps_are_extrapolated():
    pipe = load_image_pipeline(EMBEDDED_UNET, device="cpu")
    dense, other = agent_unet.counted_gflop(pipe, None, 512)
    agents, same = agent_unet.counted_gflop(pipe, AgentAttn(), 512)
    assert other == same and 0.05 * dense < agents < 0.5 * dense
    small, large = (agent_unet.counted_gflop(pipe, None, size)[0] for size in (256, 512))
    assert large == pytest.approx(16 * small)


@needs_model
@pytest.mark.slow
def test_the_tables_are_written(tmp_path, capsys):
    path = tmp_path / "agent.csv"
    told = ["--model", str(EMBEDDED_UNET), "--sizes", "256", "--quality-sizes", "256"]
    told += ["--steps", "2", "--count", "1", "--sheet", str(tmp_path / "sheet.jpg")]
    assert agent_unet.main([*told, "--csv", str(path)]) == 0
    assert (tmp_path / "sheet.jpg").stat().st_size > 10_000
    rows = list(csv.DictReader(path.open()))
    assert rows[0]["method"] == "dense" and float(rows[0]["speed_up"]) == 1.0
    assert float(rows[1]["attention_gflop"]) < float(rows[0]["attention_gflop"])
    pictures = list(csv.DictReader(path.with_stem("agent-quality").open()))
    assert [row["method"] for row in pictures] == list(agent_unet.METHODS)
    assert pictures[0]["psnr_to_dense"] == "inf"
    assert 10 < float(pictures[1]["psnr_to_dense"]) < 100
    assert "dB to dense" in capsys.readouterr().out
