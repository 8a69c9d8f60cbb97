"""Pages against a naive model: every sequence is a list of what was written, and every row is read back."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glmx.models.pages import PAGE, Pages

SEQUENCES, MAX_TOKENS = 4, 3 * PAGE - 5


class PagesMachine(RuleBasedStateMachine):
    """Rows hold (who wrote, when); a sequence's rows must always be those of its list."""

    @initialize()
    def start(self) -> None:
        self.pages = Pages(SEQUENCES, MAX_TOKENS)
        self.rows: list[int | None] = [None] * (self.pages.total * PAGE)  # a fresh page must be asked to be zeroed
        self.lists: list[list[int]] = [[] for _ in range(SEQUENCES)]
        self.clock = 0

    def write(self, seq: int, begin: int, end: int) -> None:
        changes = self.pages.prepare(seq, begin, end)
        for page in changes.fresh:
            self.rows[page * PAGE : (page + 1) * PAGE] = [0] * PAGE
        for source, target in changes.copies:
            self.rows[target * PAGE : (target + 1) * PAGE] = self.rows[source * PAGE : (source + 1) * PAGE]
        for j, slot in zip(range(begin, end), self.pages.slots(seq, begin, end), strict=True):
            self.clock += 1
            self.rows[slot] = self.clock
            self.lists[seq][j : j + 1] = [self.clock]

    @rule(seq=st.integers(0, SEQUENCES - 1), new=st.integers(0, 2 * PAGE))
    def append(self, seq: int, new: int) -> None:
        length = len(self.lists[seq])
        self.write(seq, length, min(length + new, MAX_TOKENS))

    @rule(seq=st.integers(0, SEQUENCES - 1), back=st.integers(1, PAGE + 3))
    def write_again(self, seq: int, back: int) -> None:
        """The MTP layer trails the decoder: it writes rows that lie before the last one."""
        length = len(self.lists[seq])
        self.write(seq, max(length - back, 0), length)

    @rule(seq=st.integers(0, SEQUENCES - 1), share=st.floats(0, 1))
    def truncate(self, seq: int, share: float) -> None:
        length = int(len(self.lists[seq]) * share)
        self.pages.truncate(seq, length)
        del self.lists[seq][length:]

    @precondition(lambda self: any(not held for held in self.lists))
    @rule(source=st.integers(0, SEQUENCES - 1))
    def fork(self, source: int) -> None:
        target = next(i for i, held in enumerate(self.lists) if not held)
        if target != source:
            self.pages.truncate(target, 0)
            self.pages.share(source, target)
            self.lists[target] = list(self.lists[source])

    @invariant()
    def every_row_is_what_was_written(self) -> None:
        for seq, held in enumerate(self.lists):
            assert [self.rows[slot] for slot in self.pages.slots(seq, 0, len(held))] == held

    @invariant()
    def pages_are_counted(self) -> None:
        used = {page for table in self.pages.tables for page in table}
        assert self.pages.in_use == len(used)
        assert all(
            len(table) == -(-len(held) // PAGE) for table, held in zip(self.pages.tables, self.lists, strict=True)
        )


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_a_fork_shares_full_pages_and_copies_the_partial_one_when_it_is_written() -> None:
    pages = Pages(2, 4 * PAGE)
    pages.prepare(0, 0, 2 * PAGE + 7)
    pages.share(0, 1)
    assert pages.in_use == 3 and pages.tables[0] == pages.tables[1]
    changes = pages.prepare(1, 2 * PAGE + 7, 3 * PAGE + 1)
    assert changes.copies == [(2, 3)] and changes.fresh == [4]
    assert pages.tables == [[0, 1, 2], [0, 1, 3, 4]]
    assert pages.prepare(0, 2 * PAGE + 7, 2 * PAGE + 8).copies == []  # its only user now
    pages.truncate(1, 0)
    assert pages.in_use == 3


def test_all_pages_can_be_used() -> None:
    pages = Pages(3, PAGE + 1)
    for seq in range(3):
        pages.prepare(seq, 0, PAGE + 1)
    assert pages.in_use == pages.total == 6
