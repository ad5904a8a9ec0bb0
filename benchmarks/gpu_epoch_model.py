"""A model of an epoch on an H100 at MovieLens 20M's shape: `python -m benchmarks.gpu_epoch_model`.

20 million positives, 64 dimensions, 10 negatives, item bias, exclusion by bitmap, float32 tables. All of it
is arithmetic; no GPU is used. A launch takes the largest of three times, and a gap:

- bytes: what it moves from and to memory, at the bandwidth of streaming kernels;
- issue: the instructions of all its programs, at the share of the issue slots that kernels reach;
- latency: the rounds in which its programs, one warp each, pass through the SMs, times what one of them takes
  by itself: its trips to memory, one after another, and its instructions, each waiting for earlier ones.

The bandwidth of the L2 cache and additions that wait for each other are not modelled; a whole item table
counts as memory traffic, though its arrays of 28 MB may stay in the L2 cache.

The rows that a batch touches are expected numbers. A user with the share p of the positives is in a batch of
B with probability 1 - (1 - p)^B; activity and popularity are those of the shape `synthetic-20m`. A row that
is touched with probability P per step has missed more than k steps with probability (1 - P)^k.

Of the kernels as they are, the loop that walks to a row of the order counts once, and draws that are
repeated do not.

"Serial" waits for each negative's gradients before it loads the next negative, has one decision on lazy Adam
for both tables, and replays the missed steps one after another. "Loads first" loads four negatives at once,
decides per table, updates both in one launch, and sums the missed steps by a Gauss rule of three terms.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fasttower.data.synthetic import LARGEST_HISTORY, SHAPES
from fasttower_kernels.adam.lazy_reference import MOST_REPLAYED
from fasttower_kernels.step import steps_per_epoch

SHAPE, DIM, NUM_NEGATIVES = SHAPES["synthetic-20m"], 64, 10
GOALS_S = {65_536: 0.06, 8_192: 0.10, 1_024: 0.25}  # by the positives in a batch

# The H100 SXM at the clock that it holds under load; at most 32 programs are on an SM.
CYCLES_PER_US, SMS, SCHEDULERS, REGISTERS, MOST_PROGRAMS = 1_700, 132, 4, 65_536, 32
BYTES_PER_US = 2.8e6  # of 3.35e6
L2_TRIP, MEMORY_TRIP = 270, 600  # cycles
ISSUED = 0.8  # of the issue slots, at best
GAP_US = 1.5  # from one kernel of a CUDA graph to the next
# Of a warp that has a scheduler to itself: chains of shuffles, Philox and exp, so that the serial step has
# 15,000 cycles; the four elements that a thread replays do not wait for each other.
CYCLES_PER_INSTRUCTION, CYCLES_PER_REPLAYED_INSTRUCTION = 2.85, 1.0

BYTES_PER_PARAMETER = 32  # Adam reads and writes a parameter, its gradient and two moments
USER_BYTES, ITEM_BYTES = DIM * BYTES_PER_PARAMETER, (DIM + 1) * BYTES_PER_PARAMETER
ROWS_PER_PROGRAM, QUADS = 2, -(-NUM_NEGATIVES // 4)


class Program(NamedTuple):
    """A program as Triton 3.9 compiles it for sm_90; instructions and trips are counted in the machine code.

    Attributes:
        registers: per thread, as in `benchmarks.compiled_kernels`.
        instructions: that a warp passes through; serial replays are counted apart.
        l2_trips: waits for the L2 cache, one after another.
        memory_trips: waits for memory.
    """

    registers: int
    instructions: int
    l2_trips: int
    memory_trips: int = 0


# Six trips outside of the negatives: counters, batch, bounds of the known positives, vectors, bias, gradient.
# For each four negatives the bitmap, then vector and bias of one after another, or of all together.
SERIAL_STEP = Program(92, 433 + QUADS * 559 + 33, 6 + QUADS * (1 + 4 * 2))
STEP = Program(119, 445 + QUADS * 507 + 36, 6 + QUADS * (1 + 1))
# Lazy Adam: two users and their positives; up to four negatives of two positives, drawn again; two users.
SERIAL_POSITIVES, SERIAL_NEGATIVES = Program(96, 1_000, 6, 2), Program(96, 1_860, 8, 3)
# An item and its bias; three terms of a sum take two more rounds of its loop.
ITEM = 598 + 2 * 63
POSITIVES = Program(67, 276 + 308 + 2 * 64 + 18 + ITEM + 8, 7, 2)
NEGATIVES = Program(67, 276 + 164 + 23 + NUM_NEGATIVES * ITEM // QUADS + 8, 11, 3)
USERS = Program(72, 529 + 2 * 63, 4, 1)
USER_TERM, ITEM_TERM = 63, 97  # instructions of a serial replay per missed step; an item has a bias


class Rows(NamedTuple):
    """Rows of a table as batches touch them: how many, and how many steps they have missed by then."""

    touched: float
    missed: float  # on average; steps beyond `MOST_REPLAYED` are not counted
    most_missed: float
    long: float  # share of those that have missed more than `MOST_REPLAYED` steps

    @staticmethod
    def of(probability: torch.Tensor) -> Rows:
        """From the probabilities, (rows,) float64, that a batch touches them."""
        touched, rarest = float(probability.sum()), min(float(probability.min()), 1 - 1e-9)
        more_than = [float((probability * (1 - probability) ** k).sum()) for k in range(1, MOST_REPLAYED + 1)]
        most = min(MOST_REPLAYED, -math.log(touched) / math.log1p(-rarest))
        return Rows(touched, sum(more_than) / touched, most, more_than[-1] / touched)


def touched_rows(batch_size: int) -> tuple[Rows, Rows]:
    """Users and items of batches of that size."""
    quantile = (torch.arange(SHAPE.users, dtype=torch.float64) + 0.5) / SHAPE.users
    extra = torch.exp(SHAPE.user_spread * torch.special.ndtri(quantile))
    spare = SHAPE.ratings - SHAPE.users * SHAPE.min_ratings
    extra = extra.clamp(max=float(LARGEST_HISTORY * SHAPE.items * SHAPE.users / spare * extra.mean()))
    activity = (SHAPE.min_ratings + extra * spare / extra.sum()) / SHAPE.ratings
    rank = torch.arange(1, SHAPE.items + 1, dtype=torch.float64)
    popularity = (rank / SHAPE.items + SHAPE.popularity_offset) ** -SHAPE.popularity_exponent
    no_positive = (1 - popularity / popularity.sum()) ** batch_size
    no_negative = (1 - 1 / SHAPE.items) ** (batch_size * NUM_NEGATIVES)
    return Rows.of(1 - (1 - activity) ** batch_size), Rows.of(1 - no_positive * no_negative)


class Part(NamedTuple):
    """Equal programs of a launch: what, how many, and the instructions that one replays and at most."""

    program: Program
    count: int
    replayed: float = 0
    most_replayed: float = 0

    def cycles(self) -> float:
        """What a program takes by itself."""
        _, instructions, l2_trips, memory_trips = self.program
        waits = l2_trips * L2_TRIP + memory_trips * MEMORY_TRIP + instructions * CYCLES_PER_INSTRUCTION
        return waits + self.replayed * CYCLES_PER_REPLAYED_INSTRUCTION


class Launch(NamedTuple):
    """A kernel: the bytes that it moves from and to memory, and its programs that are not plain streaming."""

    num_bytes: float
    parts: tuple[Part, ...] = ()

    def bound(self) -> tuple[float, str]:
        """Microseconds, and what they are bound by."""
        times = [(self.num_bytes / BYTES_PER_US, "bytes")]
        if count := sum(part.count for part in self.parts):
            instructions = sum(p.count * (p.program.instructions + p.replayed) for p in self.parts)
            times.append((instructions / (SMS * SCHEDULERS * ISSUED) / CYCLES_PER_US, "issue"))
            # A warp gets registers in units of 8 per thread.
            registers = 32 * max(-(-part.program.registers // 8) * 8 for part in self.parts)
            rounds = math.ceil(math.ceil(count / SMS) / min(MOST_PROGRAMS, REGISTERS // registers))
            average = sum(part.count * part.cycles() for part in self.parts) / count
            last = max(part.most_replayed - part.replayed for part in self.parts)
            cycles = rounds * average + last * CYCLES_PER_REPLAYED_INSTRUCTION
            times.append((cycles / CYCLES_PER_US, "latency"))
        return max(times)


def plans(batch_size: int) -> dict[str, tuple[Launch, Launch]]:
    """The fused step and Adam's launch."""
    users, items = touched_rows(batch_size)
    programs = batch_size // ROWS_PER_PROGRAM
    sectors = 32 * batch_size * NUM_NEGATIVES  # of the bitmap, which no cache holds
    # User vectors are read, their gradients read and written; those of the items stay in the L2 cache.
    step_bytes = 3 * 4 * DIM * users.touched + sectors
    serial, step = (Launch(step_bytes, (Part(what, programs),)) for what in (SERIAL_STEP, STEP))

    some_users, some_items = users.touched * USER_BYTES, items.touched * ITEM_BYTES
    both, all_items = some_users + some_items + sectors, SHAPE.items * ITEM_BYTES
    # Of two rows that a program has side by side, the one that missed more steps counts.
    user_terms, item_terms = (min(1.5 * rows.missed, MOST_REPLAYED) for rows in (users, items))
    most = users.most_missed * USER_TERM + items.most_missed * ITEM_TERM
    serial_parts = (
        Part(SERIAL_POSITIVES, programs, user_terms * USER_TERM + item_terms * ITEM_TERM, most),
        Part(SERIAL_NEGATIVES, QUADS * programs, NUM_NEGATIVES / QUADS * item_terms * ITEM_TERM),
    )
    parts = (Part(POSITIVES, programs), Part(NEGATIVES, QUADS * programs))
    return {
        "serial, dense": (serial, Launch(SHAPE.users * USER_BYTES + all_items)),
        "serial, lazy": (serial, Launch(both, serial_parts)),
        "loads first, users lazy": (step, Launch(some_users + all_items, (Part(USERS, programs),))),
        "loads first, both lazy": (step, Launch(both, parts)),
    }


