"""Initial vectors from the leading singular vectors."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from fasttower.training.spectral import spectral_vectors
from fasttower_kernels.known_positives import KnownPositives


@pytest.fixture(scope="module")
def known():
    """Of users who like 20 items, and each group 20 of its own: four singular values stand out."""
    generator = torch.Generator().manual_seed(1)
    users = torch.arange(2, 302)  # two users and an item have none
    users = users.repeat_interleave(20 + users % 4 * 40)
    liked = torch.randint(20, (len(users),), generator=generator)
    own = torch.rand(len(users), generator=generator) < 0.5
    items = 1 + liked + torch.where(own, 20 + users % 4 * 20, 0)
    return KnownPositives.from_pairs(users, items, 302, 101)


def test_inner_products_are_those_of_the_leading_singular_vectors(known):
    matrix = torch.zeros(known.num_users, known.num_items)
    rows = torch.arange(known.num_users).repeat_interleave(known.degrees)
    matrix[rows, known.items.long()] = 1
    left, values, right = torch.linalg.svd(normalize(matrix), full_matrices=False)
    expected = normalize(left[:, :4] * values[:4].sqrt()) @ normalize(right[:4].T * values[:4].sqrt()).T
    touched = matrix.sum(1)[:, None] * matrix.sum(0) > 0
    users, items = spectral_vectors(known, 4, seed=0)
    assert cosine_similarity((users @ items.T)[touched], expected[touched], dim=0) > 0.9994
    assert (users @ items.T)[~touched].eq(0).all()


def test_rows_are_of_length_one_or_zero(known):
    for rows, untouched in zip(spectral_vectors(known, 8, seed=0), (2, 1), strict=True):
        lengths = rows.norm(dim=1)
        assert lengths.eq(0).sum() == untouched
        assert lengths[lengths > 0].allclose(torch.ones(()))


def test_columns_past_the_rank_are_zero():
    known = KnownPositives.from_pairs(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3, 2)
    users, items = spectral_vectors(known, 5, seed=0)
    assert users.shape == (3, 5)
    assert items.shape == (2, 5)
    assert users[:, 2:].eq(0).all()
    assert users.isfinite().all()
    assert items.isfinite().all()


def test_an_empty_matrix_has_no_directions():
    none = torch.zeros(0, dtype=torch.int64)
    users, items = spectral_vectors(KnownPositives.from_pairs(none, none, 3, 2), 4, seed=0)
    assert users.eq(0).all()
    assert items.eq(0).all()
