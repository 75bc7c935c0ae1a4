"""Processes: what a forked child has to renew, and what a child of `multiprocessing` has to do before it ends."""

from __future__ import annotations

import multiprocessing
import os
import weakref
from collections.abc import Callable
from multiprocessing import util
from typing import TypeVar

T = TypeVar("T")


def call_in_forked_children(owner: T, method: Callable[[T], object]) -> None:
    """Call a method in every child that this process forks, for as long as its owner lives.

    Weakly, as the SDK does: a registration can't be taken back, and must not keep the owner alive.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_weakly(owner, method))


def call_at_the_end_of_children(owner: T, method: Callable[[T], object]) -> None:
    """Call a method when a child process of `multiprocessing` ends: this one, or one that it forks.

    Such a child leaves by `os._exit`, which runs no exit handlers but those of `multiprocessing` itself.
    """

    def at_the_end(owner: T) -> None:
        util.Finalize(None, _weakly(owner, method), exitpriority=0)

    util.register_after_fork(owner, at_the_end)  # which keeps a weak reference too
    if multiprocessing.parent_process() is not None:
        at_the_end(owner)


def _weakly(owner: T, method: Callable[[T], object]) -> Callable[[], None]:
    reference = weakref.ref(owner)

    def call() -> None:
        if (found := reference()) is not None:
            method(found)

    return call
