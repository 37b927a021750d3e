"""A stand-in for `torch.cuda`: a stream on which time passes by `work`, its events and captures."""


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


class FakeCapture:
    """engine.models.cuda_graph.Capture, on the fake stream; `factor` is how long replays take."""

    def __init__(self, cuda):
        self.cuda, self.factor = cuda, 1.0

    def capture(self, call):
        self.cuda.capturing = nodes = []
        out = call()
        self.cuda.capturing = None
        return lambda: self.cuda.replay(nodes, self.factor), out
