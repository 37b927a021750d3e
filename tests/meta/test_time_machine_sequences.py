"""The time machine under any sequence of steps, snapshots, rewinds and excursions, against copies of everything."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from time_machine_helpers import follow, make

NAMES = st.sampled_from("abc")
SEEDS = st.integers(0, 30)
SIMPLE = st.one_of(
    st.tuples(st.just("advance"), NAMES, SEEDS, st.booleans()),
    st.tuples(st.sampled_from(["rewind", "snapshot"]), NAMES),
)
OPERATION = st.recursive(
    SIMPLE,
    lambda inner: st.tuples(
        st.sampled_from(["perturbed", "excursion"]), SEEDS, st.lists(inner, max_size=4), st.booleans()
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("store", ["device", "pinned"])
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(operations=st.lists(OPERATION, max_size=12), table_rows=st.sampled_from([1, 99]), low_precision=st.booleans())
def test_any_sequence_is_as_if_everything_had_been_copied(store, operations, table_rows, low_precision):
    follow(make(table_rows, store, low_precision=low_precision)[2], operations)
