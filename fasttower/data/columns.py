"""Which column of a table is the user, the item, the rating and the timestamp."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fasttower.config import DataConfig
from fasttower.errors import FastTowerError, listed, quoted, shown

# The names that published data sets use, by preference; compared without case, "_", "-" and spaces.
_ALIASES = {
    "user_id": (
        "userid",
        "user",
        "uid",
        "queryid",
        "reviewerid",
        "customerid",
        "visitorid",
        "userindex",
        "useridx",
    ),
    "item_id": (
        *("itemid", "item", "iid", "movieid", "movie", "productid", "parentasin", "asin", "businessid"),
        *("bookid", "isbn", "trackid", "songid", "artistid", "articleid", "gameid", "itemindex", "itemidx"),
    ),
    "rating": ("rating", "ratings", "userrating", "overall", "stars", "score", "bookrating"),
    "timestamp": ("timestamp", "ts", "time", "datetime", "date", "unixreviewtime", "eventtime", "createdat"),
}
_REQUIRED = ("user_id", "item_id")

# Files without a header have the columns of MovieLens, in its order.
POSITIONAL = ("user_id", "item_id", "rating", "timestamp")


def columns_asked_for(config: DataConfig) -> dict[str, str | None]:
    """What the configuration says about each column; None where it leaves it to the known names."""
    return {
        "user_id": config.user_column,
        "item_id": config.item_column,
        "rating": config.rating_column,
        "timestamp": config.timestamp_column,
    }


def find_columns(
    found: Sequence[str], asked: Mapping[str, str | None], name: str, *, insist: bool = True
) -> dict[str, str]:
    """Map each of `user_id`, `item_id`, `rating`, `timestamp` that the table has to its own column.

    Args:
        found: the table's columns.
        asked: what the caller says about each; None leaves it to the known names.
        name: the table, for errors.
        insist: whether a column that was asked for must be there, or the known names will do.

    Raises:
        FastTowerError: no column of users or items, or a column that was asked for is not there.
    """
    bare = _bare(found)
    mapping: dict[str, str] = {}
    for role, aliases in _ALIASES.items():
        flag = f"--{role.removesuffix('_id')}-column"
        wanted = asked.get(role)
        column = None
        if wanted is not None:
            if insist:
                check_named(found, {flag: wanted}, name)
            column = wanted if wanted in found else bare.get(wanted)
        if column is None:
            column = _first_known(bare, aliases)
            if column is None and role in _REQUIRED:
                kind = role.removesuffix("_id")
                raise FastTowerError(
                    f"{name}: no column of {kind} ids is known among {_listed(found)}; name it with {flag}"
                    " (or is its separator another, or its header missing?)"
                )
        if column is not None:
            mapping[role] = column
    if len(set(mapping.values())) < len(mapping):
        raise FastTowerError(
            f"{name}: one column cannot be two things, {shown(mapping)}; name them with --user-column ..."
        )
    return mapping


def find_id_column(found: Sequence[str], role: str, name: str, asked: str | None = None) -> str:
    """The column of a list of ids: the one asked for, the one of a usual name, or the only one.

    The only one is not it where its name is a usual one of something else.

    Args:
        found: the table's columns.
        role: "user_id" or "item_id".
        name: the table, for errors.
        asked: a column to look for first.

    Raises:
        FastTowerError: there are several, and none of them is it or has a usual name.
    """
    if asked is not None and asked in found:
        return asked
    bare = _bare(found)
    column = _first_known(bare, _ALIASES[role])
    others = (aliases for other, aliases in _ALIASES.items() if other != role)
    if column is None and len(found) == 1 and not any(_first_known(bare, aliases) for aliases in others):
        column = found[0]
    if column is None:
        kind = role.removesuffix("_id")
        raise FastTowerError(f"{name}: no column of {kind} ids is known among {_listed(found)}")
    return column


def check_named(found: Sequence[str], named: Mapping[str, str], name: str) -> None:
    """Check that columns are there.

    Args:
        found: the table's columns.
        named: the column that each flag names.
        name: the table, for errors.

    Raises:
        FastTowerError: one is not.
    """
    bare = _bare(found)
    for flag, column in named.items():
        if column not in found and column not in bare:
            raise FastTowerError(
                f"{name}: no column {quoted(column)} ({flag}); its columns are {_listed(found)}"
            )


def _listed(found: Sequence[str]) -> str:
    """The columns for a message; of many the first."""
    return listed(map(repr, found), 20)


def _bare(found: Sequence[str]) -> dict[str, str]:
    """The columns by their names without RecBole's types, "user_id:token"; of equal ones the first counts."""
    return {
        column.removeprefix("\ufeff").split(":", maxsplit=1)[0].strip(): column for column in reversed(found)
    }


def _first_known(bare: Mapping[str, str], aliases: Sequence[str]) -> str | None:
    """The column with the most preferred of some names."""
    plain = {re.sub(r"[\s_\-]", "", column).lower(): original for column, original in bare.items()}
    return next((plain[alias] for alias in aliases if alias in plain), None)
