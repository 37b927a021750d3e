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
    @section("quiz")
    def down(n):
        return n and down(n - 1)

    with listening(Heard()) as heard, section("pilot"), section("teacher forward"):
        down(1)  # a function can be a section, and call itself
    assert heard == ["pilot", "teacher forward", "quiz", "quiz", None, None, None, None]


def test_an_error_leaves_the_section_and_ends_the_listening():
    with pytest.raises(ValueError, match="no"), listening(Heard()) as heard, section("JVP"):
        raise ValueError("no")
    with section("pilot"):
        captured()()
    assert heard == ["JVP", None]


def test_several_listen():
    first, second = Heard(), Heard()
    with section("data wait"):
        pass
    with listening(first):
        with listening(second), section("quiz"):
            pass
        with section("pilot"):
            pass
        again = captured()
    again()  # a graph is replayed for those that heard it captured
    assert first == ["quiz", None, "pilot", None, "replayed"]
    assert second == ["quiz", None]
