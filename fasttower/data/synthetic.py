"""Synthetic ratings in MovieLens' shape, with planted user and item factors.

A stand-in for MovieLens where there is no network: as many users, items and ratings, a heavy tail of ratings
a user, a few items that many rate, users who come, rate a lot in an hour and often never return. Underneath
lie factors that a two-tower model can find, and that tell how far it got.

The model of a user's choice:

    affinity[u, i] = scale * <user_factors[u], item_factors[i]>     normal; each factor weaker than the last
    weight[u, i]   = popularity[i] * (1 + affinity[u, i] / 8)^8     about popularity * exp(affinity)

User u rates the items with the smallest `uniform / weight[u, i]`, as many as are due: sequential Poisson
sampling: a fixed number of distinct items, with chances about proportional to their weights. So there
are no repeats to throw away, and no model can expect to rank better than `weight` does. The first factors are
strong, and few ratings show them; the last are weak, and keep trained models below the planted ranking.

The same name and seed give the same rows on every machine, whatever its BLAS or vector units. Factors are
whole sixteenths, so their dot products are exact in float32 in any order of addition; weights are made of
single sums and products, which IEEE rounds alike everywhere. (An `exp` would differ in its last bit, and with
it one choice in some million.) Memory beside the result is bounded by a fixed number of cells of the
users x items matrix.

Source: E. Ohlsson, "Sequential Poisson Sampling", Journal of Official Statistics 14 (1998), 149-162, for the
sampling; B. Mandelbrot's Zipf law with an offset, for the popularity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fasttower.errors import FastTowerError, quoted, reason, shown
from fasttower_kernels.philox import Purpose, derive_key

__all__ = [
    "SHAPES",
    "Planted",
    "Shape",
    "SyntheticData",
    "generate",
    "generate_shape",
    "popularity",
    "ratings_per_user",
    "write_csv",
]

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int32]

NUM_FACTORS = 16
FACTOR_STEPS = 16  # factors are multiples of 1/16
FACTOR_LIMIT = 4  # in -4..4: a dot product is at most 2^16 steps of 1/256, float32 is exact to 2^24
CELLS_PER_CHUNK = 1 << 19  # of the users x items matrix, 2 MiB; another number would draw other rows
LARGEST_HISTORY = 0.4  # of the catalogue, about what the busiest user has rated
RETURNING_USERS = 0.55  # the others rate in one session and never come back
FIRST_SESSION = 0.6  # of a returning user's ratings
LATER_SESSIONS = 7
SESSION_SECONDS = 3600


@dataclass(frozen=True)
class Shape:
    """What a synthetic data set looks like from outside.

    Attributes:
        users: number of users, each with at least `min_ratings` ratings.
        items: number of items, each with at least one rating.
        ratings: number of ratings.
        min_ratings: the fewest ratings a user has.
        user_spread: standard deviation of the log of the ratings a user has beyond `min_ratings`.
        popularity_exponent: s of the popularity `(rank / items + popularity_offset) ** -s`.
        popularity_offset: the offset in it; a smaller one makes the most popular items more popular.
        rating_step: ratings are multiples of it, from one step to 5.
        first_timestamp: start of the time line, seconds since 1970.
        span_seconds: its length.
        strength: standard deviation of the affinities: how much taste counts beside popularity.
        factor_decay: factor f = 1..16 has a standard deviation in proportion to `f ** -factor_decay` over the
            users; a larger one leaves fewer factors that matter, and makes them easier to learn.
    """

    users: int
    items: int
    ratings: int
    min_ratings: int = 20
    user_spread: float = 1.14
    popularity_exponent: int = 4
    popularity_offset: float = 0.35
    rating_step: float = 1.0
    first_timestamp: int = 956_703_932
    span_seconds: int = 3 * 365 * 86_400
    strength: float = 0.7
    factor_decay: float = 0.6

    def __post_init__(self) -> None:
        if min(self.users, self.items, self.min_ratings) < 1:
            raise FastTowerError(
                f"{self.users} synthetic users, {self.items} items, {self.min_ratings} ratings a user; "
                "expected at least 1 of each: raise them"
            )
        if self.items > self.users * self.min_ratings:
            raise FastTowerError(
                f"{self.items} synthetic items, expected at most {self.users * self.min_ratings} "
                "(users * min_ratings), so that each can be rated: lower items or raise min_ratings"
            )
        fewest, most = self.users * self.min_ratings, self.users * self.items // 4
        if not fewest <= self.ratings <= most:
            raise FastTowerError(
                f"{self.ratings} synthetic ratings, expected {fewest} (users * min_ratings) to {most} "
                "(a quarter of users * items): change one of them"
            )


SHAPES: dict[str, Shape] = {
    "synthetic-100k": Shape(
        943,
        1_682,
        100_000,
        first_timestamp=874_724_710,
        span_seconds=215 * 86_400,
        strength=0.8,
        factor_decay=0.8,
    ),
    "synthetic-1m": Shape(6_040, 3_706, 1_000_209),
    "synthetic-20m": Shape(
        138_493,
        26_744,
        20_000_263,
        user_spread=1.38,
        popularity_offset=0.1,
        rating_step=0.5,
        first_timestamp=789_652_004,
        span_seconds=20 * 365 * 86_400,
    ),
}


@dataclass(frozen=True)
class Planted:
    """What decided the choices.

    Attributes:
        user_factors: (U, D) float32, multiples of 1/16; row u belongs to user id u + 1.
        item_factors: (I, D) float32, multiples of 1/16; row i belongs to item id i + 1.
        popularity: (I,) float32, positive, sum 1.
        scale: factor of the dot products.
    """

    user_factors: Floats
    item_factors: Floats
    popularity: Floats
    scale: float

    def affinities(self, user_index: ArrayLike) -> Floats:
        """Affinities of R users for all items: (R, I) float32, about standard normal times the strength."""
        dots = self.user_factors[np.asarray(user_index)] @ self.item_factors.T
        dots *= np.float32(self.scale)
        return dots

    def weights(self, affinities: Floats) -> Floats:
        """`popularity * (1 + affinity / 8)^8`, (R, I) float32: an item's chance, but for a factor a user."""
        weights = affinities * np.float32(1 / 8)
        weights += np.float32(1)
        # Below -8 the power would rise again; not 0, for the keys are divided by the weights.
        np.maximum(weights, np.float32(2**-5), out=weights)
        for _ in range(3):
            weights *= weights
        weights *= self.popularity
        return weights


