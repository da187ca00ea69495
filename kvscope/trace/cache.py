"""Arrays that were read or computed, up to a number of bytes; threads may share a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from threading import Lock
from typing import Generic, TypeVar

from kvscope.trace.files import Floats

K = TypeVar("K", bound=Hashable)


class Cache(Generic[K]):
    """Arrays by key, least recently used first. Iteration yields the keys."""

    def __init__(self) -> None:
        self._arrays: OrderedDict[K, Floats] = OrderedDict()
        self._lock = Lock()

    def __iter__(self) -> Iterator[K]:
        return iter(list(self._arrays))

    def get(self, key: K, make: Callable[[], Floats], limit: int) -> Floats:
        """Return the array of a key, made if it is not cached, and drop others until all have at most `limit` bytes.

        The array of the last used key is cached in any case. Two threads that ask for a new key at once both make it.
        """
        with self._lock:
            array = self._arrays.get(key)
        array = make() if array is None else array
        with self._lock:
            self._arrays[key] = array
            self._arrays.move_to_end(key)
            while len(self._arrays) > 1 and sum(array.nbytes for array in self._arrays.values()) > limit:
                self._arrays.popitem(last=False)
        return array
