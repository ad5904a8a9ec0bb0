"""What `fit` says about a GPU that cannot do what is asked, without one."""

import dataclasses
import warnings

import polars as pl
import pytest
import torch

import fasttower
from fasttower import Config, FastTowerError, pipeline
from fasttower.training.data import TrainingData
from fasttower.training.trainer import Trainer

CONFIG = Config(embedding_dim=6, batch_size=64, epochs=1, backend="torch", l2=0.03, threads=1)


@pytest.fixture(scope="module")
def ratings():
    rows = [(i % 40, i * i % 31, i) for i in range(1000)]
    return pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is only said to be there, with 4 KiB free."""
    monkeypatch.setattr(pipeline, "choose_device", lambda *_, **__: (torch.device("cuda"), None))
    monkeypatch.setattr(pipeline, "choose_backend", lambda *_: ("triton", "for the test"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4096, 8 << 30))


def test_what_a_gpu_cannot_hold_is_refused_before_it_is_copied(ratings, gpu, monkeypatch):
    sizes = []
    original = pipeline.resident_bytes
    monkeypatch.setattr(
        pipeline, "resident_bytes", lambda **numbers: sizes.append(numbers) or original(**numbers)
    )
    copied = []
    monkeypatch.setattr(TrainingData, "to", lambda self, device: copied.append(device))
    with pytest.raises(FastTowerError, match=r"GiB for tables.* cuda has 0\.00 GiB of 8\.00 GiB free"):
        fasttower.fit(ratings, CONFIG)
    assert not copied
    (numbers,) = sizes
    # 800 rows before the test cut, as fit and as train and valid, two of them of items that train lacks; and
    # 648 to 720 of an earlier cut.
    assert (numbers["num_users"], numbers["num_items"], numbers["width"]) == (40, 16, 8)
    assert 1598 + 648 < numbers["num_rows"] <= 1598 + 720
    assert 0 < numbers["num_known"] <= 800


def test_memory_that_runs_out_in_training(ratings, monkeypatch):
    def train(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has much more.")

    monkeypatch.setattr(Trainer, "train", train)
    with pytest.raises(FastTowerError, match=r"Tried to allocate 2\.00 GiB\); .* --batch-size"):
        fasttower.fit(ratings, CONFIG)


def test_a_device_that_does_not_repeat_is_refused_before_the_data_are_read(monkeypatch):
    monkeypatch.setattr(pipeline, "choose_device", lambda *_, **__: (torch.device("mps"), None))
    with pytest.raises(FastTowerError, match="--deterministic"):
        fasttower.fit("/no/such/file.csv", dataclasses.replace(CONFIG, deterministic=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"deterministic": True, "similarity": "cosine"}, "cosine similarity do not repeat"),
        ({"deterministic": True, "negatives": "mixed"}, "mixed negatives do not repeat"),
        ({"deterministic": True, "bias_l2": 0.1}, "an L2 of the item biases do not repeat"),
        ({"optimiser": "lazy_adam", "negatives": "in-batch"}, "whole tables where in-batch negatives"),
    ],
    ids=["cosine", "shared", "bias", "lazy"],
)
def test_what_a_gpu_does_not_do_is_refused_before_the_data_are_read(monkeypatch, settings, message):
    monkeypatch.setattr(pipeline, "choose_device", lambda *_, **__: (torch.device("cuda"), None))
    monkeypatch.setattr(pipeline, "choose_backend", lambda *_: ("triton", "asked for"))
    with pytest.raises(FastTowerError, match=message):
        fasttower.fit("/no/such/file.csv", dataclasses.replace(CONFIG, **settings))


def test_a_device_that_is_not_there_is_a_warning_where_fit_was_called(ratings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="--device cuda was asked for, but .* going on on the CPU") as warned:
        run = fasttower.fit(ratings, dataclasses.replace(CONFIG, device="cuda"))
    assert run.device == "cpu"
    assert [warning.filename for warning in warned] == [__file__]


def test_plain_torch_for_want_of_numba_is_a_warning(ratings, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fasttower.fit(ratings, CONFIG)  # torch was asked for
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.warns(UserWarning, match="plain torch, which is slow: no fused backend for cpu") as warned:
        run = fasttower.fit(ratings, dataclasses.replace(CONFIG, backend="auto", device="cpu"))
    assert run.backend == "torch"
    assert [warning.filename for warning in warned] == [__file__]
