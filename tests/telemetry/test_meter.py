"""Seconds by section, on the host's clock and by events of a device that is played here."""

from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCapture, FakeCuda
from fake_nvml import Clock

from engine.models.cuda_graph import Graph
from engine.sections import listening, section
from engine.telemetry import meter
from engine.telemetry.meter import CudaMeter, Meter, meter_of

CUDA, X = torch.device("cuda:0"), torch.zeros(())


def test_time_belongs_to_the_innermost_section():
    clock = Clock(0.0)
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
        with section("logging"):
            clock.now += 1
            assert found.take() == {"other": 0, "logging": 1}  # a reading in the middle of a section
            clock.now += 2
    assert found.take() == {"logging": 2, "other": 0}
    assert found.peak() is None


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def found(cuda):
    """A meter of the fake device, which listens."""
    with listening(CudaMeter(CUDA, cuda)) as meter:
        yield meter


def graph_of(cuda, pilot=2.0, quiz=1.0):
    """A captured step: `pilot` seconds, then `quiz` seconds. And its capture."""

    def step(x):
        with section("pilot"):
            cuda.work(pilot)
        with section("quiz"):
            cuda.work(quiz)
        return {"loss": x}

    capture = FakeCapture(cuda)
    graph = Graph(step, (X,), capture)
    return (lambda: graph(X)), capture


def wait(cuda, seconds=0.5):
    with section("data wait"):
        cuda.work(seconds)


def test_device_time_by_events(cuda, found):
    for _ in range(3):
        with section("pilot"):
            cuda.work(2.0)
            with section("teacher forward"):
                cuda.work(4.0)
        cuda.work(1.0)
    assert found.take() == pytest.approx({"other": 3.0, "pilot": 6.0, "teacher forward": 12.0})
    made = cuda.Event.made
    with section("quiz"):
        cuda.work(5.0)
    assert found.take() == pytest.approx({"other": 0.0, "quiz": 5.0})
    assert cuda.Event.made == made  # events are used again


def test_replays_are_divided_by_the_events_in_their_graph(cuda, found):
    graph, capture = graph_of(cuda)
    other, _ = graph_of(cuda, pilot=1.0, quiz=7.0)
    found.take()
    for factor in (1.0, 1.0, 1.5):  # the last replay is slower: the others are divided as it was, and none is lost
        capture.factor = factor
        wait(cuda)
        graph()
    wait(cuda)
    other()
    expected = {"data wait": 4 * 0.5, "pilot": 2 * 2.0 + 3.0 + 1.0, "quiz": 2 * 1.0 + 1.5 + 7.0, "other": 0.0}
    assert found.take() == pytest.approx(expected)
    for capture.factor in (1.0, 0.5):
        graph()
        wait(cuda, 0.0)
    # the last one was faster: 1.5 s of the first replay, whose own events are gone, are of no section
    assert found.take() == pytest.approx({"pilot": 2.0, "quiz": 1.0, "other": 1.5, "data wait": 0.0})


@pytest.mark.parametrize("reached", ["none", "half"])
def test_a_replay_on_its_way_is_not_waited_for(cuda, found, reached):
    """What the replay before took is as good; with half of the events set, times to old ones would be negative."""
    graph, _ = graph_of(cuda)
    graph()
    found.take()
    wait(cuda)
    graph()
    (recording,) = (mark for mark in found._marks if hasattr(mark, "marks"))
    if reached == "none":
        for event, _ in recording.marks:
            event.reached = False
    else:
        recording.marks[0][0].at += 100.0
    assert found.take() == pytest.approx({"data wait": 0.5, "pilot": 2.0, "quiz": 1.0, "other": 0.0})


def test_a_capture_that_breaks_off_leaves_no_trace(cuda, found):
    cuda.capturing = []
    with section("pilot"):
        cuda.broken = True  # leaving the section raises nothing: what broke the capture is to be seen
    cuda.capturing, cuda.broken = None, False
    with section("pilot"):
        cuda.work(1.0)
    graph, _ = graph_of(cuda)
    found.take()
    graph()
    assert found.take() == pytest.approx({"pilot": 2.0, "quiz": 1.0, "other": 0.0})


@pytest.mark.parametrize("replayed", [False, True])
def test_many_marks_are_read_on_the_way(cuda, found, monkeypatch, replayed):
    monkeypatch.setattr(meter, "MOST_MARKS", 10)
    graph, _ = graph_of(cuda)
    found.take()
    most = 0
    for _ in range(100):
        if replayed:  # without a mark between two of them
            graph()
        else:
            with section("pilot"):
                cuda.work(2.0)
            most = max(most, len(found._marks))
    assert most <= 12
    assert found.take() == pytest.approx({"pilot": 200.0, "other": 0.0} | ({"quiz": 100.0} if replayed else {}))


def test_memory_by_section_while_watching_and_the_peak_of_all(cuda, found):
    cuda.work(1.0, memory=70)
    with section("pilot"):  # not watched
        cuda.work(1.0, memory=900)
    assert found.memory == {} and cuda.resets == 0
    found.watch(True)
    found.watch(True)
    for memory in (50, 40):
        with section("quiz"):
            cuda.work(1.0, memory=memory)
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