@dataclass(frozen=True)
class SyntheticData:
    """Ratings, sorted by user and then by item, and what they were drawn from.

    Attributes:
        user_id: (n,) int32, 1..users.
        item_id: (n,) int32, 1..items; popularity has nothing to do with the id.
        rating: (n,) float32, multiples of the shape's step up to 5.
        timestamp: (n,) int64, seconds since 1970.
        planted: the factors and popularities.
    """

    user_id: Ints
    item_id: Ints
    rating: Floats
    timestamp: NDArray[np.int64]
    planted: Planted

    def planted_scores(self, user_ids: ArrayLike) -> Floats:
        """Scores that rank all items as the planted model would.

        Args:
            user_ids: (R,) user ids, 1..users.

        Returns:
            (R, I) float32, positive, larger is better; column j belongs to item id j + 1.
        """
        return self.planted.weights(self.planted.affinities(np.asarray(user_ids) - 1))


def generate(name: str, seed: int) -> SyntheticData:
    """Draw a synthetic data set by its name.

    Args:
        name: one of `SHAPES`.
        seed: 0 <= seed < 2^63; the same name and seed give the same rows on every machine.

    Returns:
        The ratings and what they were drawn from.

    Raises:
        FastTowerError: no shape has that name.
    """
    if name not in SHAPES:
        raise FastTowerError(
            f"unknown synthetic data set {quoted(name)}, expected one of {', '.join(SHAPES)}"
        )
    return generate_shape(SHAPES[name], seed)


