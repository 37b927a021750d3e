"""Seconds by section, on the host's clock and by events of a device that is played here."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.models.cuda_graph import Graph
from engine.sections import listening, section
from engine.telemetry import meter
from engine.telemetry.meter import CudaMeter, Meter, meter_of

CUDA = torch.device("cuda:0")


class Clock:
    """Goes on when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_time_belongs_to_the_innermost_section():
    clock = Clock()
    found = Meter(clock)
    with listening(found):
        clock.now += 1  # other
        with section("pilot"):
            clock.now += 2
            assert found.section == "pilot"
            with section("teacher forward"):
                clock.now += 4
                assert found.section == "teacher forward"
            clock.now += 8
        clock.now += 16
        assert found.section == "other"
    assert found.take() == {"other": 17, "pilot": 10, "teacher forward": 4}
    clock.now += 3
    assert found.take() == {"other": 3}
    assert found.peak() is None


@given(st.recursive(st.just([]), lambda inner: st.lists(st.tuples(st.sampled_from("abc"), inner), max_size=3)))
def test_sections_add_up_to_the_time_that_passed(tree):
    clock = Clock()
    found = Meter(clock)

    def walk(nodes):
        for name, inner in nodes:
            clock.now += 1
            with section(name):
                clock.now += 1
                walk(inner)
            clock.now += 1

    with listening(found):
        walk(tree)
        first = found.take()
        walk(tree)
    assert sum(first.values()) == clock.now / 2
    again = found.take()
    assert sum(again.values()) == clock.now / 2


def test_a_reading_in_the_middle_of_a_section():
    clock = Clock()
    found = Meter(clock)
    with listening(found), section("logging"):
        clock.now += 1
        assert found.take() == {"other": 0, "logging": 1}
        clock.now += 2
    assert found.take() == {"logging": 2, "other": 0}


class FakeCuda:
    """torch.cuda as a meter needs it: a stream on which time passes by `work`, that the host runs ahead of."""

    def __init__(self):
        self.time = 0.0  # in the stream, seconds
        self.capturing, self.broken = None, False
        self.allocated = self.highest = 0
        self.resets = 0
        cuda = self

        class Event:
            made = 0

            def __init__(self, enable_timing=False, external=False):
                assert enable_timing
                Event.made += 1
                self.external, self.at, self.reached = external, None, True

            def record(self):
                if cuda.capturing is not None:
                    if cuda.broken:
                        raise RuntimeError("the capture is broken")
                    assert self.external, "an event of another kind would be an edge of the graph"
                    cuda.capturing.append(self)
                else:
                    assert not self.external
                    self.at = cuda.time

            def elapsed_time(self, other):
                if not (self.reached and other.reached) or None in (self.at, other.at):
                    raise RuntimeError("not ready")
                return 1000 * (other.at - self.at)

            def synchronize(self):
                assert self.at is not None

        self.Event = Event

    def is_current_stream_capturing(self):
        return self.capturing is not None

    def work(self, seconds, memory=0):
        if self.capturing is not None:
            self.capturing.append(seconds)
        else:
            self.time += seconds
        self.highest = max(self.highest, self.allocated + memory)

    def replay(self, nodes, factor=1.0):
        for node in nodes:
            if isinstance(node, float):
                self.time += factor * node
            else:
                node.at = self.time

    def max_memory_allocated(self, device):
        return self.highest

    def reset_peak_memory_stats(self, device):
        self.resets += 1
        self.highest = self.allocated


@pytest.fixture
def cuda():
    return FakeCuda()


def test_device_time_by_events(cuda):
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        for _ in range(3):
            with section("pilot"):
                cuda.work(2.0)
                with section("teacher forward"):
                    cuda.work(4.0)
            cuda.work(1.0)
    assert found.take() == pytest.approx({"other": 3.0, "pilot": 6.0, "teacher forward": 12.0})
    made = cuda.Event.made
    with listening(found), section("quiz"):
        cuda.work(5.0)
    assert found.take() == pytest.approx({"other": 0.0, "quiz": 5.0})
    assert cuda.Event.made == made  # events are used again


def test_many_marks_are_read_on_the_way(cuda, monkeypatch):
    monkeypatch.setattr(meter, "MOST_MARKS", 10)
    found, most = CudaMeter(CUDA, cuda), 0
    with listening(found):
        for _ in range(100):
            with section("pilot"):
                cuda.work(1.0)
            most = max(most, len(found._marks))
    assert most <= 12
    assert found.take() == pytest.approx({"other": 0.0, "pilot": 100.0})


class FakeCapture:
    """engine.models.cuda_graph.Capture, on the fake stream; `factor` is how long replays take."""

    def __init__(self, cuda):
        self.cuda, self.factor = cuda, 1.0

    def capture(self, call):
        self.cuda.capturing = nodes = []
        out = call()
        self.cuda.capturing = None
        return lambda: self.cuda.replay(nodes, self.factor), out


