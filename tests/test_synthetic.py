import dataclasses
import tracemalloc

import numpy as np
import pytest

from fasttower.data.synthetic import SHAPES, Shape, generate, generate_shape, write_csv
from fasttower.errors import FastTowerError

TINY = Shape(users=40, items=60, ratings=400, min_ratings=5)
LONG_CATALOGUE = Shape(users=7, items=131, ratings=200, min_ratings=20)
MINIMUM_ONLY = Shape(users=53, items=97, ratings=53 * 3, min_ratings=3)
ONE_EACH = Shape(users=5, items=4, ratings=5, min_ratings=1)
FULL_AND_SKEWED = Shape(users=101, items=40, ratings=1010, min_ratings=1, user_spread=4.0)
SEVERAL_CHUNKS = Shape(users=4001, items=3001, ratings=90_000)


@pytest.fixture(scope="module")
def small():
    return generate("synthetic-100k", 0)


@pytest.fixture(scope="module")
def million():
    return generate("synthetic-1m", 0)


def counts_of(ids):
    return np.bincount(ids)[1:]


def top_share(data, fraction):
    counts = np.sort(counts_of(data.item_id))[::-1]
    return counts[: int(len(counts) * fraction)].sum() / counts.sum()


class TimeSplit:
    """The last 20% of the time line as test, cold rows dropped, and NDCG@10 with seen items left out."""

    def __init__(self, data, users, items):
        order = np.argsort(data.timestamp, kind="stable")
        cut = int(len(order) * 0.8)
        pairs = np.stack([data.user_id - 1, data.item_id - 1])
        self.seen = np.zeros((users, items), bool)
        self.seen[tuple(pairs[:, order[:cut]])] = True
        relevant = np.zeros((users, items), bool)
        relevant[tuple(pairs[:, order[cut:]])] = True
        self.relevant = relevant & self.seen.any(1)[:, None] & self.seen.any(0)
        self.test_users = np.flatnonzero(self.relevant.any(1))
        self.popularity = self.seen.sum(0).astype(np.float32)

    def ndcg(self, scores):
        """Mean over the test users, whose scores these are, in order."""
        seen, relevant = self.seen[self.test_users], self.relevant[self.test_users]
        best = np.argsort(np.where(seen, -np.inf, scores), axis=1)[:, :-11:-1]
        discounts = 1 / np.log2(np.arange(2, 12))
        gains = np.take_along_axis(relevant, best, axis=1) @ discounts
        ideal = np.cumsum(discounts)[np.minimum(relevant.sum(1), 10) - 1]
        return float((gains / ideal).mean())


@pytest.fixture(scope="module")
def split(million):
    return TimeSplit(million, 6040, 3706)


@pytest.fixture(scope="module")
def popularity_ndcg(split):
    return split.ndcg(np.tile(split.popularity, (len(split.test_users), 1)))


@pytest.fixture(scope="module")
def planted_ndcg(million, split):
    return split.ndcg(million.planted_scores(split.test_users + 1))


@pytest.mark.parametrize("name", ["synthetic-100k", "synthetic-1m"])
def test_named_shapes_have_their_users_items_and_ratings(name, request):
    data = request.getfixturevalue("small" if name == "synthetic-100k" else "million")
    shape = SHAPES[name]
    expected = {
        "synthetic-100k": (943, 1_682, 100_000),
        "synthetic-1m": (6_040, 3_706, 1_000_209),
    }[name]
    assert (shape.users, shape.items, shape.ratings) == expected
    assert [len(np.unique(data.user_id)), len(np.unique(data.item_id)), len(data.rating)] == list(expected)
    assert counts_of(data.user_id).min() >= 20


def test_the_largest_shape_is_that_of_movielens_20m():
    shape = SHAPES["synthetic-20m"]
    assert (shape.users, shape.items, shape.ratings) == (138_493, 26_744, 20_000_263)
    assert shape.rating_step == 0.5


@pytest.mark.parametrize(
    "shape",
    [TINY, LONG_CATALOGUE, MINIMUM_ONLY, ONE_EACH, FULL_AND_SKEWED, SEVERAL_CHUNKS],
    ids=["tiny", "long-catalogue", "minimum-only", "one-each", "full-and-skewed", "several-chunks"],
)
def test_any_shape_is_met_to_the_row(shape):
    data = generate_shape(shape, 3)
    assert data.user_id.dtype == data.item_id.dtype == np.int32
    assert (data.rating.dtype, data.timestamp.dtype) == (np.float32, np.int64)
    assert len(data.user_id) == len(data.item_id) == len(data.rating) == len(data.timestamp) == shape.ratings
    assert set(data.user_id.tolist()) == set(range(1, shape.users + 1))
    assert set(data.item_id.tolist()) == set(range(1, shape.items + 1))
    assert counts_of(data.user_id).min() >= shape.min_ratings
    # By user, then by item, strictly: no pair comes twice.
    assert (np.diff(data.user_id.astype(np.int64) * (shape.items + 1) + data.item_id) > 0).all()
    steps = data.rating / shape.rating_step
    assert (steps == np.rint(steps)).all()
    assert data.rating.min() >= shape.rating_step
    assert data.rating.max() <= 5
    assert data.timestamp.min() >= shape.first_timestamp
    assert data.timestamp.max() < shape.first_timestamp + shape.span_seconds


