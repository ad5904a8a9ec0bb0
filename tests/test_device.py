"""The choice of device and backend."""

import pytest
import torch

from fasttower.device import choose_device, cpu_threads
from fasttower.errors import FastTowerError
from fasttower_kernels.backends import choose_backend


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
