"""The soak run finds what grows."""

from __future__ import annotations

import pytest
import torch

from tests.compositions import soak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("leaks", [False, True])
def test_a_tensor_that_stays_after_each_pass_is_found(monkeypatch, capsys, leaks):
    kept = []

    def use(composition, tiny, scheduler):
        if leaks:
            kept.append(torch.zeros(1))
        return True

    monkeypatch.setattr(soak, "use", use)
    assert soak.soak(0, 1) == leaks
    assert ("\ntensors: " in capsys.readouterr().out) == leaks


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