def test_rows_are_those_of_the_seed():
    first, again, other = generate_shape(TINY, 7), generate_shape(TINY, 7), generate_shape(TINY, 8)
    for column in ("user_id", "item_id", "rating", "timestamp"):
        np.testing.assert_array_equal(getattr(first, column), getattr(again, column))
    assert not np.array_equal(first.item_id, other.item_id)
    assert not np.array_equal(first.timestamp, other.timestamp)


def test_known_answers():
    """Pinned so that a run of an old version can be repeated; change them on purpose alone."""
    data = generate_shape(TINY, 7)
    assert data.item_id[:17].tolist() == [1, 3, 5, 22, 35, 41, 46, 53, 2, 5, 16, 20, 22, 30, 35, 42, 50]
    assert data.rating[:12].tolist() == [4, 3, 3, 3, 5, 4, 3, 4, 4, 1, 4, 3]
    assert data.timestamp[:4].tolist() == [984796157, 984794456, 984795974, 984794400]


def test_known_checksums(small):
    """The rows are the same on every machine, to the last one."""
    place = np.arange(len(small.user_id)) % 1009
    sums = [
        int(np.rint(column * 2.0).astype(np.int64) @ place)
        for column in (small.user_id, small.item_id, small.rating)
    ]
    assert sums == [47123281408, 83976883824, 356653070]
    assert int(small.timestamp.sum()) == 88476876479694


def test_popularity_is_skewed_as_in_movielens(million):
    # The real ML-1M: 0.087, 0.444, 0.924.
    assert 0.05 < top_share(million, 0.01) < 0.12
    assert 0.40 < top_share(million, 0.10) < 0.55
    assert 0.85 < top_share(million, 0.50) < 0.96
    # The popular items are not those with small ids.
    assert abs(np.corrcoef(np.arange(3706), counts_of(million.item_id))[0, 1]) < 0.1


def test_users_differ_as_in_movielens(million):
    counts = counts_of(million.user_id)
    # The real ML-1M: median 96, 95% quantile 556, most 2,314.
    assert 80 < np.median(counts) < 115
    assert 400 < np.quantile(counts, 0.95) < 700
    assert 1_000 < counts.max() < 2_500


def test_users_come_rate_and_sometimes_return(million, split):
    starts = np.flatnonzero(np.diff(million.user_id, prepend=0))
    first = np.minimum.reduceat(million.timestamp, starts)
    last = np.maximum.reduceat(million.timestamp, starts)
    soon = million.timestamp - np.repeat(first, counts_of(million.user_id)) < 86_400
    assert 0.65 < soon.mean() < 0.9
    assert 0.3 < (last - first < 86_400).mean() < 0.7
    # Arrivals all along the time line, and enough users on both sides of the cut.
    assert np.ptp(million.timestamp) > 0.98 * SHAPES["synthetic-1m"].span_seconds
    assert 900 < len(split.test_users) < 1_600


def test_ratings_look_like_movielens_and_follow_taste(million):
    assert 3.4 < million.rating.mean() < 3.8
    assert 0.9 < million.rating.std() < 1.2
    assert set(np.unique(million.rating).tolist()) == {1, 2, 3, 4, 5}
    rows = million.user_id <= 500
    affinities = million.planted.affinities(np.arange(500))[
        million.user_id[rows] - 1, million.item_id[rows] - 1
    ]
    assert np.corrcoef(affinities, million.rating[rows])[0, 1] > 0.15


def test_planted_ranking_beats_popularity(split, popularity_ndcg, planted_ndcg, million):
    assert popularity_ndcg > 0.05
    assert planted_ndcg > 2.2 * popularity_ndcg
    strangers = million.planted_scores(np.roll(split.test_users, 1) + 1)
    assert split.ndcg(strangers) < popularity_ndcg


def test_factors_can_be_learnt_but_not_wholly(split, popularity_ndcg, planted_ndcg):
    """A plain truncated SVD of the training matrix, fitted by a few subspace iterations."""
    matrix = split.seen / np.sqrt(1 + split.popularity)
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], 16)).astype(np.float32)
    for _ in range(5):
        basis, _ = np.linalg.qr(matrix.T @ (matrix @ basis))
    scores = matrix[split.test_users] @ basis @ basis.T * np.sqrt(1 + split.popularity)
    learnt = split.ndcg(scores)
    assert 1.3 * popularity_ndcg < learnt < 0.9 * planted_ndcg


