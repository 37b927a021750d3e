"""What differs between a CPU and a CUDA device when something is timed on it: clock, caches, memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.profiling.allocated import allocated


class Host:
    """The CPU."""

    name, copied = "cpu", 2**28  # bytes: many times the last cache
    square = 2048  # rows of a matrix large enough that its product runs at the full rate

    def __init__(self):
        self.device = torch.device(self.name)
        self._evict = torch.zeros(2 * self.cache(), dtype=torch.uint8, device=self.device)
        self._rates: dict[torch.dtype, float] = {}

    def cache(self) -> int:
        """Bytes of the last-level cache."""
        sizes = [f.read_text().strip() for f in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max((int(s.removesuffix("K")) * 1024 for s in sizes if s.endswith("K")), default=2**25)

    def flush(self) -> None:
        """Put something else into the caches."""
        self._evict.add_(1)

    def seconds(self, call: Callable[[], Any], repeat: int = 1) -> float:
        """Of one call. What the last one returns is freed outside."""
        kept = None
        started = time.perf_counter()
        for _ in range(repeat):
            kept = call()
        found = (time.perf_counter() - started) / repeat
        del kept
        return found

    def peak(self, call: Callable[[], Any]) -> int:
        """Highest memory during a call over what was there before, results included, in bytes.

        From the events of torch's allocator, which are exact at any size: resident memory also shows what the C library
        keeps of freed blocks, more than twice as much for plain PyTorch at 8 million logits.
        """
        return allocated(call)

    @cached_property
    def rate(self) -> float:
        """`copy_rate`, measured once."""
        return self.copy_rate()

    def copy_rate(self) -> float:
        """Bytes per second of a large copy, read and written both counted."""
        source = torch.rand(self.copied // 4, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * self.copied / median(self.seconds(lambda: target.copy_(source)) for _ in range(10))

    def dense_rate(self, dtype: torch.dtype) -> float:
        """`product_rate` of large square matrices, measured once."""
        if dtype not in self._rates:
            self._rates[dtype] = self.product_rate(self.square, self.square, self.square, dtype)
        return self._rates[dtype]

    def reserved(self) -> int:
        """Bytes that the device's allocator holds, used or not; 0 where it does not say."""
        return 0

    def product_rate(self, rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
        """Floating-point operations per second of a matrix product, a multiplication and an addition counted as two."""
        left, right = (torch.randn(n, inner, device=self.device).to(dtype) for n in (rows, columns))
        product = left @ right.T
        times = [self.seconds(lambda: torch.mm(left, right.T, out=product)) for _ in range(10)]
        return 2 * rows * inner * columns / median(times)


class Cuda(Host):
    """The current CUDA device."""

    name, copied, square = "cuda", 2**32, 8192

    def reserved(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def cache(self) -> int:
        return 2 * torch.cuda.get_device_properties(self.device).L2_cache_size

    def seconds(self, call: Callable[[], Any], repeat: int = 1) -> float:
        kept = None
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        for _ in range(repeat):
            kept = call()
        ended.record()
        ended.synchronize()
        del kept
        return started.elapsed_time(ended) / 1e3 / repeat

    def peak(self, call: Callable[[], Any]) -> int:
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Replays one call as a CUDA graph; its results are the same tensors every time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> Any:
            graph.replay()
            return kept

        return replay
