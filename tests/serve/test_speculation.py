"""The policy of speculative decoding: pure functions of estimates and of given times. No clock is read here."""

from __future__ import annotations

import itertools
import random
from itertools import pairwise

import pytest

from glmx.serve.speculation import (
    AUTO_LIMIT,
    KEPT,
    MAX_PROBE_STEPS,
    MAX_UNPAID_STEPS,
    PROBE_STEPS,
    STALE_TIMES,
    TRY_SHARE,
    UNTYPICAL,
    Acceptance,
    Speculation,
    Times,
    choose,
)


def linear(base, per_row, per_draft_step):
    return lambda rows, depth: base + per_row * rows + per_draft_step * depth


@pytest.mark.parametrize(
    "acceptance, cost, expected",
    [
        ([[0.9] * 6], linear(10, 0, 0), [6]),  # free drafts: all that there may be
        ([[0.0] * 6], linear(10, 0, 0), [0]),  # never right, so of equals the fewest
        ([[1.0] * 6], linear(0, 1, 0), [0]),  # as many tokens a second with any number
        ([[0.9] * 6], linear(0, 1, 0), [0]),  # a row costs a step: drafts can only lose
        ([[0.9] * 6], linear(10, 0, 9.5), [0]),
        ([[0.9] * 6], linear(10, 0, 8.5), [1]),  # 1.9 tokens for 18.5, before 1 for 10
        ([[0.9, 0.1, 0.9]], linear(10, 1, 1), [1]),  # what follows an unlikely draft is unlikelier
        ([[0.5, 1.0, 1.0]], linear(10, 1, 1), [3]),  # and what follows surely is as likely
        ([[]], linear(10, 1, 1), [0]),
        ([], linear(10, 1, 1), []),
        ([[0.9] * 4, [0.1] * 4, [0.9]], linear(10, 1, 0), [4, 0, 1]),  # each its own
        ([[0.9], [0.2]], linear(10, 1, 3), [1, 1]),  # a draft step that another pays for is worth an unlikely draft
        ([[0.2]], linear(10, 1, 3), [0]),
    ],
)
def test_choose(acceptance, cost, expected):
    assert choose(acceptance, cost) == expected


def test_choose_finds_the_best_of_all_counts():
    draw = random.Random(1)
    for _ in range(200):
        acceptance = [[draw.random() for _ in range(draw.randint(0, 3))] for _ in range(draw.randint(1, 3))]
        rows_s, depth_s = (sorted(draw.random() for _ in range(13)) for _ in range(2))

        def cost(rows, depth, rows_s=rows_s, depth_s=depth_s):
            return 0.2 + rows_s[rows] + (depth_s[depth] if depth else 0)

        def rate(counts, acceptance=acceptance, cost=cost):
            tokens = len(counts)
            for row, count in zip(acceptance, counts, strict=True):
                for d in range(count):
                    product = 1.0
                    for a in row[: d + 1]:
                        product *= a
                    tokens += product
            return tokens / cost(len(counts) + sum(counts), max(counts))

        best = max(map(rate, itertools.product(*(range(len(row) + 1) for row in acceptance))))
        assert rate(choose(acceptance, cost)) == pytest.approx(best)


def test_acceptance_is_that_of_drafts_whose_predecessors_were_right():
    known = Acceptance(3)
    hope = known.estimates(3)
    assert len(set(hope)) == 1 and known.estimates(1) == hope[:1] and 0.5 < hope[0] < 1
    for _ in range(400):
        known.observe(3, 1)  # the first right, the second wrong, the third never put to the test
    first, second, third = known.estimates(3)
    assert first > 0.95 and second < 0.05 and third == hope[0]
    for _ in range(1000):
        known.observe(1, 0)
    assert known.estimates(1)[0] < 0.1  # old tries fade


def test_a_sequence_begins_with_what_others_have_shown():
    pool = Acceptance(2)
    for _ in range(300):
        pool.observe(2, 0)
    own = Acceptance(2, pool)
    assert own.estimates(2) == pool.estimates(2)
    for _ in range(60):
        own.observe(2, 2)
    assert min(own.estimates(2)) > 0.6 and pool.estimates(2)[0] < 0.1