def test_planted_scores_are_the_weights_of_the_choices():
    data = generate_shape(TINY, 7)
    planted = data.planted
    dots = planted.user_factors.astype(np.float64) @ planted.item_factors.astype(np.float64).T
    expected = planted.popularity * np.maximum(1 + planted.scale * dots / 8, 2**-5) ** 8
    np.testing.assert_allclose(data.planted_scores(np.arange(1, 41)), expected, rtol=1e-5)
    np.testing.assert_array_equal(
        data.planted_scores([40, 3]), data.planted_scores(np.arange(1, 41))[[39, 2]]
    )
    # Exact in float32, whatever the order of addition.
    assert ((planted.user_factors * 16) % 1 == 0).all()
    assert ((planted.item_factors * 16) % 1 == 0).all()
    np.testing.assert_array_equal(planted.user_factors @ planted.item_factors.T, dots)


def test_chances_follow_the_weights():
    """Over many seeds, an item is chosen about as often as its share of the weights says."""
    shape = dataclasses.replace(TINY, users=2000, items=400, ratings=4000, min_ratings=2, strength=1.0)
    data = generate_shape(shape, 1)
    weights = data.planted_scores(np.arange(1, 2001)).astype(np.float64)
    chances = 2 * weights / weights.sum(1, keepdims=True)
    chosen = np.zeros_like(chances, dtype=bool)
    chosen[data.user_id - 1, data.item_id - 1] = True
    free = np.arange(2000)[:, None] % 400 != np.arange(400)
    free &= np.arange(2000)[:, None] >= 400  # the first users rate one item each that is not drawn
    groups = np.digitize(chances, np.quantile(chances, [0.5, 0.8, 0.95, 0.99]))
    for group in range(5):
        cells = free & (groups == group)
        assert chosen[cells].sum() == pytest.approx(chances[cells].sum(), rel=0.15)


def test_memory_is_bounded_by_the_chunk():
    generate_shape(TINY, 0)
    tracemalloc.start()
    try:
        generate_shape(SEVERAL_CHUNKS, 0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * SEVERAL_CHUNKS.users * SEVERAL_CHUNKS.items / 2


def test_csv_has_the_layout_of_movielens_20m(tmp_path):
    pl = pytest.importorskip("polars")
    data = generate_shape(dataclasses.replace(TINY, rating_step=0.5), 7)
    path = tmp_path / "ratings.csv"
    write_csv(data, path)
    lines = path.read_text().splitlines()
    assert lines[0] == "userId,movieId,rating,timestamp"
    assert lines[1] == f"1,{data.item_id[0]},{data.rating[0]:.1f},{data.timestamp[0]}"
    assert len(lines) == 401
    frame = pl.read_csv(path)
    for name, column in zip(
        frame.columns, (data.user_id, data.item_id, data.rating, data.timestamp), strict=True
    ):
        np.testing.assert_array_equal(frame[name].to_numpy(), column)


def test_csv_that_cannot_be_written_is_one_clear_line(tmp_path):
    pytest.importorskip("polars")
    path = tmp_path / "nowhere" / "ratings.csv"
    with pytest.raises(FastTowerError, match="can't write") as caught:
        write_csv(generate_shape(TINY, 7), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(FastTowerError, match=r"'synthetic-2m'.*synthetic-100k, synthetic-1m, synthetic-20m"):
        generate("synthetic-2m", 0)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seed_out_of_range(seed):
    with pytest.raises(FastTowerError, match="seed"):
        generate("synthetic-100k", seed)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 60, 400, 5), "at least 1 of each"),
        ((4, 60, 60, 5), "60 synthetic items, expected at most 20"),
        ((40, 60, 199, 5), "199 synthetic ratings, expected 200"),
        ((40, 60, 601, 5), "601 synthetic ratings, expected 200 .* to 600"),
    ],
)
def test_shapes_that_cannot_be(shape, message):
    with pytest.raises(FastTowerError, match=message):
        Shape(*shape)


@pytest.mark.slow
def test_twenty_million_rows():
    data = generate("synthetic-20m", 0)
    assert len(data.rating) == 20_000_263
    assert (np.diff(data.user_id.astype(np.int64) * 26_745 + data.item_id) > 0).all()
    assert (counts_of(data.item_id) > 0).all()
    assert (counts_of(data.user_id) >= 20).all()
    assert data.rating.min() == 0.5
    assert 0.15 < top_share(data, 0.01) < 0.4
