"""Well-written torch loops that train what the training step trains, without exclusion and item bias.

Each is a function of dimension, batch size and data that returns a function that trains some steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from benchmarks.shapes import Data, make_tables

NUM_NEGATIVES = 10
LEARNING_RATE = 1e-3

Steps = Callable[[int], Any]
"""Trains that many steps."""


def loss_mulsum(users, items, user_index, item_index, labels):
    return F.binary_cross_entropy_with_logits(
        (users[user_index][:, None] * items[item_index]).sum(-1), labels
    )


def loss_bmm(users, items, user_index, item_index, labels):
    logits = torch.bmm(items[item_index], users[user_index][:, :, None])[:, :, 0]
    return F.binary_cross_entropy_with_logits(logits, labels)


def loss_sparse(users, items, user_index, item_index, labels):
    return F.binary_cross_entropy_with_logits(
        (users(user_index)[:, None] * items(item_index)).sum(-1), labels
    )


def gradients_by_hand(users, items, user_gradient, item_gradient, user_index, item_index, labels):
    """Write the gradients of `loss_mulsum`, and return the loss: what torch.compile makes the most of."""
    u, v = users[user_index], items[item_index]
    logits = (u[:, None] * v).sum(-1)
    slopes = (torch.sigmoid(logits) - labels) / labels.numel()
    user_gradient.zero_().index_add_(0, user_index, (slopes[:, :, None] * v).sum(1))
    rows = (slopes[:, :, None] * u[:, None, :]).view(-1, items.shape[1])
    item_gradient.zero_().index_add_(0, item_index.view(-1), rows)
    return F.binary_cross_entropy_with_logits(logits, labels)


def _loop(step: Callable[..., Any], batch_size: int, data: Data) -> Steps:
    """Shuffled rows and drawn negatives for a step of user index, item index and labels."""
    labels = torch.zeros(batch_size, 1 + NUM_NEGATIVES)
    labels[:, 0] = 1
    users, items = data.interactions.user_index.long(), data.interactions.item_index.long()
    num_rows = len(users)
    order = torch.randperm(num_rows)
    done = 0

    def steps(count: int) -> None:
        nonlocal done
        for _ in range(count):
            rows = order[done * batch_size % (num_rows - batch_size) :][:batch_size]
            done += 1
            negatives = torch.randint(data.num_items, (batch_size, NUM_NEGATIVES))
            step(users[rows], torch.cat([items[rows][:, None], negatives], dim=1), labels)

    return steps


def _autograd_step(optimiser: torch.optim.Optimizer, loss_of: Callable[..., Any]) -> Callable[..., None]:
    def step(*batch: Any) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss_of(*batch).backward()
        optimiser.step()

    return step


def _parameters(dim: int, data: Data) -> list[torch.nn.Parameter]:
    tables = make_tables(dim, data)
    return [torch.nn.Parameter(tables.users), torch.nn.Parameter(tables.items)]


def torch_way(loss_of: Callable[..., Any], dim: int, batch_size: int, data: Data) -> Steps:
    """Autograd and fused Adam."""
    parameters = _parameters(dim, data)
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    return _loop(_autograd_step(optimiser, partial(loss_of, *parameters)), batch_size, data)


def compiled_way(dim: int, batch_size: int, data: Data) -> Steps:
    """The same, with the loss through torch.compile."""
    return torch_way(torch.compile(loss_mulsum, dynamic=False), dim, batch_size, data)


def manual_compiled_way(dim: int, batch_size: int, data: Data) -> Steps:
    """Gradients by hand through torch.compile, and fused Adam."""
    parameters = _parameters(dim, data)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    compiled = torch.compile(torch.no_grad()(gradients_by_hand), dynamic=False)

    def step(*batch: torch.Tensor) -> None:
        compiled(*parameters, *(parameter.grad for parameter in parameters), *batch)
        optimiser.step()

    return _loop(step, batch_size, data)


def sparse_adam_way(dim: int, batch_size: int, data: Data) -> Steps:
    """Sparse embeddings and torch.optim.SparseAdam: another optimiser."""
    embeddings = [
        torch.nn.Embedding.from_pretrained(table.data, freeze=False, sparse=True)
        for table in _parameters(dim, data)
    ]
    optimiser = torch.optim.SparseAdam([embedding.weight for embedding in embeddings], lr=LEARNING_RATE)
    return _loop(_autograd_step(optimiser, partial(loss_sparse, *embeddings)), batch_size, data)


class DrawnRows(torch.utils.data.Dataset):
    """A positive and its negatives per row, as notebooks draw them."""

    def __init__(self, data: Data) -> None:
        self.users, self.items = data.interactions.user_index.numpy(), data.interactions.item_index.numpy()
        self.num_items = data.num_items

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, row: int) -> tuple[int, Any, Any]:
        negatives = np.random.randint(0, self.num_items, NUM_NEGATIVES)
        return (
            int(self.users[row]),
            np.concatenate([[self.items[row]], negatives]),
            np.array([1.0] + [0.0] * NUM_NEGATIVES, dtype=np.float32),
        )


def dataloader_way(dim: int, batch_size: int, data: Data) -> Steps:
    """A DataLoader that draws row by row."""
    parameters = _parameters(dim, data)
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    step = _autograd_step(optimiser, partial(loss_mulsum, *parameters))
    loader = torch.utils.data.DataLoader(DrawnRows(data), batch_size=batch_size, shuffle=True)
    batches = iter(loader)

    def steps(count: int) -> None:
        nonlocal batches
        for _ in range(count):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
            step(*batch)

    return steps