def test_times_are_medians_on_straight_lines():
    times = Times()
    assert times.at(3) == 0
    for seconds in (4.0, 4.0, 100.0, 4.5):  # one step had to wait for a core
        times.add(4, seconds)
    assert times.at(4) == times.at(9) == 4.25  # no slower above what is known
    assert times.at(1) == 4.25 / 4  # in proportion below
    times.add(8, 6.25)
    assert times.at(6) == 5.25 and times.at(8) == times.at(20) == 6.25
    for _ in range(STALE_TIMES):
        times.add(8, 6.25)
    assert times.at(4) == 6.25 / 2  # forgotten
    for n in range(20):
        times.add(8, 9.0 if n >= 10 else 6.25)
    assert times.at(8) == 9.0  # the last few count


def run(policy, rates, cost, steps, draw, tracks=None):
    """Steps of sequences whose j-th drafts are right with chance rates[s], as the engine asks: the counts of each."""
    tracks = tracks or [policy.track() for _ in rates]
    seen = []
    for _ in range(steps):
        if policy.sleeps(tracks):
            seen.append([0] * len(rates))
            continue
        counts = [0] * len(rates) if policy.rests(tracks) else policy.counts(tracks, [100] * len(rates))
        accepted = []
        for count, rate in zip(counts, rates, strict=True):
            right = 0
            while right < count and draw.random() < rate:
                right += 1
            accepted.append(right)
        policy.observe(tracks, counts, accepted)
        rows, depth = len(rates) + sum(counts), max(counts)
        policy.observe_times(rows, cost(rows, 0), sum(counts), depth, cost(0, depth) - cost(0, 0))
        seen.append(counts)
    return seen


def test_it_settles_at_what_pays_off():
    settled = {
        name: [counts[0] for counts in run(Speculation(6, True), [rate], cost, 500, random.Random(3))][-200:]
        for name, rate, cost in [
            ("never right", 0.0, linear(10, 1, 1)),
            ("always right", 1.0, linear(10, 0.2, 0.5)),
            ("rows cost a step", 0.9, linear(0, 1, 0.1)),
            ("in between", 0.6, linear(10, 0.5, 1)),
        ]
    }
    assert max(settled["never right"]) == 1 and 1 <= sum(settled["never right"]) <= 3  # tries, ever rarer
    assert min(settled["always right"]) >= 5 and settled["always right"].count(6) > 180
    assert sum(settled["rows cost a step"]) < 40
    best = choose([[0.6] * 6], linear(10, 0.5, 1))[0]
    assert 1 < best < 4 and sum(abs(count - best) <= 1 for count in settled["in between"]) > 150


def test_each_sequence_has_its_own_number():
    counts = run(Speculation(4, True), [0.95, 0.0, 0.95], linear(10, 0.5, 0.5), 300, random.Random(4))[-100:]
    assert sum(a >= 3 and b <= 1 and c >= 3 for a, b, c in counts) > 80


def test_a_sequence_that_was_off_comes_back():
    policy, draw, cost = Speculation(4, True), random.Random(5), linear(10, 0.3, 0.5)
    tracks = [policy.track()]
    off = run(policy, [0.0], cost, 300, draw, tracks)[PROBE_STEPS:]
    assert 1 <= sum(c for (c,) in off) < 20 and policy.track().patience == tracks[0].patience > PROBE_STEPS
    back = [c for (c,) in run(policy, [1.0], cost, 800, draw, tracks)]
    assert sum(back[-50:]) > 150 and back.index(1) <= MAX_PROBE_STEPS and tracks[0].patience == PROBE_STEPS


