"""Threads of compiled code: all of them run, meet, and never wait for one that has failed."""

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from fasttower_kernels.threads import run_in_threads, wait  # noqa: E402


@numba.njit(nogil=True)
def add_up(rounds, written, sums, counter, thread):
    """In each round every thread writes, and then reads what all of them wrote."""
    threads = len(written)
    for i in range(rounds):
        written[thread] = i * (thread + 1)
        wait(counter, threads)
        sums[thread] += written.sum()
        wait(counter, threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_was_written_before_the_meeting_is_read_after_it(threads):
    rounds = 5000
    written, sums = np.zeros(threads, dtype=np.int64), np.zeros(threads, dtype=np.int64)
    run_in_threads(add_up, (rounds, written, sums), threads)
    right = sum(range(rounds)) * sum(range(1, threads + 1))
    assert sums.tolist() == [right] * threads


@pytest.mark.parametrize("fails", [0, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_lets_the_others_go_and_is_raised(fails, error):
    written, sums = np.zeros(3, dtype=np.int64), np.zeros(3, dtype=np.int64)

    def run(counter, thread):
        if thread == fails:
            raise error("it failed")
        add_up(10, written, sums, counter, thread)

    with pytest.raises(error, match="it failed"):
        run_in_threads(run, (), 3)
