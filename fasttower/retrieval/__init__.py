"""From vectors to recommendations and neighbours in the caller's own ids."""

from fasttower.retrieval.frames import recommendation_frame
from fasttower.retrieval.ids import IdMap
from fasttower.retrieval.retriever import Retriever, recommend_to_all

__all__ = ["IdMap", "Retriever", "recommend_to_all", "recommendation_frame"]
