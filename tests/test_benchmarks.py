"""What the benchmarks compute of what they measure, and what they promise."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent


def test_time_to_a_level():
    from benchmarks.quality_over_time import Curve

    curve = Curve([1.0, 2.0, 4.0, 5.0], [0.1, 0.3, 0.2, 0.4])
    assert [curve.time_to(level) for level in (0.1, 0.2, 0.3, 0.31, 0.41)] == [1.0, 2.0, 2.0, 5.0, None]
    assert curve.best_so_far().ndcg == [0.1, 0.3, 0.3, 0.4]


class Cut:
    """A validation cut whose scoring takes a hundred seconds."""

    matrix, users = None, range(1)

    def __init__(self, clock):
        self.clock = clock

    def metrics(self, model):
        self.clock.now += 100.0
        return {}, torch.tensor([float(model)])


@pytest.fixture
def clock(monkeypatch):
    from benchmarks import quality_over_time

    clock = SimpleNamespace(now=7.0)
    monkeypatch.setattr(quality_over_time.time, "process_time", lambda: clock.now)
    return clock


def test_a_peer_is_timed_without_its_scoring(clock):
    from benchmarks.peers import Peer
    from benchmarks.quality_over_time import of_peer

    def fit(matrix, *, iterations, seed, after):
        for iteration in range(1, iterations + 1):
            clock.now += 2.0
            if after(iteration, iteration):
                break

    curve = of_peer(Peer(fit, {}, {}, 4), {}, Cut(clock), seed=0)
    assert curve.seconds == [2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 20.0, 24.0]
    assert curve.ndcg == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert of_peer(Peer(fit, {}, {}, 4), {}, Cut(clock), seed=0, limit=5.0).seconds == [2.0, 4.0, 6.0]


@pytest.mark.parametrize(("cuts", "seconds"), [(True, [3.0, 6.0, 12.0]), (False, [3.0, 6.0, 9.0])])
def test_fasttower_is_timed_without_its_scoring(clock, cuts, seconds):
    from benchmarks.quality_over_time import Stopwatch

    watch = Stopwatch(cuts=cuts, limit=seconds[-1] - 0.5)
    watch.on_training("cpu", "numba", "", 1)
    for cut, ndcg in ((0, 0.2), (0, 0.1), (1, 0.9), (0, 0.3)):
        assert not watch.should_stop()
        for _ in range(3):
            clock.now += 1.0
            watch.on_progress("search", 1, 1, 1, 1)
        clock.now += 100.0
        watch.on_epoch(SimpleNamespace(cut=cut, valid={"NDCG@10": ndcg}))
    assert watch.curve.seconds == seconds
    assert watch.curve.ndcg == [0.2, 0.1, 0.3]
    assert watch.should_stop()


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