@pytest.mark.parametrize("rate, cost", [(0.0, linear(10, 5, 5)), (0.6, linear(10, 5, 5)), (0.6, linear(10, 4, 3))])
@pytest.mark.parametrize("sequences", [1, 4])
def test_tries_that_do_not_pay_cost_less_than_two_percent(rate, cost, sequences):
    policy, draw, rates = Speculation(6, True), random.Random(7), [rate] * sequences
    tracks = [policy.track() for _ in rates]
    run(policy, rates, cost, 300, draw, tracks)
    seconds = tokens = 0.0
    counters = policy.counters
    for _ in range(2000):
        before = counters.num_accepted_tokens
        (counts,) = run(policy, rates, cost, 1, draw, tracks)
        seconds += cost(sequences + sum(counts), max(counts))
        tokens += sequences + counters.num_accepted_tokens - before
    assert seconds / tokens < 1.02 * cost(sequences, 0) / sequences


def test_far_from_a_try_it_sleeps_ever_longer():
    """Sleep ends when the batch changes, and in time to keep rows for the try, which comes when it would have come."""
    policy, cost, draw = Speculation(2, True), linear(10, 1, 1), random.Random(9)
    tracks = [policy.track()]
    counts = run(policy, [0.0], cost, 1500, draw, tracks)
    tries = [step for step, (count,) in enumerate(counts) if count]
    assert tracks[0].patience == MAX_PROBE_STEPS
    assert all(MAX_PROBE_STEPS <= b - a < 1.2 * MAX_PROBE_STEPS for a, b in pairwise(tries[-3:])), tries

    asleep = 0
    for _ in range(2 * MAX_PROBE_STEPS):
        if policy.sleeps(tracks):
            asleep += 1
        else:
            run(policy, [0.0], cost, 1, draw, tracks)
    assert 2 * (MAX_PROBE_STEPS - KEPT) * 0.8 < asleep < 2 * (MAX_PROBE_STEPS - KEPT)

    while not policy.sleeps(tracks):
        run(policy, [0.0], cost, 1, draw, tracks)
    idle, slept = tracks[0].idle, policy._slept
    assert not policy.sleeps([*tracks, policy.track()]) and tracks[0].idle == idle + slept
    assert not policy.sleeps(tracks), "once awake it looks around first"


def test_new_sequences_sleep_at_once_where_nothing_pays():
    policy, cost, draw = Speculation(2, True), linear(10, 3, 5), random.Random(11)
    first = policy.track()
    assert policy.hopeful(first)
    run(policy, [0.0], cost, 120, draw, [first])
    assert first.patience < MAX_PROBE_STEPS
    tracks = [policy.track()]
    assert not policy.hopeful(tracks[0])
    assert not policy.sleeps(tracks), "it looks once"
    run(policy, [0.0], cost, 1, draw, tracks)
    assert policy.sleeps(tracks)
    paying = Speculation(2, True)
    run(paying, [1.0], linear(10, 0.1, 0.1), 300, draw, [paying.track()])
    assert paying.hopeful(paying.track())


def test_short_answers_are_slept_through_but_for_tries():
    """Their steps count together: a try is as rare as in one long answer, and finds out when drafts begin to pay."""
    policy, cost, draw = Speculation(2, True), linear(10, 0.5, 1), random.Random(12)

    def answers(rate: float, number: int) -> tuple[int, int]:
        tries = awake = 0
        for _ in range(number):
            tracks = [policy.track()]
            for _ in range(96):
                if not policy.sleeps(tracks):
                    awake += 1
                    tries += sum(run(policy, [rate], cost, 1, draw, tracks)[0])
        return tries, awake

    answers(0.0, 8)
    tries, awake = answers(0.0, 32)
    assert 8 <= tries <= 32 * 96 // MAX_PROBE_STEPS and awake < 32 * 96 * 0.2
    answers(1.0, 8)
    assert answers(1.0, 1)[0] > 96


def test_a_try_that_is_not_paid_for_is_far():
    policy = Speculation(2, True)
    track = policy.track()
    policy.observe_times(1, 1.0, 0, 0, 0.0)
    track.idle = track.patience - 5
    assert policy.steps_to_try(track) == 5
    policy._saved_s = -TRY_SHARE * 100
    assert policy.steps_to_try(track) == 100


