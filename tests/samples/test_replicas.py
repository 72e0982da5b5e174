"""Replicas of a model average their gradients and agree on the time."""

import pytest
import torch

JOB = """
import torch
from embedded.training.replicas import average_over_replicas, rank

def job(folder):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, 2.0]]) * (1 + 2 * rank())
    spent_s = average_over_replicas(model, 10.0 + 4 * rank())
    content = {"grad": model.weight.grad, "spent_s": spent_s, "threads": torch.get_num_threads()}
    torch.save(content, folder / f"{rank()}.pt")
"""


@pytest.mark.slow
def test_replicas_average_gradients_and_time(embedded, tmp_path, monkeypatch):
    (tmp_path / "replica_job.py").write_text(JOB)
    monkeypatch.syspath_prepend(tmp_path)
    torch.set_num_threads(2)
    from embedded.training.replicas import replicate
    from replica_job import job

    replicate(job, tmp_path)
    assert torch.get_num_threads() == 2
    for number in (0, 1):
        found = torch.load(tmp_path / f"{number}.pt")
        assert torch.equal(found["grad"], torch.tensor([[2.0, 4.0]]))
        assert found["spent_s"] == 12.0
        assert found["threads"] == 1


def test_a_single_process_keeps_its_own(embedded):
    from embedded.training.replicas import average_over_replicas, rank

    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    assert average_over_replicas(model, 3.5) == 3.5
    assert rank() == 0
    assert torch.equal(model.weight.grad, torch.ones(1, 2))
