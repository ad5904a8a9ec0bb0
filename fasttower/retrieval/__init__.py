"""From top-K indices to recommendations in the caller's own ids."""

from fasttower.retrieval.recommendations import recommendation_frame

__all__ = ["recommendation_frame"]