def report() -> str:
    """The figures in Markdown."""
    rows = [
        f"- {size:,} positives touch {users.touched:,.0f} users and {items.touched:,.0f} items; users "
        f"missed {users.missed:.1f} steps ({users.long:.0%} over {MOST_REPLAYED}), items {items.missed:.1f}."
        for size in GOALS_S
        for users, items in [touched_rows(size)]
    ]
    head = ("batch", "plan", "step us", "Adam us", "Adam MB", "both us", "epoch s", "by bytes s", "goal s")
    table = [head, ("---",) * len(head)]
    for size, goal in GOALS_S.items():
        millions = steps_per_epoch(SHAPE.ratings, size) / 1e6
        for plan, (step, adam) in plans(size).items():
            (step_us, step_bound), (adam_us, adam_bound) = step.bound(), adam.bound()
            us, bytes_us = step_us + adam_us + 2 * GAP_US, (step.num_bytes + adam.num_bytes) / BYTES_PER_US
            kernels = f"{step_us:.1f} ({step_bound})", f"{adam_us:.1f} ({adam_bound})"
            seconds = f"{us * millions:.3f}", f"{bytes_us * millions:.3f}", f"{goal:.2f}"
            table.append((f"{size:,}", plan, *kernels, f"{adam.num_bytes / 1e6:.0f}", f"{us:.1f}", *seconds))
    return "\n".join([*rows, "", *("| " + " | ".join(row) + " |" for row in table)])


if __name__ == "__main__":
    print(f"{__doc__}\n{report()}")
