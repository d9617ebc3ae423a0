"""The order of the data: whatever the ranks and restarts, each draw comes once, in its place."""

from collections import Counter
from itertools import chain, islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raybrats.data.plan import Plan, Visit, generator

plans = st.builds(
    Plan,
    num_cases=st.integers(1, 40),
    global_batch=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    patches_per_case=st.integers(1, 4),
)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def steps_of(visits: tuple[Visit, ...]) -> list[list[tuple[int, int]]]:
    """(draw, case) of each step that the visits fill."""
    return [[(visit.draws[t], visit.case) for visit in visits] for t in range(len(visits[0].draws))]


def rank_steps(plan: Plan, rank: int, world: int, start: int, stop: int) -> list:
    visits = plan.visits(rank=rank, world=world, start=start, stop=stop)
    return list(chain.from_iterable(map(steps_of, visits)))


def steps(plan: Plan, world: int, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """(draw, case) of all ranks step by step, each step's put together as the ranks hold them."""
    ranks = [rank_steps(plan, rank, world, start, stop) for rank in range(world)]
    return [list(chain.from_iterable(zip(*step, strict=True))) for step in zip(*ranks, strict=True)]


def draws(found: list[list[tuple[int, int]]]) -> list[int]:
    return [draw for step in found for draw, _ in step]


@given(plan=plans, data=st.data(), count=st.integers(1, 30))
@settings(max_examples=150)
def test_the_ranks_together_see_every_draw_once_in_order(plan: Plan, data, count: int):
    world = data.draw(st.sampled_from(divisors(plan.global_batch)))
    found = steps(plan, world, 0, count)
    assert draws(found) == list(range(count * plan.global_batch))
    assert found == steps(plan, 1, 0, count)


@given(plan=plans, data=st.data(), count=st.integers(1, 30))
@settings(max_examples=150)
def test_resuming_at_any_step_with_any_world_gives_the_tail(plan: Plan, data, count: int):
    start = data.draw(st.integers(0, count))
    before, after = (data.draw(st.sampled_from(divisors(plan.global_batch))) for _ in range(2))
    seen = steps(plan, before, 0, start) + steps(plan, after, start, count)
    assert seen == steps(plan, 1, 0, count)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_twenty_stops_leave_nothing_missing_doubled_or_out_of_order(world: int):
    plan = Plan(num_cases=37, global_batch=12, seed=5, patches_per_case=3)
    total = 400
    stops = np.sort(np.random.default_rng(world).choice(np.arange(1, total), 20, replace=False))
    seen: list[int] = []
    for start, stop in zip([0, *stops], [*stops, total], strict=True):
        seen += draws(steps(plan, world, int(start), int(stop)))
    expected = list(range(total * plan.global_batch))
    missing = len(set(expected) - set(seen))
    duplicate = len(seen) - len(set(seen))
    out_of_order = sum(b <= a for a, b in pairwise(seen))
    assert missing == 0
    assert duplicate == 0
    assert out_of_order == 0


@given(plan=plans, epochs=st.integers(1, 4))
@settings(max_examples=80)
def test_every_epoch_visits_each_case_as_often_as_asked(plan: Plan, epochs: int):
    per_case, batch = plan.patches_per_case, plan.global_batch
    windows = -(-epochs * plan.num_cases // batch)
    visits = chain.from_iterable(plan.visits(rank=0, world=1, start=0, stop=windows * per_case))
    seen = list(islice(visits, epochs * plan.num_cases))
    assert all(len(visit.draws) == per_case for visit in seen)
    for epoch in range(epochs):
        part = seen[epoch * plan.num_cases : (epoch + 1) * plan.num_cases]
        assert Counter(visit.case for visit in part) == Counter(range(plan.num_cases))
        assert {visit.ordinal for visit in part} == {epoch * per_case}


@given(plan=plans, start=st.integers(0, 200))
@settings(max_examples=200)
def test_no_step_has_two_draws_of_a_case_unless_there_are_too_few(plan: Plan, start: int):
    for step in steps(plan, 1, start, start + 30):
        cases = Counter(case for _, case in step)
        if plan.num_cases >= plan.global_batch:
            assert max(cases.values()) == 1
        else:  # as even as can be, but for a step that lies in two epochs
            assert max(cases.values()) <= -(-plan.global_batch // plan.num_cases) + 1


@given(plan=plans, windows=st.integers(1, 20))
@settings(max_examples=50)
def test_turns_count_the_draws_of_a_case(plan: Plan, windows: int):
    turns: dict[int, list[int]] = {}
    visits = plan.visits(rank=0, world=1, start=0, stop=windows * plan.patches_per_case)
    for visit in chain.from_iterable(visits):
        turns.setdefault(visit.case, []).extend(visit.ordinal + t for t in range(len(visit.draws)))
    assert all(sorted(seen) == list(range(len(seen))) for seen in turns.values())


def test_epochs_and_seeds_are_ordered_differently():
    orders = set()
    for seed in range(5):
        cases = [case for step in steps(Plan(20, 4, seed), 1, 0, 25) for _, case in step]
        orders |= {tuple(cases[20 * epoch : 20 * epoch + 20]) for epoch in range(5)}
    assert len(orders) == 25


def test_no_rank_waits_for_a_long_plan():
    visits = Plan(369, 4, 0).visits(rank=1, world=2, start=10**9, stop=10**10)
    first = [visit.draws for visit in next(visits)]
    assert first == [(4 * 10**9 + 1,), (4 * 10**9 + 3,)]


def test_random_numbers_belong_to_a_draw_and_a_purpose():
    streams = [generator(*key).random(8) for key in np.ndindex(3, 4, 2)]
    assert np.array_equal(generator(2, 3, 1).random(8), streams[-1])
    assert len({tuple(stream) for stream in streams}) == len(streams)
