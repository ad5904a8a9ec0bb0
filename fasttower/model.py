"""The two-tower model: a vector for each user, one for each item, and their inner product as the logit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fasttower.errors import FastTowerError
from fasttower_kernels.philox import Purpose, derive_key
from fasttower_kernels.similarity import read_items, read_users
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

    With cosine similarity the towers' vectors are normalised where they are read, those of users divided by
    the temperature too, so that the logit is an inner product all the same.

    Attributes:
        user_tower: gives the user vectors (B, D), as they are trained.
        item_tower: gives the item vectors (B, D), as they are trained.
        item_bias: (I,), float32, or None for a model without one.
        temperature: of cosine similarity; None for the dot product.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        embedding_dim: int,
        *,
        item_bias: bool = True,
        temperature: float | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.embedding_dim = embedding_dim
        self.user_tower = EmbeddingTower(num_users, embedding_dim)
        self.item_tower = EmbeddingTower(num_items, embedding_dim)
        self.item_bias = nn.Parameter(torch.zeros(num_items)) if item_bias else None

    def initialise(self, seed: int, scale: float) -> TwoTower:
        """Draw the vectors from N(0, scale^2), with the same draws on every device."""
        with torch.no_grad():
            for index, tower in enumerate((self.user_tower, self.item_tower)):
                low, high = derive_key(seed, Purpose.INITIAL_TABLES, index)
                generator = np.random.Generator(np.random.PCG64([low, high]))
                draws = generator.standard_normal((tower.num_rows, self.embedding_dim), dtype=np.float32)
                tower.vectors.copy_(torch.from_numpy(draws).mul_(scale))
        return self

    def add_directions(self, users: Tensor, items: Tensor, length: float) -> TwoTower:
        """Add rows (U, D) and (I, D) of length 1, times a length, to the vectors."""
        with torch.no_grad():
            for tower, rows in ((self.user_tower, users), (self.item_tower, items)):
                tower.vectors.add_(rows, alpha=length)
        return self

    def infer_users(self, user_index: Tensor | None = None) -> Tensor:
        """The vectors (B, D) of users (B,), or of all users (U, D), as the logit reads them."""
        return read_users(self.user_tower(user_index), self.temperature)

    def infer_items(self, item_index: Tensor | None = None) -> Tensor:
        """The vectors (B, D) of items (B,), or of all items (I, D), as the logit reads them."""
        return read_items(self.item_tower(item_index), self.temperature)

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
        """The vectors and the bias on the CPU, unpadded, under the names of the run directory.

        Embeddings are what an inner product is taken of. With cosine similarity the tables that are trained
        are there too.
        """
        tensors = {"user_embedding": self.infer_users(), "item_embedding": self.infer_items()}
        if self.temperature is not None:
            tensors |= {"user_table": self.user_tower.vectors, "item_table": self.item_tower.vectors}
        if self.item_bias is not None:
            tensors["item_bias"] = self.item_bias
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @staticmethod
    def from_saved(tensors: dict[str, Tensor], temperature: float | None = None) -> TwoTower:
        """The model that `saved_tensors` came from.

        Args:
            tensors: by name.
            temperature: of cosine similarity; None for the dot product.

        Raises:
            FastTowerError: tensors that are missing or do not fit each other.
        """
        kind = "embedding" if temperature is None else "table"
        users, items = tensors.get(f"user_{kind}"), tensors.get(f"item_{kind}")
        bias = tensors.get("item_bias")
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        message = (
            f"the weights are {shapes}; expected user_{kind} (U, D), item_{kind} (I, D) and maybe"
            " item_bias (I,)."
        )
        if users is None or items is None or not users.ndim == items.ndim == 2:
            raise FastTowerError(message)
        if users.shape[1] != items.shape[1] or (bias is not None and bias.shape != items.shape[:1]):
            raise FastTowerError(message)
        model = TwoTower(
            len(users), len(items), users.shape[1], item_bias=bias is not None, temperature=temperature
        )
        with torch.no_grad():
            model.user_tower.vectors.copy_(users)
            model.item_tower.vectors.copy_(items)
            if model.item_bias is not None and bias is not None:
                model.item_bias.copy_(bias)
        return model
