"""The choice between kernel variants: right before fast, found once, the first one if in doubt."""

import pytest
import torch

from diffaccel.kernels import autotune


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    monkeypatch.setattr(autotune, "_FOUND", {})


def contest(times, results=None, problem="problem"):
    """Runs variants named by the keys of `times`; one without a result fails to compile."""
    right = torch.tensor([1.0, -torch.inf])
    results = dict.fromkeys(times, right) | (results or {})
    calls = []

    def run(variant):
        calls.append(variant)
        if results[variant] is None:
            raise RuntimeError("out of shared memory")
        return (results[variant],)

    def time_ms(call):
        call()
        return times[calls[-1]]

    return autotune.fastest(problem, tuple(times), run, time_ms), calls


def test_the_fastest_right_variant_wins():
    assert contest({"plain": 10.0, "tma": 9.0, "other": 8.0})[0] == "other"
    assert contest({"plain": 10.0, "tma": 11.0}, problem="slow")[0] == "plain"


def test_a_gain_within_the_noise_keeps_the_first():
    assert contest({"plain": 10.0, "tma": 9.9})[0] == "plain"


@pytest.mark.parametrize(
    "wrong", [None, torch.tensor([1.5, -torch.inf]), torch.full((2,), torch.nan)]
)
def test_a_variant_that_fails_or_disagrees_is_left_out(wrong):
    assert contest({"plain": 10.0, "tma": 1.0}, {"tma": wrong})[0] == "plain"


def test_each_problem_is_tried_once():
    assert contest({"plain": 10.0, "tma": 1.0})[0] == "tma"
    again, calls = contest({"plain": 1.0, "tma": 10.0})
    assert again == "tma" and calls == []


def test_one_variant_alone_is_not_run():
    assert contest({"plain": 1.0}) == ("plain", [])
