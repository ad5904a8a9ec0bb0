"""Work on what comes next while the caller uses what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def one_ahead(function: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """``map(function, arguments)``, one call ahead: in a thread, which gains where calls wait for a device.

    A call is begun before the result of the one before it is given, and never more than one is under way.
    What a call raises is raised where its result would be given. An iteration that ends early waits for the
    call under way, and begins no other.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="one_ahead") as worker:
        current: Future[Result] | None = None
        for argument in arguments:
            following = worker.submit(function, argument)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()
