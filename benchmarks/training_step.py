"""The training step on the CPU beside its baselines: `python -m benchmarks.training_step`.

Two data sets are made up: one of MovieLens 1M's size with Zipf-distributed items, and one of MovieLens 20M's
shape, 16 million ratings before a time cut with skewed users and items. With --data ml-1m it is the 669,182
rows that RePlay's published protocol trains on. Each way trains in turns of some steps, one after another and
again; the best turn counts, in CPU time, so that a busy machine disturbs all of them alike. The ways:

    numba               the fused backend with plain sampling, shuffle and gather included
    numba_exclusion     the same with known positives left out and an item bias
    torch               fasttower's plain torch reference, plain sampling; not with ML-20M's shape
    torch_exclusion     the same with known positives left out and an item bias
    eager_mulsum        a well-written torch loop: autograd, fused Adam, dot products as (u * v).sum(-1)
    eager_bmm           the same with torch.bmm
    compile             eager_mulsum's loss through torch.compile
    manual_compile      its gradients by hand through torch.compile: the fastest torch loop that was found
    sparse_adam         eager_mulsum's loss with sparse embeddings and torch.optim.SparseAdam
    dataloader          a Dataset that draws negatives row by row, behind a DataLoader (--dataloader); not at
                        batch 65,536
    c_limit             benchmarks/c_limit.c through gcc where it is there: no shuffle, no exclusion, no bias

SparseAdam is another optimiser and no fast version of Adam: a row that a batch does not touch keeps its
moments and stays where it is, where Adam decays the ones and moves the other. fasttower's lazy Adam pays only
for touched rows too, and leaves what Adam leaves.

With --implicit an iteration of implicit's ALS and an epoch of its BPR on ML-20M's shape, with 32 factors,
beside epochs of fasttower.

With --threads 1 2, only numba, numba_exclusion and eager_mulsum, with each number of threads, in wall time;
that needs a machine that is otherwise idle.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numba
import torch

from benchmarks.shapes import Data, make_data, make_ml_20m, make_tables, read_data
from benchmarks.torch_baselines import (
    LEARNING_RATE,
    NUM_NEGATIVES,
    Steps,
    compiled_way,
    dataloader_way,
    loss_bmm,
    loss_mulsum,
    manual_compiled_way,
    sparse_adam_way,
    torch_way,
)
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.settings import NegativeSettings, StepSettings
from fasttower_kernels.step import Step, TrainState, steps_per_epoch

SHAPES = ((16, 1024), (16, 8192), (64, 1024), (64, 8192))
LARGE_SHAPE = (32, 65_536)  # of both data sets, to compare them
TORCH_ADAM = ("eager_mulsum", "eager_bmm", "compile", "manual_compile")


def fasttower_way(
    backend: str, dim: int, batch_size: int, data: Data, known: KnownPositives | None = None
) -> Steps:
    state = TrainState.start(make_tables(dim, data, item_bias=known is not None))
    negatives = Negatives(NegativeSettings(count=NUM_NEGATIVES), data.num_users, data.num_items, known)
    settings = StepSettings(LEARNING_RATE, batch_size, seed=1, negatives=negatives.settings)
    step = Step(state, data.interactions, negatives, settings, backend=backend)
    per_epoch = steps_per_epoch(len(data.interactions), batch_size)
    full = len(data.interactions) // batch_size
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        if done % per_epoch + count > full:  # the last batch may be short
            done += per_epoch - done % per_epoch
        step.run(done, count)
        done += count

    return steps


def c_way(dim: int, batch_size: int, data: Data, folder: Path) -> Steps:
    library = folder / f"c_limit_{dim}.so"
    if not library.exists():
        flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-shared", "-fPIC"]
        source = Path(__file__).with_name("c_limit.c")
        macros = [f"-DD={dim}", f"-DN={NUM_NEGATIVES}"]
        subprocess.run(["gcc", *flags, *macros, source, "-o", library, "-lm"], check=True)
    run = ctypes.CDLL(str(library)).run_steps
    run.restype = ctypes.c_double
    state = TrainState.start(make_tables(dim, data))
    groups = (state.parameters, state.gradients, state.moments_1, state.moments_2)
    pointers = (ctypes.c_void_p * 8)(*(table.data_ptr() for group in groups for table in group))
    rows = (ctypes.c_int64 * 2)(data.num_users, data.num_items)
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        assert state is not None  # its tables must outlive the pointers
        run(
            pointers,
            rows,
            ctypes.c_void_p(data.interactions.user_index.data_ptr()),
            ctypes.c_void_p(data.interactions.item_index.data_ptr()),
            ctypes.c_int64(len(data.interactions)),
            ctypes.c_int64(batch_size),
            ctypes.c_uint32(1),
            ctypes.c_uint32(0),
            ctypes.c_double(LEARNING_RATE),
            ctypes.c_int64(done),
            ctypes.c_int64(count),
        )
        done += count

    return steps


def cpu_model() -> str:
    """What the system calls the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def best_ns(
    ways: dict[str, Steps], batch_size: int, repeats: int, clock: Callable[[], int] = time.process_time_ns
) -> dict[str, float]:
    """Nanoseconds per positive of each way's best turn, in turns; CPU time if no other clock is given."""
    best = dict.fromkeys(ways, float("inf"))
    for steps in ways.values():
        steps(2)
    for _ in range(repeats):
        for name, steps in ways.items():
            fused = name.startswith(("numba", "c_"))
            count = max(2, (65_536 if fused else 16_384) // batch_size)
            start = clock()
            steps(count)
            best[name] = min(best[name], (clock() - start) / (count * batch_size))
    return best


def compare_threads(counts: list[int], data: Data, repeats: int) -> None:
    """Print what each number of threads makes of a way."""
    known = data.known_positives()

    def with_threads(count: int, steps: Steps) -> Steps:
        def set_and_run(num_steps: int) -> None:
            torch.set_num_threads(count)
            steps(num_steps)

        return set_and_run

    for dim, batch_size in SHAPES:
        ways = {}
        for count in counts:
            made = {
                "numba": fasttower_way("numba", dim, batch_size, data),
                "numba_exclusion": fasttower_way("numba", dim, batch_size, data, known),
                "eager_mulsum": torch_way(loss_mulsum, dim, batch_size, data),
            }
            ways |= {f"{name} {count}": with_threads(count, steps) for name, steps in made.items()}
        best = best_ns(ways, batch_size, repeats, time.perf_counter_ns)
        print(f"\ndim {dim}, batch {batch_size}; ns per positive")
        for name in made:
            first = best[f"{name} {counts[0]}"]
            columns = (
                f"{count} threads {best[f'{name} {count}']:7.0f} ({first / best[f'{name} {count}']:.2f}x)"
                for count in counts
            )
            print(f"  {name:16s} " + "   ".join(columns))


def compare(
    data: Data,
    dim: int,
    batch_size: int,
    folder: Path,
    repeats: int,
    *,
    reference: bool = True,
    dataloader: bool = False,
) -> dict[str, float]:
    """Measure and print all ways at one shape."""
    known = data.known_positives()
    shape = dim, batch_size, data
    ways = {
        "numba": fasttower_way("numba", *shape),
        "numba_exclusion": fasttower_way("numba", *shape, known),
        "eager_mulsum": torch_way(loss_mulsum, *shape),
        "eager_bmm": torch_way(loss_bmm, *shape),
        "compile": compiled_way(*shape),
        "manual_compile": manual_compiled_way(*shape),
        "sparse_adam": sparse_adam_way(*shape),
    }
    if reference:
        ways["torch"] = fasttower_way("torch", *shape)
        ways["torch_exclusion"] = fasttower_way("torch", *shape, known)
    if dataloader:
        ways["dataloader"] = dataloader_way(*shape)
    if shutil.which("gcc"):
        ways["c_limit"] = c_way(*shape, folder)
    best = best_ns(ways, batch_size, repeats)
    rows = len(data.interactions)
    print(
        f"\n{data.num_users} users, {data.num_items} items, {rows} positives; dim {dim}, batch {batch_size}"
    )
    for name, ns in best.items():
        print(
            f"  {name:16s} {ns:8.0f} ns per positive {ns * rows / 1e9:7.3f} s per epoch "
            f"{ns / best['numba']:7.2f} x numba"
        )
    fastest = min(TORCH_ADAM, key=best.__getitem__)
    print(f"  best torch ({fastest}) / numba {best[fastest] / best['numba']:.1f}", end="")
    print(f", numba_exclusion / numba {best['numba_exclusion'] / best['numba']:.2f}", end="")
    print(f", numba / c_limit {best['numba'] / best['c_limit']:.2f}" if "c_limit" in best else "", flush=True)
    return best


def print_implicit(data: Data, fasttower_ns: dict[str, float]) -> None:
    """Print fasttower's epochs, and implicit's on one thread: the second of two iterations, in CPU time."""
    import numpy as np
    from implicit.cpu.als import AlternatingLeastSquares
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix
    from threadpoolctl import threadpool_limits

    known = data.known_positives()
    indptr, items = known.indptr.numpy(), known.items.numpy()
    matrix = csr_matrix(
        (np.ones(len(items), np.float32), items, indptr), shape=(data.num_users, data.num_items)
    )
    dim, batch_size = LARGE_SHAPE
    print(f"\nAn epoch on ML-20M's shape, {dim} factors; fasttower's batch {batch_size}")
    for name in ("numba", "numba_exclusion"):
        print(f"  {'fasttower ' + name:26s} {fasttower_ns[name] * len(data.interactions) / 1e9:5.1f} s")
    for name, model_of in (("ALS", AlternatingLeastSquares), ("BPR", BayesianPersonalizedRanking)):
        ends = []
        model = model_of(factors=dim, iterations=2, num_threads=1, random_state=0)
        with threadpool_limits(1, "blas"):
            model.fit(
                matrix, show_progress=False, callback=lambda *_, ends=ends: ends.append(time.process_time())
            )
        print(f"  {'implicit ' + name:26s} {ends[1] - ends[0]:5.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15, help="turns of each way")
    parser.add_argument("--dataloader", action="store_true", help="the DataLoader way too: slow")
    parser.add_argument("--implicit", action="store_true", help="implicit too: a minute more")
    parser.add_argument("--threads", type=int, nargs="+", help="only compare these numbers of threads")
    parser.add_argument("--data", help="a data set by name or path, instead of made-up rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = read_data(arguments.data) if arguments.data else make_data()
    threads = ", ".join(map(str, arguments.threads or [1]))
    print(
        f"{cpu_model()}, torch {torch.__version__}, numba {numba.__version__}, {threads} threads; "
        f"{NUM_NEGATIVES} negatives; "
        f"{'wall' if arguments.threads else 'CPU'} time, best of {arguments.repeats}"
    )
    if arguments.threads:
        compare_threads(arguments.threads, data, arguments.repeats)
        return
    repeats = arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        for dim, batch_size in SHAPES:
            compare(data, dim, batch_size, Path(folder), repeats, dataloader=arguments.dataloader)
        if arguments.data:
            return
        small = compare(data, *LARGE_SHAPE, Path(folder), repeats)
        ml_20m = make_ml_20m()
        large = compare(ml_20m, *LARGE_SHAPE, Path(folder), repeats, reference=False)
    for name in ("numba", "numba_exclusion"):
        print(f"  {name}: {large[name] / small[name]:.2f} times the time per positive of the small data set")
    if arguments.implicit:
        print_implicit(ml_20m, large)


if __name__ == "__main__":
    main()
