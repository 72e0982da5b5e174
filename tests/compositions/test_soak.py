"""The soak run finds what grows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compositions import soak

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


USE = """
import torch
from tests.compositions import soak
kept = []
soak.use = lambda *_: kept.append(torch.zeros(1)) or True if {leaks} else True
raise SystemExit(soak.soak(0, 1))
"""


@pytest.mark.parametrize("leaks", [False, True])
def test_a_tensor_that_stays_after_each_pass_is_found(leaks):
    """In a process of its own: other tests leave objects behind."""
    done = subprocess.run(
        [sys.executable, "-c", USE.format(leaks=leaks)], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == leaks, done.stderr
    assert ("\ntensors: " in done.stdout) == leaks


def test_a_pipeline_is_used_again_and_again(tiny_pipelines):
    composition = soak.lasting(soak.runnable(0)[0])
    tiny = tiny_pipelines.BUILDERS[composition.family]()
    scheduler = tiny.pipe.scheduler
    assert soak.use(composition, tiny, scheduler) and soak.use(composition, tiny, scheduler)
    assert not soak.hooks({"": tiny})


def test_the_slope_of_memory_is_that_of_a_line_after_the_warm_up():
    minutes = [float(minute) for minute in range(11)]
    memory = [500.0, 700.0, 800.0] + [900.0 + 0.25 * minute for minute in minutes[3:]]
    assert soak.slope(minutes, memory) == pytest.approx(0.25)