def test_what_a_new_kind_of_step_takes_is_paid_for_too():
    policy = Speculation(2, True)
    policy.observe_times(1, 1.0, 0, 0, 0.0)
    track = policy.track()
    policy.observe([track], [1], [0])
    policy.observe_times(2, 30.0, 1, 1, 11.0, typical=False)  # 40 more than a step without drafts
    track.idle = track.patience
    assert 3900 < policy.steps_to_try(track) <= 4000
    policy.observe_times(2, 1000.0, 1, 1, 1.0, typical=False)
    assert policy.steps_to_try(track) == MAX_UNPAID_STEPS


def test_it_learns_step_by_step():
    """A first try makes one draft, and a draft that was never right is followed by none."""
    counts = [c for (c,) in run(Speculation(6, True), [0.0], linear(10, 1, 1), 30, random.Random(8))]
    assert max(counts) == 1 and 1 <= sum(counts) < 10


def test_depths_are_timed_one_by_one():
    """What is not timed looks free: without a bound, four right guesses would lead to five rows that nobody knows."""
    policy = Speculation(6, True)
    tracks = [policy.track()]
    for depth in range(1, 4):
        for _ in range(5):  # steps that prepare a recording are not timed
            counts = policy.counts(tracks, [6])
            assert counts == [depth]
            policy.observe(tracks, counts, counts)
        policy.observe_times(1 + depth, 1.0, depth, depth, 0.0)


def test_steps_that_are_never_typical_count_after_a_while():
    """Each has a shape of its own, say, and is slow; without their times drafts would look free for ever."""
    policy = Speculation(2, True)
    tracks = [policy.track()]
    policy.observe_times(1, 1.0, 0, 0, 0.0)
    made = []
    for _ in range(100):
        counts = policy.counts(tracks, [6])
        made.append(counts[0])
        policy.observe(tracks, counts, counts)
        slow = sum(counts) > 0
        policy.observe_times(1 + sum(counts), 10.0 if slow else 1.0, sum(counts), max(counts), 0.0, typical=not slow)
    assert sum(made[:UNTYPICAL]) == UNTYPICAL and not any(made[UNTYPICAL + 1 : UNTYPICAL + 1 + PROBE_STEPS])


def test_a_right_try_that_changes_no_choice_waits_longer():
    policy = Speculation(4, True)
    tracks = [policy.track()]
    run(policy, [1.0], linear(10, 30, 30), 2000, random.Random(10), tracks)
    assert tracks[0].patience == MAX_PROBE_STEPS


def test_a_fixed_number_is_fixed_but_for_the_room():
    policy = Speculation(5)
    tracks = [policy.track() for _ in range(4)]
    for _ in range(50):
        policy.observe(tracks, [5] * 4, [0] * 4)
    assert policy.counts(tracks, [9, 5, 2, 0]) == [5, 5, 2, 0]
    auto = Speculation(AUTO_LIMIT, True)
    assert all(c <= room for c, room in zip(auto.counts(tracks, [9, 3, 1, 0]), [9, 3, 1, 0], strict=True))


def test_counters():
    policy = Speculation(3)
    policy.observe([policy.track() for _ in range(3)], [3, 2, 0], [1, 2, 0])
    counters = policy.counters
    assert (counters.num_drafts, counters.num_draft_tokens, counters.num_accepted_tokens) == (2, 5, 3)
    assert counters.num_draft_tokens_per_pos == [2, 2, 1] and counters.num_accepted_tokens_per_pos == [2, 1, 0]


@pytest.mark.parametrize("limit", [0, 17])
def test_limits(limit):
    with pytest.raises(ValueError, match=f"limit of drafts is {limit}, expected 1 to 16"):
        Speculation(limit)


def test_sequences_without_drafts_try_them_together():
    policy, draw = Speculation(2, True), random.Random(6)
    tracks = [policy.track() for _ in range(3)]
    run(policy, [0.0] * 3, linear(10, 1, 1), 100, draw, tracks)
    tracks[0].idle, tracks[1].idle, tracks[2].idle = tracks[0].patience, tracks[1].patience // 2, 0
    assert policy.counts(tracks, [5] * 3) == [1, 1, 0] and policy.counts(tracks, [0, 5, 5]) == [0, 1, 0]