def generate_shape(shape: Shape, seed: int) -> SyntheticData:
    """Draw a synthetic data set of any shape; see `generate`."""
    rng = np.random.Generator(np.random.PCG64(derive_key(seed, Purpose.SYNTHETIC)))
    planted = _plant(shape, rng)
    counts = ratings_per_user(shape, rng)
    item_quality = rng.normal(0.0, 0.45, shape.items)
    visits = _visits(shape, rng)

    user_id = np.repeat(np.arange(1, shape.users + 1, dtype=np.int32), counts)
    item_id = np.empty(shape.ratings, np.int32)
    rating = np.empty(shape.ratings, np.float32)
    timestamp = np.empty(shape.ratings, np.int64)
    done = 0
    for users, items, affinities in _choices(shape, planted, counts, rng):
        rows = slice(done, done := done + len(items))
        item_id[rows] = items + 1
        rating[rows] = _ratings(shape, users, affinities, item_quality[items], rng)
        timestamp[rows] = _timestamps(shape, visits, users, rng)
    return SyntheticData(user_id, item_id, rating, timestamp, planted)


def write_csv(data: SyntheticData, path: str | Path) -> None:
    """Write the ratings in ML-20M's layout: `userId,movieId,rating,timestamp`, ratings with one decimal.

    Args:
        data: the ratings.
        path: the file to write; its folder must be there.

    Raises:
        FastTowerError: the file can't be written.
    """
    import polars as pl  # noqa: PLC0415  the generator itself needs numpy alone

    frame = pl.DataFrame(
        {"userId": data.user_id, "movieId": data.item_id, "rating": data.rating, "timestamp": data.timestamp}
    )
    try:
        frame.write_csv(path, float_precision=1)
    except OSError as error:
        raise FastTowerError(
            f"can't write {shown(path)} ({reason(error)}): name a file in an existing folder"
        ) from error


def popularity(shape: Shape) -> Doubles:
    """The chances of the items, the most popular one first: (I,), float64, sum 1."""
    ranks = np.arange(1, shape.items + 1) / shape.items + shape.popularity_offset
    chances = np.ones(shape.items)
    for _ in range(shape.popularity_exponent):
        chances /= ranks
    return chances / chances.sum()


def ratings_per_user(shape: Shape, rng: np.random.Generator) -> NDArray[np.int64]:
    """(U,), int64, with the sum `shape.ratings`: the minimum, and a capped log-normal number beyond it."""
    spare = shape.ratings - shape.users * shape.min_ratings
    if spare == 0:
        return np.full(shape.users, shape.min_ratings)
    extra = np.exp(shape.user_spread * rng.standard_normal(shape.users))
    # What is cut off goes to all users in proportion, which lifts the cut ones again: so again, to 5%.
    limit = LARGEST_HISTORY * shape.items * shape.users / spare
    while extra.max() > 1.05 * limit * extra.mean():
        extra = np.minimum(extra, limit * extra.mean())
    ends = np.rint(np.cumsum(extra) * (spare / extra.sum())).astype(np.int64)
    ends[-1] = spare
    return shape.min_ratings + np.diff(ends, prepend=0)


def _plant(shape: Shape, rng: np.random.Generator) -> Planted:
    popularities = rng.permutation(popularity(shape))
    spread: Doubles = np.arange(1.0, NUM_FACTORS + 1) ** -shape.factor_decay
    return Planted(
        _factors(shape.users, spread, rng),
        _factors(shape.items, np.ones(NUM_FACTORS), rng),
        popularities.astype(np.float32),
        shape.strength / float(np.sqrt(np.square(spread).sum())),
    )


def _factors(rows: int, spread: Doubles, rng: np.random.Generator) -> Floats:
    """(rows, D) float32, normal with standard deviations `spread`, in whole sixteenths."""
    steps = np.rint(rng.standard_normal((rows, NUM_FACTORS)) * spread * FACTOR_STEPS)
    limit = FACTOR_LIMIT * FACTOR_STEPS
    return (np.clip(steps, -limit, limit) / FACTOR_STEPS).astype(np.float32)


