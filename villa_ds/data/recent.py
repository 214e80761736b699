"""A bounded memory of what was computed or opened last."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The `capacity` values used last; any other is made again when it is asked for."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._values: OrderedDict[K, V] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def values(self) -> Iterable[V]:
        """What is kept."""
        return self._values.values()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, from memory or from `make`."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = self._values[key] = make()
        if len(self._values) > self._capacity:
            self._values.popitem(last=False)
        return value
