import pytest
from hypothesis import given
from hypothesis import strategies as st

from ws_algorithm.recipes.network_arguments import blocks_per_stage, check_at_least, check_between

STEPS = st.sampled_from([6, 9])
OTHERS = st.sampled_from([2, 4])


@given(blocks=st.integers(1, 300), step=STEPS, others=OTHERS)
def test_depth_says_the_number_of_blocks(blocks, step, others):
    assert blocks_per_stage(step * blocks + others, step, others) == blocks


@given(depth=st.integers(-30, 300), step=STEPS, others=OTHERS)
def test_every_other_depth_is_refused(depth, step, others):
    if depth in {step * blocks + others for blocks in range(1, 51)}:
        return
    with pytest.raises(ValueError) as caught:
        blocks_per_stage(depth, step, others)
    assert f"`depth` (={depth}) must be {step} n + {others} with n of at least 1" in str(caught.value)


def test_a_refused_depth_comes_with_three_that_are_not():
    with pytest.raises(ValueError, match="8, 14, 20 and so on"):
        blocks_per_stage(9, step=6, others=2)


def test_numbers_below_the_least_are_refused():
    check_at_least(2, num_classes=2, width=30)

    with pytest.raises(ValueError, match=r"^`width` \(=1\) must be at least 2\.$"):
        check_at_least(2, num_classes=2, width=1)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_numbers_out_of_a_range_are_refused(value):
    check_between(0, 1, threshold=0.0, other=1.0)

    with pytest.raises(ValueError, match=r"^`threshold` \(=[-.\dna]+\) must be at least 0 and at most 1\.$"):
        check_between(0, 1, other=1.0, threshold=value)


def test_a_range_without_an_end_has_no_end_in_its_message():
    check_between(0, float("inf"), beta=1e9)

    with pytest.raises(ValueError, match=r"^`beta` \(=-1\) must be at least 0\.$"):
        check_between(0, float("inf"), beta=-1)