def graph_of(cuda, pilot=2.0, quiz=1.0):
    def step(x):
        with section("pilot"):
            cuda.work(pilot)
        with section("quiz"):
            cuda.work(quiz)
        return {"loss": x}

    capture = FakeCapture(cuda)
    return Graph(step, (torch.zeros(()),), capture), capture


def test_replays_are_divided_by_the_events_in_their_graph(cuda):
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        graph, capture = graph_of(cuda)
        other, _ = graph_of(cuda, pilot=1.0, quiz=7.0)
        found.take()
        for _ in range(2):
            with section("data wait"):
                cuda.work(0.5)
            graph(torch.zeros(()))
        capture.factor = 1.5  # the last replay is slower: the others are divided as it was, and none is lost
        with section("data wait"):
            cuda.work(0.5)
        graph(torch.zeros(()))
        with section("data wait"):
            cuda.work(0.5)
        other(torch.zeros(()))
        taken = found.take()
    assert sum(taken.values()) == pytest.approx(2.0 + 2 * 3.0 + 4.5 + 8.0)
    assert taken["data wait"] == pytest.approx(2.0)
    assert taken["pilot"] == pytest.approx(2 * 2.0 + 3.0 + 1.0)
    assert taken["quiz"] == pytest.approx(2 * 1.0 + 1.5 + 7.0)
    assert taken["other"] == pytest.approx(0.0)


def test_a_faster_replay_leaves_the_rest_to_other(cuda):
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        graph, capture = graph_of(cuda)
        found.take()
        graph(torch.zeros(()))
        with section("data wait"):
            pass
        capture.factor = 0.5
        graph(torch.zeros(()))
    taken = found.take()
    assert sum(taken.values()) == pytest.approx(4.5)
    assert taken["pilot"] == pytest.approx(2.0) and taken["quiz"] == pytest.approx(1.0)
    assert taken["other"] == pytest.approx(1.5)  # of the first replay, whose own events are gone


def test_events_of_a_replay_on_its_way_are_not_waited_for(cuda):
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        graph, _ = graph_of(cuda)
        graph(torch.zeros(()))
        found.take()
        with section("data wait"):
            cuda.work(0.5)
        graph(torch.zeros(()))
        for mark in found._marks:
            for event, _ in getattr(mark, "marks", []):
                event.reached = False
        taken = found.take()
    assert taken == pytest.approx({"data wait": 0.5, "pilot": 2.0, "quiz": 1.0, "other": 0.0})


def test_a_capture_that_breaks_off_leaves_no_trace(cuda):
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        cuda.capturing = []
        with section("pilot"):
            cuda.broken = True  # leaving the section raises nothing: what broke the capture is to be seen
        cuda.capturing, cuda.broken = None, False
        with section("pilot"):
            cuda.work(1.0)
        graph, _ = graph_of(cuda)
        found.take()
        graph(torch.zeros(()))
        taken = found.take()
    assert taken == pytest.approx({"pilot": 2.0, "quiz": 1.0, "other": 0.0})


def test_memory_by_section_while_watching_and_the_peak_of_all(cuda):
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        cuda.work(1.0, memory=70)
        with section("pilot"):  # not watched
            cuda.work(1.0, memory=900)
        assert found.memory == {} and cuda.resets == 0
        found.watch(True)
        found.watch(True)
        with section("quiz"):
            cuda.work(1.0, memory=50)
        with section("quiz"):
            cuda.work(1.0, memory=40)
        found.watch(False)
        cuda.work(1.0, memory=800)
        cuda.capturing = []
        with section("JVP"):  # captured: its memory is laid out now
            cuda.work(1.0, memory=60)
        cuda.capturing = None
    assert found.memory == {"quiz": 50, "JVP": 60, "other": 0}  # what was not watched is of no section
    assert found.peak() == 900
    cuda.work(1.0, memory=1000)
    assert found.peak() == 1000


def test_each_device_has_its_meter(monkeypatch):
    assert type(meter_of(torch.device("cpu"))) is Meter
    made = []
    monkeypatch.setattr(meter, "CudaMeter", lambda device: made.append(device) or SimpleNamespace())
    meter_of(CUDA)
    assert made == [CUDA]


def test_a_replay_on_its_way_may_have_set_half_of_the_events(cuda):
    """Then times between old and new ones are negative: what the replay before took is as good."""
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        graph, _ = graph_of(cuda)
        graph(torch.zeros(()))
        found.take()
        with section("data wait"):
            pass
        graph(torch.zeros(()))
        recording = next(mark for mark in found._marks if hasattr(mark, "marks"))
        recording.marks[0][0].at += 100.0
        taken = found.take()
    assert taken == pytest.approx({"data wait": 0.0, "pilot": 2.0, "quiz": 1.0, "other": 0.0})


def test_replays_without_a_mark_between_them(cuda, monkeypatch):
    monkeypatch.setattr(meter, "MOST_MARKS", 10)
    found = CudaMeter(CUDA, cuda)
    with listening(found):
        graph, _ = graph_of(cuda)
        found.take()
        for _ in range(30):
            graph(torch.zeros(()))
        taken = found.take()
    assert taken["pilot"] == pytest.approx(60.0) and taken["quiz"] == pytest.approx(30.0)
