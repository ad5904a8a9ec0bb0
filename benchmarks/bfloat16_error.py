"""What bfloat16 tables change in the loss of a trained run and in its gradients.

    python -m benchmarks.bfloat16_error RUN

A batch of the pairs that the run was fitted to, with negatives as in training, against float64 of the run's
own tables: of the loss the relative error, of each gradient |difference| / |gradient| over the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import fasttower
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.philox import seed_key
from fasttower_kernels.shuffle import epoch_key
from fasttower_kernels.shuffle.reference import shuffled_rows
from fasttower_kernels.step import add_gradients
from fasttower_kernels.tables import Interactions, Tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=3)
    asked = parser.parse_args()
    run = fasttower.load_run(asked.run)
    config, known, tables = run.config, run.known_positives, run.model.tables
    loss = config.loss_settings
    users = torch.repeat_interleave(torch.arange(known.num_users), known.degrees).int()
    negatives = Negatives.of(
        config.negative_settings,
        Interactions(users, known.items.int()),
        known.num_users,
        known.num_items,
        known if config.exclude_known_positives else None,
    )
    rows = shuffled_rows(torch.arange(len(users)), len(users), epoch_key(config.seed, 0))
    rounded = [table.bfloat16().float() for table in (tables.users, tables.items)]
    exact = Tables(*(table.double() for table in tables))
    print(f"dim {config.embedding_dim}, {len(users):,} pairs, batches of {config.batch_size:,}")
    for step, batch_rows in enumerate(rows.split(config.batch_size or 0)[: asked.batches]):
        batch = Interactions(users[batch_rows], known.items[batch_rows].int())
        call = {"key": seed_key(config.seed), "step": step, "backend": "torch"}
        right = exact.zeros_like()
        right_value = add_gradients(exact, right, batch, negatives, loss, **call)
        for name, read in (("float32", tables), ("bfloat16", Tables(*rounded, tables.item_bias))):
            gradients = tables.zeros_like()
            value = add_gradients(read, gradients, batch, negatives, loss, **call)
            errors = [
                float((gradient.double() - exactly).norm() / exactly.norm())
                for gradient, exactly in zip(gradients, right, strict=True)
            ]
            print(
                f"batch {step}, {name}: loss {abs(float(value) / float(right_value) - 1):.1e}, "
                f"gradients of users, items, bias {', '.join(f'{error:.1e}' for error in errors)}"
            )


if __name__ == "__main__":
    main()
