"""`diffaccel bench kernels`: output, files, exit codes."""

import os

import numpy as np
import pytest
from PIL import Image

from diffaccel.benchmarks.ops.report import Row
from diffaccel.benchmarks.rows import read_rows
from diffaccel.cli import main

FAST = (
    "--shapes embedded-256 --heads 1 --block 64 --densities 0.25 0.5 --device cpu "
    "--repetitions 3 --row-seconds 0.001 --tflops 1 --bandwidth 10 --dtypes fp32"
).split()
OPS = ["--ops", "sdpa-flash", "sdpa-math", "block-random", "block-rectified"]


def bench(*words):
    return main(["bench", "kernels", *FAST, *words])


@pytest.mark.slow
def test_table_and_csv(tmp_path, capsys):
    assert bench(*OPS, "--csv", str(tmp_path / "k.csv")) == 0
    printed = capsys.readouterr().out
    rows, facts = read_rows(tmp_path / "k.csv", Row)
    assert "### embedded-256, float32" in printed
    assert printed.count("block-sparse, RectifiedSpaAttn [diffaccel]") == 2
    assert [row.heads for row in rows] == [1] * 6
    assert facts["device"].startswith("cpu") and "torch" in facts["versions"]
    assert os.listdir(tmp_path) == ["k.csv"]


@pytest.mark.slow
def test_plot_shows_lines(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")
    assert bench(*OPS, "--plot", str(tmp_path / "k.png")) == 0
    picture = np.asarray(Image.open(tmp_path / "k.png").convert("RGB")).astype(int)
    assert min(picture.shape[:2]) > 400
    for color in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):  # one for each of the two sparse ops
        assert (abs(picture - color).max(-1) < 8).sum() > 100
    assert os.listdir(tmp_path) == ["k.png"]


def test_plot_without_matplotlib_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffaccel.cli.bench.find_spec", lambda _name: None)
    assert bench("--plot", str(tmp_path / "k.png")) == 2
    assert "pip install 'diffaccel[bench]'" in capsys.readouterr().err


def test_roofline_alone(capsys):
    assert bench("--roofline") == 0
    printed = capsys.readouterr().out
    # 4 * 256 * 288 * 64 FLOP at 1 TFLOP/s; (4 * 256 + 2 * 32) * 64 * 4 bytes at 10 GB/s
    line = "| embedded-256 | float32 | dense | 1 | 0.01887 | 0.2785 | 0.01887 | 0.02785 | 0.02785"
    assert line in printed
    assert "p50" not in printed


def test_rows_beyond_the_time_limit_are_named(capsys):
    assert bench(*OPS, "--time-limit", "0.0001") == 0
    printed = capsys.readouterr().out
    assert "Not run, the time limit of 0.0001 s was reached" in printed
    assert "Best dense: none measured" in printed


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--shapes", "flux-9k"], "--shapes must be of flux-1k"),
        (["--ops", "magic"], "--ops must be of sdpa-cudnn"),
        (["--dtypes", "int8"], "--dtypes must be of fp32"),
        (["--densities", "0"], "above 0 and at most 1"),
        (["--densities", "1.5"], "above 0 and at most 1"),
        (["--densities", "nan"], "above 0 and at most 1"),
        (["--block", "100"], "power of two"),
        (["--heads", "0"], "at least 1"),
        (["--repetitions", "2.5"], "at least 1"),
        (["--row-seconds", "-1"], "above 0"),
        (["--time-limit", "soon"], "above 0"),
        (["--tflops", "inf"], "above 0"),
        (["--device", "nonsense"], "--device must be cpu or a CUDA device"),
        (["--device", "cuda:77"], "--device must be usable"),
        (["--csv", "missing/k.csv"], "folder that exists"),
        (["--plot", "k.jpg"], "must end in .png"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    assert bench(*words) == 2
    message = capsys.readouterr().err.strip()
    assert part in message
    assert "\n" not in message and "Traceback" not in message
    assert os.listdir(tmp_path) == []


def test_one_ceiling_alone_is_refused(capsys):
    assert main(["bench", "kernels", "--tflops", "1"]) == 2
    assert "must be given together" in capsys.readouterr().err


def test_bench_without_a_benchmark_is_refused(capsys):
    assert main(["bench"]) == 2
    assert "benchmark" in capsys.readouterr().err
