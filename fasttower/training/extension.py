"""A trained model with room for new users and items."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttower.config import ResolvedTrainingConfig
from fasttower.model import TwoTower
from fasttower.training.fold_in import fold_in
from fasttower_kernels.known_positives import KnownPositives
from fasttower_kernels.negatives import Negatives
from fasttower_kernels.tables import Interactions


@torch.no_grad()
def extended_model(
    model: TwoTower,
    old_users: Tensor,
    old_items: Tensor,
    interactions: Interactions,
    num_users: int,
    num_items: int,
    config: ResolvedTrainingConfig,
) -> TwoTower:
    """A model of more users and items: known vectors as they are, new ones where training would begin.

    A new item starts at a random vector. A new user starts at the vector that fits the known
    items it touched.

    Args:
        model: U and I rows, on any device; left as it is.
        old_users: (U,), int64: the new row of each of its users.
        old_items: (I,), int64: the new row of each of its items.
        interactions: in the new rows; those of new users are read.
        num_users: rows of the new user table.
        num_items: rows of the new item table.
        config: of the loss and the initial draws.

    Returns:
        The new model, on the device of the old one.
    """
    device = model.tables.users.device
    bigger = TwoTower(
        num_users,
        num_items,
        model.embedding_dim,
        item_bias=model.item_bias is not None,
        temperature=model.temperature,
    )
    bigger = bigger.initialise(config.seed, config.init_scale).to(device)
    bigger.user_tower.vectors[old_users] = model.user_tower.vectors
    bigger.item_tower.vectors[old_items] = model.item_tower.vectors
    if bigger.item_bias is not None and model.item_bias is not None:
        bigger.item_bias[old_items] = model.item_bias

    is_new = torch.ones(num_users, dtype=torch.bool, device=device)
    is_new[old_users] = False
    new_users = is_new.nonzero().squeeze(1)
    old_item_row = torch.full((num_items,), -1, dtype=torch.int64, device=device)
    old_item_row[old_items] = torch.arange(len(old_items), device=device)
    item = old_item_row[interactions.item_index.long()]
    usable = is_new[interactions.user_index.long()] & (item >= 0)
    touched = KnownPositives.from_pairs(
        torch.searchsorted(new_users, interactions.user_index[usable].long()),
        item[usable],
        len(new_users),
        len(old_items),
    )
    if config.negative_pool:  # their expectation has no closed form: new users start as in a new run
        return bigger
    rows = old_item_row[interactions.item_index.long()]
    counts = torch.bincount(rows[rows >= 0], minlength=len(old_items))
    negatives = Negatives(
        config.negative_settings,
        len(new_users),
        len(old_items),
        touched if config.exclude_known_positives else None,
        counts,
        len(rows),
    )
    vectors = fold_in(touched, model.infer_items(), model.item_bias, config.loss_settings, negatives)
    if model.temperature is not None:  # normalised vectors, at the length that trained ones have
        vectors *= model.temperature * model.user_tower.vectors.norm(dim=1).mean()
    knows_some = touched.degrees > 0
    bigger.user_tower.vectors[new_users[knows_some]] = vectors[knows_some]
    return bigger
