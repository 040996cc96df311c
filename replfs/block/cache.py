"""The memory that the tables of a volume's images may take together, least recently used first out.

One :class:`Cache` is the limit; each image has a :class:`Shelf` in it for every kind of table it keeps. What lies on a shelf is
also in the file, word for word, so anything may be dropped at any time. Only the trio thread uses them.
"""

from typing import Final, Generic, TypeVar

DEFAULT_BYTES: Final = 32 << 20
_OVERHEAD: Final = 200
"""Bytes that an entry costs beside what it holds: of moment where clusters are small."""

Item = TypeVar("Item")


class Cache:
    def __init__(self, limit: int = DEFAULT_BYTES) -> None:
        self.limit = limit
        """Bytes; the one entry that is in use stays even if it is larger."""
        self.used = 0
        self._shelves: list[Shelf[object]] = []

    def make_room(self, keep: "Shelf[object]") -> None:
        """Drop what is oldest on the fullest shelf until the limit is kept; the newest entry of ``keep`` stays."""
        while self.used > self.limit:
            fullest = max(self._shelves, key=lambda shelf: (len(shelf) - (shelf is keep)) * shelf.item_bytes)
            if len(fullest) <= (fullest is keep):
                return
            fullest.drop_oldest()


class Shelf(Generic[Item]):
    """Entries of one kind and size, by number. :meth:`close` gives its memory back to the cache."""

    def __init__(self, cache: Cache, item_bytes: int) -> None:
        self.item_bytes: Final = item_bytes + _OVERHEAD
        self._cache = cache
        self._items: dict[int, Item] = {}  # least recently used first
        self._newest = -1  # the entry that is known to be last
        cache._shelves.append(self)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self._items)

    def get(self, key: int) -> Item | None:
        item = self._items.get(key)
        if item is not None and key != self._newest:
            del self._items[key]
            self._items[key] = item
            self._newest = key
        return item

    def put(self, key: int, item: Item) -> None:
        if self._items.pop(key, None) is None:
            self._cache.used += self.item_bytes
        self._items[key] = item
        self._newest = key
        if self._cache.used > self._cache.limit:
            self._cache.make_room(self)  # type: ignore[arg-type]

    def drop_oldest(self) -> None:
        del self._items[next(iter(self._items))]
        self._cache.used -= self.item_bytes

    def close(self) -> None:
        if self in self._cache._shelves:
            self._cache._shelves.remove(self)  # type: ignore[arg-type]
            self._cache.used -= len(self._items) * self.item_bytes
            self._items.clear()
