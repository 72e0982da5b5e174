"""Step position: distinct timesteps, never calls."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from diffaccel.attach.step_clock import StepClock


class Pipe(SimpleNamespace):
    """Something with a scheduler that can be weakly referenced."""


def steps(clock, timesteps):
    seen = []
    for timestep in timesteps:
        clock.tick(timestep)
        seen.append(clock.step)
    return seen


def test_guidance_calls_share_a_step():
    assert steps(StepClock(), [999.0, 999.0, 500.0, 500.0, 1.0, 1.0]) == [0, 0, 1, 1, 2, 2]


def test_skipped_calls_do_not_shift_the_others():
    assert steps(StepClock(), [999, 750, 750, 250]) == [0, 1, 1, 2]


@pytest.mark.parametrize("shape", [(), (3,), (3, 7)], ids=["scalar", "per-sample", "per-token"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16], ids=str)
def test_timestep_shapes_and_dtypes(shape, dtype):
    timesteps = [torch.full(shape, value, dtype=dtype) for value in (900, 900, 100)]
    assert steps(StepClock(), timesteps) == [0, 0, 1]


def test_conditioned_tokens_do_not_hide_the_step():
    """Image to video passes 0 for the first frame's tokens."""
    timesteps = [torch.tensor([[0.0, 0.0, value]]) for value in (900.0, 400.0)]
    assert steps(StepClock(), timesteps) == [0, 1]


def test_a_noisier_timestep_begins_a_run():
    clock = StepClock()
    assert [clock.tick(timestep) for timestep in (9, 5, 9, 9, 5)] == [1, 0, 1, 0, 0]
    assert clock.step == 1


def test_new_scheduler_timesteps_begin_a_run():
    """A run of one step, or one that starts where an interrupted one ended, does not jump back."""
    pipe = Pipe(scheduler=SimpleNamespace(timesteps=torch.tensor([9])))
    clock = StepClock(pipe)
    assert clock.tick(9) and not clock.tick(9)
    pipe.scheduler.timesteps = torch.tensor([9])
    assert clock.tick(9)
    pipe.scheduler.timesteps = torch.tensor([5])
    assert clock.tick(5) and clock.step == 0


def test_without_a_timestep_there_is_no_step():
    clock = StepClock()
    assert not clock.tick(None)
    assert clock.step is None


def test_reset_begins_a_run():
    clock = StepClock()
    clock.tick(9)
    clock.tick(5)
    clock.reset()
    assert clock.tick(1) and clock.step == 0


def test_a_copy_starts_anew_without_the_pipeline():
    pipe = Pipe(scheduler=SimpleNamespace(timesteps=torch.tensor([9])))
    clock = StepClock(pipe)
    clock.tick(9)
    assert copy.deepcopy(clock).step is None


def progresses(clock, timesteps):
    seen = []
    for timestep in timesteps:
        clock.tick(timestep)
        seen.append(clock.progress)
    return seen


@pytest.mark.parametrize("unit", [1.0, 1000.0], ids=["as they are", "divided"])
def test_progress_is_the_place_in_the_schedulers_list(unit):
    pipe = Pipe(scheduler=SimpleNamespace(timesteps=torch.tensor([1000.0, 900, 700, 400])))
    timesteps = [torch.tensor(t / unit).bfloat16() for t in (1000, 1000, 900, 700, 400)]
    assert progresses(StepClock(pipe), timesteps) == [0, 0, 0.25, 0.5, 0.75]


def test_a_run_may_begin_in_the_middle_of_the_schedule():
    """Image to image passes the last part of the scheduler's list."""
    pipe = Pipe(scheduler=SimpleNamespace(timesteps=torch.tensor([801, 601, 401, 201, 1])))
    assert progresses(StepClock(pipe), [401, 201, 1]) == [0.4, 0.6, 0.8]


def test_progress_without_a_pipeline_follows_the_training_timesteps():
    assert progresses(StepClock(), [1000, 600.0, 1]) == pytest.approx([0, 0.4, 0.999])
    assert progresses(StepClock(), [1.0, 0.6, 0.001]) == pytest.approx([0, 0.4, 0.999])


def test_progress_ends_with_the_run():
    clock = StepClock()
    clock.tick(500)
    clock.reset()
    assert clock.progress is None
    clock.tick(500)
    clock.tick(None)
    assert clock.progress is None
