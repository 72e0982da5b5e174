"""The GPU session: one part that fails or hangs must not cost the others."""

import json
import sys

import pytest
import torch

from diffaccel.benchmarks.gpu_session import METHODS, TOTAL_SECONDS, Part, main, plan, run_parts
from diffaccel.cli import build_app


def python(code):
    return (sys.executable, "-S", "-c", code)


def test_parts_are_independent(tmp_path):
    record = tmp_path / "out.json"
    write = f"open({str(record)!r}, 'w').write('{{\"seed\": 3}}'); print('wrote')"
    parts = [
        Part("fails", python("raise SystemExit(3)"), 20, tmp_path),
        Part("hangs", python("import time; time.sleep(60)"), 0.5, tmp_path),
        Part("works", python(write), 20, tmp_path, record),
    ]
    results = run_parts(parts, tmp_path / "session.log", total_seconds=60)
    fails, hangs, works = results
    assert fails["exit_code"] == 3 and fails["outcome"] == "failed"
    assert hangs["exit_code"] is None and "limit of 0 s" in hangs["outcome"]
    assert hangs["seconds"] < 10
    assert works["outcome"] == "done" and works["record"] == {"seed": 3}
    assert "wrote" in (tmp_path / "session.log").read_text()
    assert json.loads((tmp_path / "session.json").read_text()) == results
    assert sorted(x.name for x in tmp_path.iterdir()) == ["session.json", "session.log"]


def test_nothing_is_begun_when_the_time_is_used_up(tmp_path):
    part = Part("late", python("open('ran', 'w')"), 20, tmp_path)
    (result,) = run_parts([part], tmp_path / "session.log", total_seconds=0)
    assert "not begun" in result["outcome"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("is_rehearsal", [False, True])
def test_the_plan_fits_its_time_and_the_command_line(tmp_path, is_rehearsal):
    parts = plan(tmp_path, is_rehearsal)
    assert sum(part.limit for part in parts) <= TOTAL_SECONDS
    assert any(word.endswith("block_sparse/test_cuda.py") for word in parts[0].command)
    for part in parts[1:]:
        words = part.command[3:]
        # raises for words that it does not know
        parsed = build_app().parse_args(words, exit_on_error=False, print_error=False)
        assert words[0] in ("bench", "sample")
        if words[0] == "bench":
            options = next(iter(parsed[1].arguments.values()))
            assert options.time_limit < part.limit
    assert [part.name for part in parts[2:]] == [f"sample {method}" for method in METHODS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path, capsys):
    assert main(["--output", str(tmp_path / "out")]) == 2
    assert "a CUDA GPU is needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
