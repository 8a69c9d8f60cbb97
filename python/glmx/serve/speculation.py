"""How many drafts to verify: the policy of speculative decoding, and what it counts. No tensors here.

Verification draws at every position the token that plain decoding draws there, so that no choice made here, and no
clock that it looks at, shows in any text.

A step with drafts gains 1 + a1 + a1*a2 + ... tokens of a sequence, with a1 the share of first drafts that turn out
right, a2 that of second ones behind a right first one, and so on. It costs the drafting and a wider forward. `choose`
takes the counts with the most tokens per second.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import median

from glmx.errors import UnsupportedError

AUTO_LIMIT = 6  # drafts of a sequence under "auto": one MTP layer, trained for a few steps, seldom guesses further
MAX_DRAFTS = 16  # a wider verification than 17 rows is another kind of forward
# A sequence without drafts tries one after so many steps, as its text may have become easier; after each that changes
# no choice it waits twice as long, up to the second number. With 32 and no end a batch of four lost 5 % to its tries.
PROBE_STEPS, MAX_PROBE_STEPS = 32, 256
TRY_SHARE = 0.01  # of the time of steps: what tries may lose. The next one waits until the last one is paid for,
MAX_UNPAID_STEPS = 4096  # but no longer. To prepare a step of a new kind takes as long as dozens of steps.
QUIET_STEPS = 8  # a choice of no drafts stands for so many steps: to make it takes time as well
# Far from any try it stands for as many, each time for twice as many until it reaches one, and nothing is measured or
# kept meanwhile.
MAX_SLEEP = MAX_PROBE_STEPS
KEPT = 16  # rows that a sequence begins with when a try is near
UNLIKELY = 0.02  # drafts with less of a chance are not looked at: a forward row costs more than 2 % of a forward
MARGIN = 1.05  # drafts that promise less of a gain are not made: of many noisy promises the best one is too good
HOPE = 0.8  # of drafts that were never tried: high, so that they are
POOL_WEIGHT, POOL_DECAY = 4.0, 0.995  # all sequences: HOPE counts as 4 tries, and the last 200 tries count
OWN_WEIGHT, OWN_DECAY = 8.0, 0.95  # one sequence: the others' share counts as 8 tries, and its last 20 count
RECENT_TIMES = 9  # a median of so many is deaf to a step that had to wait for a core
UNTYPICAL = 6  # steps with drafts in a row that say nothing of later ones' times: after so many they count all the same
STALE_TIMES = 256  # measurements: a size not seen for so long is measured anew, as contexts have grown since


def choose(acceptance: Sequence[Sequence[float]], cost: Callable[[int, int], float]) -> list[int]:
    """Drafts for each sequence of a batch, so that a step gains the most tokens per second; of equals the fewest.

    acceptance[s][j]  the chance that draft j+1 of sequence s is right when those before it are; as long as the
                      sequence may have drafts
    cost(rows, depth) seconds of a forward over `rows` rows, with `depth` draft steps before it
    """
    B = len(acceptance)
    reach = []
    for s, chances in enumerate(acceptance):
        chance = 1.0
        for d, a in enumerate(chances, 1):
            chance *= a
            if chance < UNLIKELY:
                break
            reach.append((-chance, d, s))
    reach.sort()  # a later draft of a sequence is never before an earlier one
    best, counts = B / cost(B, 0) if B else 0.0, [0] * B
    for depth in range(1, 1 + max((d for _, d, _ in reach), default=0)):
        tokens, rows, tried = float(B), B, [0] * B
        for chance, d, s in reach:
            if d > depth:
                continue
            tokens, rows, tried[s] = tokens - chance, rows + 1, d
            if (rate := tokens / cost(rows, depth)) > best * (1 + 1e-9):
                best, counts = rate, list(tried)
    return counts


class Acceptance:
    """Estimates of how often draft j+1 is right when those before it were, j = 0 .. limit-1; old tries fade."""

    def __init__(self, limit: int, prior: Acceptance | None = None) -> None:
        self._prior = prior
        self._weight, self._decay = (POOL_WEIGHT, POOL_DECAY) if prior is None else (OWN_WEIGHT, OWN_DECAY)
        self._right, self._tries = [0.0] * limit, [0.0] * limit

    def observe(self, drafted: int, accepted: int) -> None:
        for j in range(min(drafted, accepted + 1)):
            self._right[j] = self._decay * self._right[j] + (j < accepted)
            self._tries[j] = self._decay * self._tries[j] + 1

    def reach(self) -> int:
        """Drafts that are known, and one more: what comes behind a draft that was never right is not worth a hope."""
        return next((j + 1 for j, right in enumerate(self._right) if not right), len(self._right))

    def estimates(self, count: int) -> list[float]:
        prior = [HOPE] * count if self._prior is None else self._prior.estimates(count)
        w, rows = self._weight, zip(self._right, self._tries, prior, strict=False)
        return [(right + w * before) / (tries + w) for right, tries, before in rows]


class Times:
    """Seconds of a forward by its rows: the median of the last few, on straight lines between sizes.

    Above the largest size the time is taken to grow no more, and below the smallest to shrink in proportion: hopes
    that make the policy try what it has not measured.
    """

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self._seen: dict[int, int] = {}
        self._medians: dict[int, float] = {}
        self._sizes: list[int] = []
        self._added = 0

    def add(self, size: int, seconds: float) -> None:
        self._added += 1
        self._seen[size] = self._added
        recent = self._recent.setdefault(size, deque(maxlen=RECENT_TIMES))
        recent.append(seconds)
        self._medians[size] = median(recent)
        for old in [s for s, seen in self._seen.items() if self._added - seen > STALE_TIMES]:
            del self._recent[old], self._seen[old], self._medians[old]
        self._sizes = sorted(self._medians)

    def at(self, size: float) -> float:
        if not self._sizes:
            return 0.0
        place = bisect_right(self._sizes, size)
        if place == 0:
            return self._medians[self._sizes[0]] * size / self._sizes[0]
        below = self._sizes[place - 1]
        low = self._medians[below]
        if place == len(self._sizes):
            return low
        above = self._sizes[place]
        return low + (self._medians[above] - low) * (size - below) / (above - below)


@dataclass(eq=False)
class Track:
    """What is known of one sequence: its acceptance, how many steps it has had without drafts, and how many it may."""

    acceptance: Acceptance
    idle: int = 0
    patience: int = PROBE_STEPS


@dataclass
class Counters:
    """Since the start, with vLLM's names. `_per_pos` [limit]: by a draft's place in its step.

    A draft is accepted when it and those before it in its step are right.
    """

    num_drafts: int = 0
    num_draft_tokens_per_pos: list[int] = field(default_factory=list)
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    @property
    def num_draft_tokens(self) -> int:
        return sum(self.num_draft_tokens_per_pos)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.num_accepted_tokens_per_pos)

    def add(self, drafted: int, accepted: int) -> None:
        self.num_drafts += drafted > 0
        for j in range(drafted):
            self.num_draft_tokens_per_pos[j] += 1
            self.num_accepted_tokens_per_pos[j] += j < accepted


class Speculation:
    """How many drafts each sequence gets: `limit`, or with `adaptive` what has paid off, up to `limit`."""

    def __init__(self, limit: int, adaptive: bool = False) -> None:
        if not 1 <= limit <= MAX_DRAFTS:
            raise ValueError(f"the limit of drafts is {limit}, expected 1 to {MAX_DRAFTS}")
        self.limit, self.adaptive = limit, adaptive
        self.counters = Counters(0, [0] * limit, [0] * limit)
        self._pool = Acceptance(limit)
        # Where a new sequence begins: the last patience that one came to, and the steps since any had drafts. With its
        # own steps alone, no answer shorter than its patience would ever try.
        self._patience, self._idle = PROBE_STEPS, 0
        # By rows; a draft step's are the sequences that take part in it, on average over a step's.
        self._forwards, self._draft_steps = Times(), Times()
        self._untypical = 0  # steps with drafts since the last typical one
        self._timed = 0  # the most draft steps of a step that was timed: one more at a time is tried, not four
        self._tried: list[Track] = []  # those that the last step gave a draft as a try
        self._saved_s = 0.0  # time put aside for tries, less what drafts have lost
        self._plain_s = 0.0  # what a step without drafts takes
        self._accepted = 0  # of the last step
        self._quiet: tuple[list[Track], int] = ([], 0)  # the sequences that got no drafts, for how many more steps
        self._sleepers: list[Track] = []  # for `_sleep` more steps, after `_slept`
        self._sleep, self._slept, self._next_sleep = 0, 0, QUIET_STEPS

    def track(self) -> Track:
        """For a new sequence, which is as hopeful as the last ones were."""
        return Track(Acceptance(self.limit, self._pool), self._idle + self._slept, self._patience)

    def counts(self, tracks: Sequence[Track], rooms: Sequence[int]) -> list[int]:
        """Drafts for each sequence of a step, at most its room."""
        rooms = [min(room, self.limit) for room in rooms]
        self._tried = []
        if not self.adaptive:
            return rooms
        counts = self._choice(tracks, rooms)
        due = any(track.idle >= track.patience and not count for track, count in zip(tracks, counts, strict=True))
        if due and self._saved_s >= 0:
            # Those that soon would do it too join in: the draft step is paid for once.
            ready = [2 * track.idle >= track.patience for track in tracks]
            self._tried = [track for track, count, ok in zip(tracks, counts, ready, strict=True) if ok and not count]
            counts = [count or min(ok, room) for count, ok, room in zip(counts, ready, rooms, strict=True)]
        return counts

    def rests(self, tracks: Sequence[Track]) -> bool:
        """Whether a step makes no drafts, as those before it, and no try is due: `counts` is not asked."""
        quiet, steps = self._quiet
        if not steps or quiet != tracks:
            return False
        if self._saved_s >= 0 and any(track.idle >= track.patience for track in tracks):
            return False
        self._quiet = quiet, steps - 1
        return True

    def _choice(self, tracks: Sequence[Track], rooms: Sequence[int]) -> list[int]:
        """The counts that look best by what is known."""
        reach = min(self._pool.reach(), self._timed + 1)
        wanted = [track.acceptance.estimates(min(room, reach)) for track, room in zip(tracks, rooms, strict=True)]
        counts = choose(wanted, cache(partial(self._cost, len(tracks))))
        if any(counts):
            return counts
        far = min(map(self.steps_to_try, tracks)) - KEPT
        if far > 0 and not any(map(self.hopeful, tracks)):
            self._sleepers, self._sleep = list(tracks), min(far, self._next_sleep)
            self._next_sleep = min(2 * self._next_sleep, MAX_SLEEP)
        else:
            self._quiet = list(tracks), QUIET_STEPS
        return counts

    def steps_to_try(self, track: Track) -> int:
        """How many more steps the next try of a sequence without drafts is away, when nothing else changes."""
        unpaid = -self._saved_s / (TRY_SHARE * self._plain_s) if self._plain_s else 0.0
        return max(track.patience - track.idle, int(unpaid))

    def sleeps(self, tracks: Sequence[Track]) -> bool:
        """Whether a step makes no drafts, nor keeps anything for one. It is then not to be observed either."""
        if self._sleep and self._sleepers == tracks:
            self._sleep, self._slept = self._sleep - 1, self._slept + 1
            return True
        if self._slept:
            self._idle += self._slept
            for track in self._sleepers:
                track.idle += self._slept
            self._saved_s = min(self._saved_s + self._slept * TRY_SHARE * self._plain_s, 0.0)
        self._sleep = self._slept = 0
        return False

    def hopeful(self, track: Track) -> bool:
        """Whether the MTP layer's cache of a sequence is worth its upkeep: it has just had drafts."""
        return not self.adaptive or (track.idle < QUIET_STEPS and track.patience < MAX_PROBE_STEPS)

    def observe(self, tracks: Sequence[Track], drafted: Sequence[int], accepted: Sequence[int]) -> None:
        """What a step has verified."""
        self._accepted = sum(accepted)
        self._idle += 1
        if any(drafted):
            self._quiet, self._next_sleep, self._idle = ([], 0), QUIET_STEPS, 0
        for track, count, right in zip(tracks, drafted, accepted, strict=True):
            if not count:
                track.idle += 1
                continue
            # A try that leads to drafts is followed by a step that chose them.
            tried = track in self._tried
            track.patience = self._patience = min(2 * track.patience, MAX_PROBE_STEPS) if tried else PROBE_STEPS
            track.idle = 0
            self.counters.add(count, right)
            for known in (track.acceptance, self._pool):
                known.observe(count, right)

    def observe_times(
        self,
        rows: int,
        forward_s: float,
        drafts: int,
        depth: int,
        drafting_s: float,
        caught_up: bool = True,
        typical: bool = True,
    ) -> None:
        """What a step without prompts took, after `observe` of it: its forward, and the draft steps.

        Of no interest unless it adapts.
        depth  draft steps, the most drafts that a sequence got; `drafts` of all together
        caught_up  the draft steps had no more to do than drafts
        typical    false: it took longer than later ones of its kind will
        """
        if not self.adaptive:
            return
        if not typical:
            self._untypical += drafts > 0
            if not drafts or self._untypical <= UNTYPICAL:
                self._pay(rows - drafts, drafts, forward_s, drafting_s)
                return
        elif drafts:
            self._untypical = 0
        if not drafts and self._quiet[1] % 4:
            self._saved_s = min(self._saved_s + TRY_SHARE * forward_s, 0.0)
            return  # one of many like it: to note them all costs more than they tell
        self._forwards.add(rows, forward_s)
        self._timed = max(self._timed, depth)
        if depth and caught_up:
            self._draft_steps.add(round(drafts / depth), drafting_s / depth)
        self._plain_s = self._forwards.at(rows - drafts)
        self._pay(rows - drafts, drafts, forward_s, drafting_s)

    def _pay(self, sequences: int, drafts: int, forward_s: float, drafting_s: float) -> None:
        """Puts a share of a step's time aside, and takes out what its drafts have lost. Nothing is saved up."""
        self._saved_s += TRY_SHARE * forward_s
        if drafts:
            tokens = 1 + self._accepted / sequences
            self._saved_s -= forward_s + drafting_s - tokens * self._plain_s
        self._saved_s = min(max(self._saved_s, -TRY_SHARE * MAX_UNPAID_STEPS * self._plain_s), 0.0)

    def _cost(self, sequences: int, rows: int, depth: int) -> float:
        if not depth:
            return max(self._forwards.at(rows), 1e-9)
        seconds = self._forwards.at(rows) + depth * self._draft_steps.at((rows - sequences) / depth)
        return max(MARGIN * seconds, 1e-9)


def check_drafts(num_speculative_tokens: int | str) -> None:
    """Raises ValueError unless it is "auto" or 0 to MAX_DRAFTS."""
    asked = num_speculative_tokens
    if asked != "auto" and not (isinstance(asked, int) and 0 <= asked <= MAX_DRAFTS):
        raise ValueError(f"num_speculative_tokens is {asked!r}, expected 'auto' or 0 to {MAX_DRAFTS}")


def speculation(num_speculative_tokens: int | str, has_mtp_layer: bool) -> Speculation | None:
    """From the option: 0 is off, K the same for every sequence, "auto" adapts. UnsupportedError without the layer."""
    asked = num_speculative_tokens
    check_drafts(asked)
    if asked == 0:
        return None
    if not has_mtp_layer:
        raise UnsupportedError(f"num_speculative_tokens is {asked!r}, but this model has no MTP layer to draft with")
    return Speculation(AUTO_LIMIT, adaptive=True) if isinstance(asked, str) else Speculation(asked)
