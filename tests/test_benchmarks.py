"""What the benchmarks compute of what they measure, and what they promise."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.tables import Interactions

ROOT = Path(__file__).parent.parent


def test_time_to_a_level():
    pytest.importorskip("implicit")
    from benchmarks.against_implicit import Curve

    curve = Curve([1.0, 2.0, 4.0], [0.1, 0.3, 0.2])
    assert [curve.time_to(level) for level in (0.1, 0.2, 0.3, 0.31)] == [1.0, 2.0, 2.0, None]


def test_implicit_is_timed_without_its_evaluation(monkeypatch):
    pytest.importorskip("implicit")
    from benchmarks import against_implicit

    now = 0.0

    class Model:
        def __init__(self, *, iterations, **_):
            self.iterations = iterations

        def fit(self, matrix, *, show_progress, callback):
            nonlocal now
            assert matrix.toarray().tolist() == [[0, 1], [1, 1]]
            for epoch in range(self.iterations):
                now += 2.0
                self.user_factors = self.item_factors = torch.full((2, 1), float(epoch)).numpy()
                callback(epoch, 2.0)

    class Validation:
        def metrics(self, model):
            nonlocal now
            now += 100.0
            return {"NDCG@10": float(model.infer_users()[0, 0])}, None

    monkeypatch.setitem(against_implicit.MODELS, "implicit BPR", Model)
    monkeypatch.setattr(against_implicit.time, "perf_counter", lambda: now)
    rows = Interactions(torch.tensor([0, 1, 1]).int(), torch.tensor([1, 0, 1]).int())
    known = KnownPositives.from_pairs(rows.user_index, rows.item_index, 2, 2)
    model, curve = against_implicit.train_implicit(
        "implicit BPR", {}, 3, rows, known, seed=0, threads=1, validation=Validation()
    )
    assert curve.seconds == [2.0, 4.0, 6.0]
    assert curve.ndcg == [0.0, 1.0, 2.0]
    assert float(model.infer_items()[1, 0]) == 2.0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_step_does_not_grow_with_the_negatives():
    pytest.importorskip("numba")
    command = [sys.executable, "-m", "benchmarks.step_memory"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rows_that_batches_touch_are_as_many_as_in_drawn_ones():
    from benchmarks.gpu_epoch_model import MOST_REPLAYED, Rows

    probability = torch.tensor([0.6, 0.1, 0.02, 0.004], dtype=torch.float64).repeat(10)
    generator = torch.Generator().manual_seed(0)
    touched = torch.rand((30_000, 40), generator=generator, dtype=torch.float64) < probability
    rows = Rows.of(probability)
    assert float(touched.sum(1).double().mean()) == pytest.approx(rows.touched, rel=0.01)
    missed = torch.cat([row.nonzero().squeeze(1).diff() - 1 for row in touched.T])
    assert float(missed.clamp(max=MOST_REPLAYED).double().mean()) == pytest.approx(rows.missed, rel=0.03)
    assert float((missed >= MOST_REPLAYED).double().mean()) == pytest.approx(rows.long, rel=0.1)
    assert rows.most_missed == MOST_REPLAYED


def test_a_launch_takes_its_longest_bound():
    from benchmarks import gpu_epoch_model as model

    program = model.Program(registers=64, instructions=100, l2_trips=20)
    alone = (20 * model.L2_TRIP + 100 * model.CYCLES_PER_INSTRUCTION) / model.CYCLES_PER_US
    round_of = model.SMS * 32  # 64 registers leave room for 32 programs
    assert model.Launch(0, (model.Part(program, 1),)).bound() == (pytest.approx(alone), "latency")
    assert model.Launch(0, (model.Part(program, round_of),)).bound()[0] == pytest.approx(alone)
    assert model.Launch(0, (model.Part(program, round_of + 1),)).bound()[0] == pytest.approx(2 * alone)
    assert model.Launch(2.8e7, (model.Part(program, 1),)).bound() == (pytest.approx(10), "bytes")
    busy = model.Launch(0, (model.Part(program._replace(instructions=10_000, l2_trips=0), 100 * round_of),))
    assert busy.bound()[1] == "issue"
