"""The layers that a feature loss matches, against methods 2."""

import pytest

from engine.errors import UserError
from engine.features import layers_to_match


def test_published_maps():
    """6 layers from 12: hidden state 0 is the embedding's output, so that layer n (1-based) is state n."""
    assert layers_to_match(6, 12, "skip") == ([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert layers_to_match(6, 12, "last") == ([1, 2, 3, 4, 5], [7, 8, 9, 10, 11])


@pytest.mark.parametrize("how", ["skip", "last"])
@pytest.mark.parametrize("student", range(2, 13))
def test_any_two_depths(student, how):
    """One inner layer of the teacher for each of the student's, in order; the embedding's output and the last left out."""
    for teacher in range(student, 25):
        inner, matched = layers_to_match(student, teacher, how)
        assert inner == list(range(1, student))
        assert len(matched) == len(inner) and matched == sorted(set(matched))
        assert matched[0] >= 1 and matched[-1] <= teacher - 1
        if teacher == student:
            assert matched == inner


def test_skip_rounds_down():
    assert layers_to_match(4, 6, "skip") == ([1, 2, 3], [1, 3, 4])


@pytest.mark.parametrize(("student", "teacher"), [(1, 12), (0, 1), (6, 5)])
def test_depths_that_cannot_be_matched(student, teacher):
    with pytest.raises(UserError, match=f"student has {student} layers and a teacher {teacher}.*--feature-loss none"):
        layers_to_match(student, teacher, "skip")
