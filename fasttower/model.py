"""The two-tower model: a vector for each user, a vector for each item, their dot product as the logit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fasttower.errors import FastTowerError
from fasttower_kernels.philox import Purpose, derive_key
from fasttower_kernels.tables import Tables, padded


class EmbeddingTower(nn.Module):
    """A tower that knows its entities by index alone: one learned vector each.

    The interface of a tower is `forward` and `num_rows`.

    Attributes:
        table: (R, P), float32: the vectors, each row padded with zeros to a multiple of 4 floats.
    """

    def __init__(self, num_rows: int, embedding_dim: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.table = nn.Parameter(torch.zeros(num_rows, padded(embedding_dim)))

    @property
    def num_rows(self) -> int:
        """R, the number of entities."""
        return len(self.table)

    @property
    def vectors(self) -> Tensor:
        """(R, D): the table without its padding."""
        return self.table[:, : self.embedding_dim]

    def forward(self, index: Tensor | None = None) -> Tensor:
        """The vectors (B, D) of entities (B,), integer, or of all of them."""
        return self.vectors if index is None else self.vectors[index.long()]


class TwoTower(nn.Module):
    """logit(user, item) = <user vector, item vector> + item bias.

    Attributes:
        user_tower: gives the user vectors (B, D).
        item_tower: gives the item vectors (B, D).
        item_bias: (I,), float32, or None for a model without one.
    """

    def __init__(self, num_users: int, num_items: int, embedding_dim: int, *, item_bias: bool = True) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.user_tower = EmbeddingTower(num_users, embedding_dim)
        self.item_tower = EmbeddingTower(num_items, embedding_dim)
        self.item_bias = nn.Parameter(torch.zeros(num_items)) if item_bias else None

    def initialise(self, seed: int, scale: float) -> TwoTower:
        """Draw the vectors from N(0, scale^2), on the CPU, so that every device starts alike."""
        with torch.no_grad():
            for index, tower in enumerate((self.user_tower, self.item_tower)):
                low, high = derive_key(seed, Purpose.INITIAL_TABLES, index)
                generator = np.random.Generator(np.random.PCG64([low, high]))
                draws = generator.standard_normal((tower.num_rows, self.embedding_dim), dtype=np.float32)
                tower.vectors.copy_(torch.from_numpy(draws).mul_(scale))
        return self

    def infer_users(self, user_index: Tensor | None = None) -> Tensor:
        """The vectors (B, D) of users (B,), or of all users (U, D)."""
        return self.user_tower(user_index)

    def infer_items(self, item_index: Tensor | None = None) -> Tensor:
        """The vectors (B, D) of items (B,), or of all items (I, D)."""
        return self.item_tower(item_index)

    def score(self, user_index: Tensor, item_index: Tensor) -> Tensor:
        """The logits (B,) of pairs of users (B,) and items (B,)."""
        logits = (self.infer_users(user_index) * self.infer_items(item_index)).sum(-1)
        return logits if self.item_bias is None else logits + self.item_bias[item_index.long()]

    @property
    def tables(self) -> Tables:
        """The parameters as the training step takes them; changing them changes the model."""
        bias = None if self.item_bias is None else self.item_bias.data
        return Tables(self.user_tower.table.data, self.item_tower.table.data, bias)

    def saved_tensors(self) -> dict[str, Tensor]:
        """The parameters on the CPU, unpadded, under the names of the run directory."""
        tensors = {"user_embedding": self.infer_users(), "item_embedding": self.infer_items()}
        if self.item_bias is not None:
            tensors["item_bias"] = self.item_bias
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def from_saved(tensors: dict[str, Tensor]) -> TwoTower:
        """The model that `saved_tensors` came from.

        Raises:
            FastTowerError: tensors that are missing or do not fit each other.
        """
        users, items = tensors.get("user_embedding"), tensors.get("item_embedding")
        bias = tensors.get("item_bias")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        message = (
            f"the weights are {shapes}; expected user_embedding (U, D), item_embedding (I, D) and maybe"
            " item_bias (I,)."
        )
        if users is None or items is None or not users.ndim == items.ndim == 2:
            raise FastTowerError(message)
        if users.shape[1] != items.shape[1] or (bias is not None and bias.shape != items.shape[:1]):
            raise FastTowerError(message)
        model = TwoTower(len(users), len(items), users.shape[1], item_bias=bias is not None)
        with torch.no_grad():
            model.user_tower.vectors.copy_(users)
            model.item_tower.vectors.copy_(items)
            if model.item_bias is not None and bias is not None:
                model.item_bias.copy_(bias)
        return model
