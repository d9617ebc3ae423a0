"""The order of the data: whatever the ranks and restarts, each draw comes once, in its place."""

from collections import Counter
from itertools import chain, islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raybrats.data.plan import Plan, generator

plans = st.builds(
    Plan,
    num_cases=st.integers(1, 40),
    global_batch=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def interleaved(plan: Plan, world: int, start: int, stop: int) -> list[int]:
    """The draws of all ranks, each step's put together as the ranks hold them."""
    ranks = [
        list(plan.draws(rank=rank, world=world, start=start, stop=stop)) for rank in range(world)
    ]
    return list(chain.from_iterable(zip(*ranks, strict=True)))


@given(plan=plans, data=st.data(), steps=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_the_ranks_together_see_every_draw_once_in_order(plan: Plan, data, steps: int):
    world = data.draw(st.sampled_from(divisors(plan.global_batch)))
    assert interleaved(plan, world, 0, steps) == list(range(steps * plan.global_batch))


@given(plan=plans, data=st.data(), steps=st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_resuming_at_any_step_with_any_world_gives_the_tail(plan: Plan, data, steps: int):
    start = data.draw(st.integers(0, steps))
    before, after = (data.draw(st.sampled_from(divisors(plan.global_batch))) for _ in range(2))
    seen = interleaved(plan, before, 0, start) + interleaved(plan, after, start, steps)
    assert seen == list(range(steps * plan.global_batch))


@given(plan=plans, epochs=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_each_case_once(plan: Plan, epochs: int):
    for epoch in range(epochs):
        draws = range(epoch * plan.num_cases, (epoch + 1) * plan.num_cases)
        assert Counter(map(plan.case_of, draws)) == Counter(range(plan.num_cases))


@given(plan=plans, draw=st.integers(0, 10**9))
@settings(max_examples=100, deadline=None)
def test_the_case_of_a_draw_is_a_function_of_the_seed(plan: Plan, draw: int):
    again = Plan(plan.num_cases, plan.global_batch + 1, plan.seed)
    assert plan.case_of(draw) == again.case_of(draw)


def test_epochs_and_seeds_are_ordered_differently():
    orders = {
        tuple(map(Plan(20, 4, seed).case_of, range(20 * epoch, 20 * epoch + 20)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_no_rank_waits_for_a_long_plan():
    draws = Plan(369, 4, 0).draws(rank=1, world=2, start=10**9, stop=10**10)
    assert list(islice(draws, 3)) == [4 * 10**9 + 1, 4 * 10**9 + 3, 4 * 10**9 + 5]


def test_random_numbers_belong_to_a_draw_and_a_purpose():
    streams = [generator(*key).random(8) for key in np.ndindex(3, 4, 2)]
    assert np.array_equal(generator(2, 3, 1).random(8), streams[-1])
    assert len({tuple(stream) for stream in streams}) == len(streams)
