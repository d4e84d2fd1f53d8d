"""An order in which groups of positions are of one kind."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ws_algorithm.recipes.aspect_ratios import grouped_order, is_tall


def order_of(kinds: list[bool], group_size: int, seed: int = 0) -> list[int]:
    return grouped_order(
        torch.tensor(kinds, dtype=torch.bool), group_size, torch.Generator().manual_seed(seed)
    ).tolist()


@given(st.lists(st.booleans(), max_size=30), st.integers(1, 7), st.integers(0, 5))
def test_every_position_is_there_once_and_at_most_one_group_is_mixed(kinds, group_size, seed):
    order = order_of(kinds, group_size, seed)
    groups = [order[start : start + group_size] for start in range(0, len(order), group_size)]
    whole = [group for group in groups if len(group) == group_size]

    assert sorted(order) == list(range(len(kinds)))
    assert sum(len({kinds[position] for position in group}) > 1 for group in whole) <= 1


def test_groups_and_positions_in_them_are_shuffled():
    orders = {tuple(order_of([True, False] * 8, 4, seed)) for seed in range(20)}
    firsts = {frozenset(order[:4]) for order in orders}

    assert len(orders) == 20 and len(firsts) > 2
    assert {order[0] % 2 for order in orders} == {0, 1}


def test_what_is_left_out_differs_from_epoch_to_epoch():
    assert len({order_of([True] * 5, 4, seed)[-1] for seed in range(50)}) == 5


def test_tall_is_higher_than_wide():
    assert is_tall(torch.tensor([[4, 3], [3, 4], [3, 3]])).tolist() == [True, False, False]
