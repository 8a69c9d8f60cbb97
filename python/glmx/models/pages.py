"""Pages: which rows of a cache belong to which sequence. Pure bookkeeping; the planes of rows are the caller's.

A page has PAGE rows. Key j of a sequence lies in row table[j // PAGE] * PAGE + j % PAGE of every plane. Forked
sequences share pages, which are counted; whoever is about to write a shared page gets a copy of its own.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

PAGE = 64  # rows of a page: kPageRows of the ops that attend


class Changes(NamedTuple):
    """What the owner of the planes has to do before rows are written: zero fresh pages, copy (source, target) pages."""

    fresh: list[int]
    copies: list[tuple[int, int]]


class Pages:
    """Page tables of `num_sequences` sequences of at most `max_tokens` tokens, over just as many pages as they need."""

    def __init__(self, num_sequences: int, max_tokens: int) -> None:
        self.per_sequence = -(-max_tokens // PAGE)
        self.total = num_sequences * self.per_sequence
        self.tables: list[list[int]] = [[] for _ in range(num_sequences)]
        self._users = [0] * self.total
        self._free = list(range(self.total))  # a heap: the lowest page first, so that few pages of memory are touched

    @property
    def in_use(self) -> int:
        return self.total - len(self._free)

    def prepare(self, seq: int, begin: int, end: int) -> Changes:
        """Makes the rows [begin, end) of `seq` its own to write; begin is at most one past its last row.

        There is always a page: a sequence never has more than its share, and a shared page counts for each of its
        users.
        """
        table, changes = self.tables[seq], Changes([], [])
        for block in range(begin // PAGE, -(-end // PAGE)) if begin < end else ():
            if block == len(table):
                table.append(self._take())
                changes.fresh.append(table[block])
            elif self._users[table[block]] > 1:
                source, table[block] = table[block], self._take()
                self._users[source] -= 1
                changes.copies.append((source, table[block]))
        return changes

    def truncate(self, seq: int, length: int) -> None:
        """Gives back the pages behind the first `length` rows."""
        table = self.tables[seq]
        while len(table) > -(-length // PAGE):
            self._give_back(table.pop())

    def share(self, source: int, target: int) -> None:
        """`target`, which has no pages, gets those of `source`, counted."""
        assert not self.tables[target], f"sequence {target} still has pages"
        self.tables[target] = list(self.tables[source])
        for page in self.tables[target]:
            self._users[page] += 1

    def slots(self, seq: int, begin: int, end: int) -> list[int]:
        """The rows of tokens [begin, end), page by page."""
        rows: list[int] = []
        for block in range(begin // PAGE, -(-end // PAGE)):
            shift = (self.tables[seq][block] - block) * PAGE
            rows += range(max(begin, block * PAGE) + shift, min(end, (block + 1) * PAGE) + shift)
        return rows

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self._users[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page] == 0:
            heapq.heappush(self._free, page)