def _choices(
    shape: Shape, planted: Planted, counts: NDArray[np.int64], rng: np.random.Generator
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], Floats]]:
    """Draw each user's items, chunk by chunk of users.

    Yields:
        User indices, item indices and affinities of the chosen pairs, (m,) each, by user, then by item.
    """
    users_per_chunk = max(1, CELLS_PER_CHUNK // shape.items)
    for start in range(0, shape.users, users_per_chunk):
        users = np.arange(start, min(start + users_per_chunk, shape.users))
        affinities = planted.affinities(users)
        weights = planted.weights(affinities)
        # Most rows have few keys below this bound, some times as many as are needed: a cheap first sieve.
        bounds = (1.5 * counts[users] + 16) / weights.sum(axis=1)
        keys = _uniforms(weights.shape, rng)
        keys /= weights
        for user, row in zip(users, keys, strict=True):
            # Item i is rated by user i mod U whatever the draw: no item is left without a rating.
            row[user :: shape.users] = -1
        chosen = [_smallest(row, n, b) for row, n, b in zip(keys, counts[users], bounds, strict=True)]
        rows = np.repeat(np.arange(len(users)), counts[users])
        items = np.concatenate(chosen)
        yield rows + start, items, affinities[rows, items]


def _uniforms(size: tuple[int, int], rng: np.random.Generator) -> Floats:
    """Uniforms in [0, 1], float32, a 32-bit word each: cheaper than `rng.random`, and most of the work."""
    cells = size[0] * size[1]
    words = rng.integers(0, 2**64, (cells + 1) // 2, np.uint64).astype("<u8", copy=False).view("<u4")[:cells]
    uniforms = words.astype(np.float32).reshape(size)
    uniforms *= np.float32(2**-32)
    return uniforms


def _smallest(keys: Floats, count: int, bound: float) -> NDArray[np.int64]:
    """The `count` indices with the smallest keys (a tie goes to the smaller index), sorted by index."""
    candidates = np.flatnonzero(keys < bound)
    if len(candidates) < count:
        candidates = np.arange(len(keys))
    order = np.argsort(keys[candidates], kind="stable")
    return np.sort(candidates[order[:count]])


def _ratings(
    shape: Shape, users: NDArray[np.int64], affinities: Floats, quality: Doubles, rng: np.random.Generator
) -> Doubles:
    """(m,) float64: better where the affinity and the item are better, in the shape's steps up to 5."""
    noise = 0.85 * rng.standard_normal(len(users))
    liking = 3.45 + 0.35 * affinities.astype(np.float64) + quality + noise
    return np.clip(np.rint(liking / shape.rating_step) * shape.rating_step, shape.rating_step, 5.0)


def _visits(shape: Shape, rng: np.random.Generator) -> Doubles:
    """(U, 1 + LATER_SESSIONS) float64: when each user's sessions begin, as fractions of the time line."""
    arrival = rng.random((shape.users, 1))
    returns = rng.random((shape.users, 1)) < RETURNING_USERS
    stay = (1 - arrival) * np.sqrt(rng.random((shape.users, 1))) * returns
    later = arrival + stay * rng.random((shape.users, LATER_SESSIONS))
    return np.concatenate([arrival, later], axis=1)


def _timestamps(
    shape: Shape, visits: Doubles, users: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """(m,) int64: a moment in one of the user's sessions, most likely the first."""
    later = rng.integers(1, LATER_SESSIONS + 1, len(users))
    session = np.where(rng.random(len(users)) < FIRST_SESSION, 0, later)
    begin = visits[users, session] * (shape.span_seconds - SESSION_SECONDS)
    return shape.first_timestamp + begin.astype(np.int64) + rng.integers(0, SESSION_SECONDS, len(users))
