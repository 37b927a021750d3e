"""Sections are told to whoever listens, and only to them."""

import pytest

from engine.sections import captured, listening, section


class Heard(list):
    def enter(self, name):
        self.append(name)

    def leave(self):
        self.append(None)

    def captured(self):
        return lambda: self.append("replayed")


def test_nesting_is_heard_in_order():
    with listening(Heard()) as heard, section("pilot"), section("teacher forward"):
        pass
    assert heard == ["pilot", "teacher forward", None, None]


def test_a_function_can_be_a_section_and_call_itself():
    @section("quiz")
    def down(n):
        return n and down(n - 1)

    with listening(Heard()) as heard:
        down(2)
    assert heard == ["quiz"] * 3 + [None] * 3


def test_a_section_that_raises_is_left():
    with listening(Heard()) as heard, pytest.raises(ValueError, match="no"), section("JVP"):
        raise ValueError("no")
    assert heard == ["JVP", None]


def test_nobody_hears_before_or_after():
    heard = Heard()
    with section("pilot"):
        pass
    with listening(heard):
        pass
    with section("pilot"):
        pass
    captured()()
    assert heard == []


def test_several_listen():
    first, second = Heard(), Heard()
    with listening(first):
        with listening(second), section("quiz"):
            pass
        with section("pilot"):
            pass
        again = captured()
    again()  # a graph is replayed for those that heard it captured
    assert first == ["quiz", None, "pilot", None, "replayed"]
    assert second == ["quiz", None]


def test_listening_ends_with_an_error():
    heard = Heard()
    with pytest.raises(ValueError, match="no"), listening(heard):
        raise ValueError("no")
    with section("pilot"):
        pass
    assert heard == []
