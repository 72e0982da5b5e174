"""The growth benchmark: its rows, its exponents, its CSV."""

import csv

import pytest

from diffaccel.benchmarks.studies import agent_growth


def test_tokens_resemble_their_neighbours():
    query, key, value = agent_growth.draw_tokens(32, 2, 16, 0)
    assert query.shape == key.shape == value.shape == (1, 1024, 2, 16)
    grid = (query - query.mean(1)).flatten(2).unflatten(1, (32, 32))[0]
    assert 0.5 < float((grid[1:] * grid[:-1]).mean() / grid.square().mean()) < 0.95
    assert 0.2 < float(value.mean(1).square().mean() / value.square().mean()) < 0.7


@pytest.mark.slow
def test_a_size_has_a_row_for_each_method():
    rows = agent_growth.measure(16, 1, 16, 0, 100.0, 20.0)
    assert [row.method for row in rows] == ["FullAttn()", *agent_growth.METHODS]
    assert rows[0].error < 1e-5 and rows[0].speed_up == 1.0 and rows[0].flop_share == 1.0
    assert rows[1].agents == 16 and rows[1].flop_share == pytest.approx(2 * 16 / 256)
    assert all(0.01 < row.error < 1.0 for row in rows[1:])


def test_what_would_take_too_long_is_extrapolated_or_left_out():
    (row,) = agent_growth.measure(16, 1, 16, 0, 1.0, 1e-6)
    assert row.is_extrapolated and row.seconds == pytest.approx(row.gflop) and row.repetitions == 0


def test_exponents():
    rows = [row for side in (64, 128) for row in agent_growth.measure(side, 1, 4, 0, 1.0, 1e-3)]
    assert agent_growth.growth(rows, 64, 128)["FullAttn()"] == pytest.approx((2.0, 2.0))
    layout = agent_growth.TokenLayout.image
    agent = agent_growth.METHODS["AgentAttn()"]
    small, large = (agent_growth.gflop(agent, layout(s, s), 1, 64) for s in (64, 512))
    assert large / small == pytest.approx(64)


@pytest.mark.slow
def test_the_csv_has_the_facts_beside_every_row(tmp_path, capsys):
    path = tmp_path / "growth.csv"
    arguments = ["--sides", "64", "--heads", "1", "--dim", "8", "--csv", str(path)]
    assert agent_growth.main(arguments) == 0
    rows = list(csv.DictReader(path.open()))
    assert rows[0]["method"] == "FullAttn()" and "torch" in rows[0]["versions"]
    assert 0.01 < float(rows[1]["error"]) < 1.0
    assert "| 64x64 | AgentAttn() | 256 |" in capsys.readouterr().out
