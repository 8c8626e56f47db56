"""The pace against a simulated device and clock: what it never costs, and what it gains where guesses hold."""

import random

import pytest

from runtime.speculation.odds import Odds
from runtime.speculation.pace import FIRST_LOOKS, FORGET, LONGEST_REST, MOST, MOST_TOKENS, PRIOR, PUT_BY, SHARE, START, Account, Pace

COSTS = {"free": lambda tokens: 1.0, "memory": lambda tokens: 1 + 0.04 * (tokens - 1), "core": lambda tokens: max(1.0, 0.1 + 0.24 * tokens),
         "dear": lambda tokens: float(tokens), "steps": lambda tokens: 1.0 if tokens == 1 else 1.9 if tokens <= 8 else 4.0}
PROMPTS = {"never": lambda i, rng: False, "always": lambda i, rng: True, "half": lambda i, rng: rng.random() < 0.5,
           "turns": lambda i, rng: (i // 40) % 2 == 0, "luck": lambda i, rng: rng.random() < 0.8, "first ones": lambda i, rng: i < 12}


def replies(cost, holds, length, pace, whole, rng, noise=0.0, look=0.0):
    """(time with guesses, time without) of a reply of `length` tokens, each a guess of which holds or does not. look: what looking takes."""
    right = [holds(i, rng) for i in range(length + MOST + 2)]
    time, done, account, own, rest = 0.0, 1, Account(), Odds(whole), 0
    while done < length:
        if rest:
            time, done, rest = time + cost(1), done + 1, rest - 1
            account.book(1, 1.0)
            continue
        count, = pace.plan([[own.chance("kind")] * min(MOST, length - done - 1)], [account.spare])
        seconds = cost(1 + count) * (1 + noise * rng.random())
        time += seconds + look
        pace.looked(1, look)
        held = next(i for i in range(count + 1) if i == count or not right[done + i])
        for i in range(min(held + 1, max(count, 1))):
            own.saw("kind", right[done + i])
        pace.passed(1, count, seconds) if count else pace.stepped(1, seconds)
        rest = 0 if count or account.pay(pace.look(1)) else pace.rest(1)
        account.book(held + 1, pace.ratio(1, count) + (pace.look(1) if count else 0.0))
        done += held + 1
    return time, (length - 1) * cost(1) * (1 + noise / 2)


@pytest.mark.parametrize("length", [32, 128, 600])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("device", COSTS)
def test_it_is_never_slower_than_plain_decoding_by_more_than_its_share(device, prompt, length):
    """Whatever the device costs and the prompts do, each reply of several."""
    pace, odds, rng = Pace(), Odds(), random.Random(0)
    for _ in range(20 if length < 600 else 5):
        time, plain = replies(COSTS[device], PROMPTS[prompt], length, pace, odds, rng)
        lost = max(0.0, time - plain)
        assert lost <= SHARE * plain + 2 * START + 1.0         # a sure guess risks half; the last pass may have been dearer than thought
        if length >= 128:
            assert plain / time >= 0.97


@pytest.mark.parametrize("device", COSTS)
def test_of_a_tiny_model_looking_costs_little_and_pays_all_the_same(device):
    """Looking for guesses takes a third of a step."""
    for prompt, least in (("never", 0.97), ("half", 0.97), ("turns", 0.97), ("always", 1.5 if device in ("free", "memory") else 0.97)):
        pace, odds, rng, ratios = Pace(), Odds(), random.Random(3), []
        for _ in range(8):
            time, plain = replies(COSTS[device], PROMPTS[prompt], 200, pace, odds, rng, look=0.33)
            ratios.append(plain / time)
        assert min(ratios[1:]) > least, (prompt, ratios)


def test_what_holds_is_worth_it():
    rng = random.Random(1)
    for device, prompt, least in (("free", "always", 10), ("memory", "always", 6), ("core", "always", 3.0), ("core", "luck", 1.5),
                                  ("memory", "luck", 2.2), ("memory", "half", 1.4), ("dear", "always", 0.97), ("steps", "always", 2.4)):
        pace, odds, ratios = Pace(), Odds(), []
        for _ in range(8):
            time, plain = replies(COSTS[device], PROMPTS[prompt], 200, pace, odds, rng)
            ratios.append(plain / time)
        assert sorted(ratios)[4] > least, (device, prompt, ratios)


def test_noise_and_a_stranger_on_the_machine_do_not_switch_it_off_for_ever():
    pace, odds, rng = Pace(), Odds(), random.Random(2)
    replies(COSTS["core"], PROMPTS["always"], 200, pace, odds, rng)
    for count in (3, 7, 15):
        pace.passed(1, count, 1000.0)                          # somebody else had the machine for one pass of each kind
    times = [replies(COSTS["core"], PROMPTS["always"], 200, pace, odds, rng, noise=0.5) for _ in range(6)]
    ratios = [plain / time for time, plain in times]
    assert sorted(ratios)[3] > 2


def test_nothing_is_planned_before_plain_steps_were_measured_and_after_many_passes_they_are_again():
    pace = Pace()
    assert pace.plan([[0.99] * 9], [5.0]) == [0]
    for _ in range(3):
        pace.stepped(1, 0.01)
    assert pace.plan([[0.99] * 9], [5.0]) == [1] and pace.plan([[0.99] * 9] * 2, [5.0] * 2) == [0, 0]       # of two rows nothing is known
    for _ in range(64):
        pace.passed(1, 4, 0.011)
    assert pace.plan([[0.99] * 9], [5.0]) == [0]
    pace.stepped(1, 0.01)
    assert pace.plan([[0.99] * 9], [5.0]) == [9]               # as twice four allow


def test_rows_get_what_they_are_worth_and_a_pass_is_bounded():
    pace = Pace()
    for _ in range(3):
        pace.stepped(4, 0.01)
    pace.passed(4, 15, 0.02)
    counts = pace.plan([[0.9] * 15, [], [0.2] * 15, [0.95] * 15], [9.0] * 4)
    assert counts[1] == 0 and counts[3] >= counts[0] > counts[2] and 4 + sum(counts) <= MOST_TOKENS
    padded = pace.plan([[0.9] * 15, [], [0.2] * 15, [0.95] * 3], [9.0] * 4, together=False)
    assert padded[0] in (0, 1, 2, 4, 8) and 4 * (1 + max(padded)) <= MOST_TOKENS
    assert pace.plan([[0.9] * 15, [], [], []], [-1.0, 9, 9, 9]) == [0] * 4          # it has lost too much already
    pace.passed(4, 3, 0.03)                                    # somebody disturbed it, since one of more tokens took less
    assert pace.ratio(4, 3) == pace.ratio(4, 15) == pytest.approx(2.0) and pace.ratio(4, 16) > 2 > pace.ratio(4, 1) > 1 + PRIOR
    for _ in range(FORGET):
        pace.stepped(4, 0.01)
    assert pace.ratio(4, 3) == pytest.approx(1 + 3 * PRIOR)    # it was measured once, long ago
    for _ in range(3):
        pace.passed(4, 3, 0.03)
    pace.passed(4, 3, 0.09)
    for _ in range(FORGET):
        pace.stepped(4, 0.01)
    assert pace.ratio(4, 3) == pytest.approx(3.0)              # the lower quartile of four
    assert pace.plan([[0.9]] * 4, [9.0] * 4, seconds=0.05) == [0] * 4               # making a guess takes longer than it saves


def test_what_looking_takes_decides_how_often():
    pace = Pace()
    pace.looked(1, 0.001)
    assert pace.rest(1) == 0 and pace.look(1) == 0.0           # plain steps come first
    for _ in range(3):
        pace.stepped(1, 0.01)
    assert pace.rest(1) == 0
    pace.looked(1, 0.00042)
    assert pace.rest(1) == 4 and pace.look(1) == pytest.approx(0.042) and pace.rest(2) == 0
    pace.passed(1, 4, 0.011)
    assert pace.plan([[0.99] * 9], [5.0]) == [9]
    for _ in range(7):
        pace.looked(1, 0.2)                                    # longer than it could ever save
    assert pace.rest(1) == LONGEST_REST and pace.plan([[0.99] * 9], [5.0]) == [0]


def test_an_account_lends_a_little_and_keeps_some_of_what_was_won():
    account = Account()
    assert account.spare == START
    for _ in range(100):
        account.book(1, 1.0)
    assert account.spare == pytest.approx(START + 100 * SHARE)
    account.book(1, 2.5)
    assert account.spare == pytest.approx(START + 101 * SHARE - 1.5)
    for _ in range(50):
        account.book(4, 1.5)
    assert account.spare < START + 301 * SHARE + 4.001
    before = account.won
    assert account.pay(0.3) and account.won == before          # the first looks in vain
    assert account.pay(0.3) and account.won == pytest.approx(before - 0.3)            # from what was won
    while account.pay(0.3):
        pass
    assert PUT_BY <= account.won < PUT_BY + 0.3
    fresh = Account()
    assert [fresh.pay(FIRST_LOOKS / 4) for _ in range(6)] == [True] * 4 + [False] * 2 and fresh.won == 0 and fresh.spare == START
