"""torch's switches of a process: as asked for while a run trains, and as before afterwards."""

import os

import pytest
import torch

from distrain.trainer.numerics import numerics

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def switches():
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


@pytest.fixture
def benchmarking(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(WORKSPACE, raising=False)


def test_switches_are_set_and_put_back(benchmarking):
    before = switches()
    with numerics(deterministic=True, float32_matmul="medium"):
        assert switches() == ("medium", True, False, ":4096:8")
    assert switches() == before
    with numerics(deterministic=False, float32_matmul="high"):
        assert switches() == ("high", *before[1:])
    assert switches() == before


def test_what_is_not_asked_for_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch, "set_float32_matmul_precision", None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", None)
    before = switches()
    with numerics(deterministic=False, float32_matmul=None):
        assert switches() == before


def test_they_are_put_back_when_training_fails(benchmarking):
    before = switches()
    with pytest.raises(KeyError):
        with numerics(deterministic=True, float32_matmul="high"):
            raise KeyError
    assert switches() == before


def test_what_the_user_has_set_stays(benchmarking, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    with numerics(deterministic=True, float32_matmul="highest"):
        assert os.environ[WORKSPACE] == ":16:8"
    assert os.environ[WORKSPACE] == ":16:8"


def test_an_operation_that_does_not_repeat_is_refused():
    table, index = torch.zeros(4), torch.tensor([0, 0])
    with numerics(deterministic=True, float32_matmul=None):
        with pytest.raises(RuntimeError, match="deterministic"):
            table.put_(index, torch.ones(2))
