"""The choice of device and backend."""

import pytest
import torch

from fasttower.config import TrainingConfig
from fasttower.device import check_repeatable, choose_device, cpu_threads
from fasttower.errors import FastTowerError
from fasttower.training import trainer
from fasttower.training.data import TrainingData
from fasttower.training.trainer import Trainer
from fasttower_kernels.backends import choose_backend
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_auto_takes_the_cpu_where_there_is_nothing_else(no_cuda, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == (torch.device("cpu"), None)


def test_cuda_falls_back_with_a_reason(no_cuda):
    device, warning = choose_device("cuda")
    assert device.type == "cpu"
    assert "--device cuda" in warning
    assert "CPU" in warning


def test_strict_cuda_is_an_error(no_cuda):
    with pytest.raises(FastTowerError, match="--device cuda"):
        choose_device("cuda", strict=True)


def test_threads_are_set_inside_and_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with cpu_threads(1) as threads:
            assert threads == torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_cores():
    with pytest.raises(FastTowerError, match="cores"), cpu_threads(100_000):
        pass


@pytest.mark.parametrize(("backend", "device"), [("numba", "cuda"), ("triton", "cpu"), ("fortran", "cpu")])
def test_a_backend_that_cannot_run_is_an_error(backend, device):
    with pytest.raises(FastTowerError, match="backend"):
        choose_backend(backend, torch.device(device))


def test_backend_auto_and_torch():
    assert choose_backend("torch", torch.device("cpu"))[0] == "torch"
    assert choose_backend("auto", torch.device("meta"))[0] == "torch"
    assert choose_backend("auto", torch.device("cpu"))[0] == "numba"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_what_does_not_repeat_is_refused(device):
    with pytest.raises(FastTowerError, match=r"--deterministic .* backend torch .* --backend triton"):
        check_repeatable("torch", torch.device(device))


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_trainer_asks_its_steps_to_repeat(deterministic, monkeypatch):
    seen = []

    class Recorded(trainer.Step):
        def __init__(self, state, interactions, negatives, settings, **options):
            seen.append(settings.deterministic)
            super().__init__(state, interactions, negatives, settings, **options)

    monkeypatch.setattr(trainer, "Step", Recorded)
    index = torch.zeros(3, dtype=torch.int32)
    pairs, known = Interactions(index, index), KnownPositives.from_pairs(index, index, 1, 2)
    config = TrainingConfig(
        embedding_dim=4, batch_size=2, epochs=1, backend="torch", deterministic=deterministic
    )
    Trainer(TrainingData(pairs, known), config).train()
    assert seen == [deterministic]
