"""From vectors to recommendations and neighbours in the caller's own ids."""

from fasttower.retrieval.ids import find_ids, with_index
from fasttower.retrieval.neighbours import nearest
from fasttower.retrieval.recommendations import (
    recommend,
    recommend_to_all,
    recommendation_frame,
    rows_at,
)

__all__ = [
    "find_ids",
    "nearest",
    "recommend",
    "recommend_to_all",
    "recommendation_frame",
    "rows_at",
    "with_index",
]
