"""Token buckets and accounts: never more than was promised, nothing lost, nobody slept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.limits import Account, Bucket, KeyLimits, LimitReached, ReceivingBudget

COSTS = st.integers(min_value=1, max_value=200)
PAUSES = st.floats(min_value=0, max_value=100)


def account(**limits: int) -> Account:
    return Account(KeyLimits(**limits), 0.0)


def refused(work, *arguments) -> LimitReached:
    with pytest.raises(LimitReached) as caught:
        work(*arguments)
    return caught.value


def test_a_bucket_starts_full_and_regains_a_sixtieth_a_second():
    bucket = Bucket(60, 5.0)
    bucket.take(60, 5.0)
    assert bucket.level(5.0) == 0.0
    assert bucket.level(7.5) == 2.5
    assert bucket.level(1000.0) == 60.0


def test_a_debt_is_paid_before_anything_else_is_allowed():
    bucket = Bucket(60, 0.0)
    bucket.take(90, 0.0)
    assert bucket.level(0.0) == -30.0
    assert bucket.missing(1, 0.0) == 31.0
    assert bucket.missing(1, 31.0) == 0.0


def test_more_than_the_whole_bucket_is_there_when_it_is_full():
    bucket = Bucket(60, 0.0)
    assert bucket.missing(1000, 0.0) == 0.0
    bucket.take(1, 0.0)
    assert bucket.missing(1000, 0.0) == 1.0


def test_a_clock_that_goes_back_gives_nothing():
    bucket = Bucket(60, 10.0)
    bucket.take(60, 10.0)
    assert bucket.level(0.0) == 0.0
    assert bucket.level(11.0) == 1.0


def test_what_is_given_back_never_overflows():
    bucket = Bucket(60, 0.0)
    bucket.take(-60, 0.0)
    assert bucket.level(0.0) == 60.0


@given(st.integers(min_value=1, max_value=100), st.lists(st.tuples(PAUSES, COSTS), max_size=40))
def test_over_any_span_no_more_is_taken_than_was_promised(per_minute, asked):
    bucket, now, taken = Bucket(per_minute, 0.0), 0.0, []
    for pause, cost in asked:
        now += pause
        if cost <= per_minute and bucket.missing(cost, now) == 0.0:
            bucket.take(cost, now)
            taken.append((now, cost))
    for first, (start, _) in enumerate(taken):
        total = 0
        for time, cost in taken[first:]:
            total += cost
            assert total <= per_minute * (1 + (time - start) / 60) + 1e-6


@given(st.integers(min_value=1, max_value=1000), st.lists(st.tuples(PAUSES, COSTS), max_size=20))
def test_what_was_missing_is_there_after_the_time_that_was_named(per_minute, asked):
    bucket, now = Bucket(per_minute, 0.0), 0.0
    for pause, cost in asked:
        now += pause
        later = now + bucket.missing(cost, now)
        assert bucket.missing(cost, later) < 1e-6
        bucket.take(cost, later)
        now = later


def test_without_limits_everything_is_let_in_and_counted():
    open_to_all = account()
    for _ in range(1000):
        open_to_all.enter(0.0)
        open_to_all.charge(10**9, 0.0)
        open_to_all.settle(10**9, 7, 0.0)
    assert (open_to_all.requests, open_to_all.concurrent) == (1000, 1000)
    assert (open_to_all.prompt_tokens, open_to_all.generated_tokens) == (10**12, 7000)


def test_requests_per_minute_says_which_limit_and_when():
    limited = account(requests_per_minute=2)
    limited.enter(0.0)
    limited.enter(0.0)
    said = refused(limited.enter, 0.0)
    assert (said.limit, said.bound, said.retry_after) == ("requests_per_minute", 2, 30.0)
    assert str(said) == "requests_per_minute = 2"
    refused(limited.enter, 29.0)
    limited.enter(30.0)
    assert limited.refused == {"requests_per_minute": 2}
    assert limited.requests == 3


def test_what_is_turned_away_takes_neither_a_place_nor_a_request():
    limited = account(requests_per_minute=2, max_concurrent_requests=1)
    limited.enter(0.0)
    for _ in range(5):
        assert refused(limited.enter, 0.0).limit == "max_concurrent_requests"
    limited.leave()
    limited.enter(0.0)
    limited.leave()
    assert refused(limited.enter, 0.0).limit == "requests_per_minute"
    assert limited.concurrent == 0


def test_prompts_are_taken_at_admission_and_answers_at_the_end():
    limited = account(tokens_per_minute=600)
    limited.charge(500, 0.0)
    said = refused(limited.charge, 200, 0.0)
    assert (said.limit, said.bound, said.retry_after) == ("tokens_per_minute", 600, 10.0)
    limited.settle(500, 400, 10.0)
    assert refused(limited.charge, 1, 10.0).retry_after == pytest.approx(20.1)
    limited.charge(1, 31.0)
    assert (limited.prompt_tokens, limited.generated_tokens) == (500, 400)


def test_a_request_that_the_node_refused_costs_no_tokens():
    limited = account(tokens_per_minute=600)
    limited.charge(600, 0.0)
    limited.refund(600, 0.0)
    limited.charge(600, 0.0)
    assert limited.prompt_tokens == 0


def test_a_prompt_larger_than_a_minute_is_served_from_a_full_bucket():
    limited = account(tokens_per_minute=600)
    limited.charge(6000, 0.0)
    assert refused(limited.charge, 1, 0.0).retry_after == pytest.approx(540.1)
    limited.charge(6000, 600.0)


def test_small_bodies_are_received_whatever_the_large_ones_do():
    budget = ReceivingBudget(1000, free=100)
    assert budget.grow(0, 1000)
    assert budget.grow(0, 200)
    assert not budget.grow(0, 201)
    assert budget.grow(0, 100)
    assert budget.used == 1000
    assert not budget.grow(200, 201)
    budget.release(1000)
    assert budget.grow(200, 201)


def test_one_body_may_always_be_received_alone():
    budget = ReceivingBudget(10, free=0)
    assert budget.grow(0, 5)
    assert budget.grow(5, 5000)
    assert not budget.grow(0, 1)
    budget.release(5000)
    assert budget.used == 0


@given(st.lists(st.lists(st.integers(min_value=1, max_value=500), max_size=6), max_size=8))
def test_the_budget_is_never_exceeded_by_two_and_comes_back_whole(bodies):
    budget, held = ReceivingBudget(1000, free=100), [0] * len(bodies)
    for turn in range(6):
        for index, pieces in enumerate(bodies):
            if turn < len(pieces) and budget.grow(held[index], held[index] + pieces[turn]):
                held[index] += pieces[turn]
        counted = [budget.counted(size) for size in held]
        assert budget.used == sum(counted)
        assert budget.used <= max(1000, *counted, 0)
    for size in held:
        budget.release(size)
    assert budget.used == 0
