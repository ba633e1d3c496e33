"""`Recent`: a bounded memory of what was used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by name, up to a total size and at least one; those used longest ago go first."""

    def __init__(self, most: int, size: Callable[[Value], int] = lambda value: 1) -> None:
        self._most, self._size = most, size
        self._kept: OrderedDict[str, Value] = OrderedDict()
        self.total = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __getitem__(self, name: str) -> Value:
        self._kept.move_to_end(name)
        return self._kept[name]

    def get(self, name: str, default: Value) -> Value:
        if name not in self._kept:
            return default
        return self[name]

    def __setitem__(self, name: str, value: Value) -> None:
        self.pop(name)
        self._kept[name] = value
        self.total += self._size(value)
        while self.total > self._most and len(self._kept) > 1:
            self.total -= self._size(self._kept.popitem(last=False)[1])

    def pop(self, name: str) -> bool:
        """Whether it was there."""
        if name not in self._kept:
            return False
        self.total -= self._size(self._kept.pop(name))
        return True
