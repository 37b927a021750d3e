"""torch.compile for what a transformer repeats: its encoder layers, by one compiled function for all of them.

Every layer but the last, which runs on the first token and costs next to nothing (engine.models.encoder_layers). A graph serves
all layers of a model and of models of its shape, and all lengths and batch sizes; weights are inputs of it, so that
those which stand in for a module's own (a bf16 copy) pass through. Each kind of pass has its graph: train or eval mode,
with or without gradients, dtype, attention, sizes of the weights. It is compiled when the kind first comes up.

First derivatives only. Dropout has the masks of an eager pass on a CPU, others on CUDA, where the compiler draws them in
the kernels that use them: so passes that another one is to repeat are not for this.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.models.families import LEAN, family, model_type

# Batch size and length that code is made for, and more tokens than which there is code for more: sums of over 4096 numbers
# are taken in another way in torch 2.13's C++. Every graph runs with all sizes that come up
SIZES, LARGE, LIMIT = (32, 64), (64, 128), 4096
GRAPHS = 64  # kinds of passes. torch's own limit is 8, beyond which it stops (`fullgraph`) or goes on without compiling
OPTIONS = {
    "cpu": {"deterministic": True, "fallback_random": True},  # its own dropout on a CPU is slower than torch's
    "cuda": {"deterministic": True},  # no kernel is chosen by its time where that changes a sum
}


class CompiledLayers:
    """`compiled(layer, hidden, mask)` is what `layer(hidden, mask)` gives, from one compiled function for all layers.

    Hooks on a layer run as ever, hooks inside it do not. `backend` is a name that torch.compile knows.
    """

    def __init__(self, backend: str = "inductor"):
        self.backend = backend
        self._functions = {}  # by device type
        self._before = _spent()

    def __call__(self, layer: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        """Hidden [B, L, H], mask [B, 1, 1 or L, L] -> [B, L, H]. A batch of one example, or of one token, runs as it is: a
        size of 1 would have graphs of its own, perhaps for one batch of an epoch.

        Raises torch._dynamo.exc.FailOnRecompileLimitHit for more than GRAPHS kinds of passes.
        """
        if 1 in hidden.shape[:2]:
            return _layer(layer, hidden, mask)
        with _without_hooks(layer):
            try:
                with torch.compiler.set_stance("fail_on_recompile"):
                    return self._run(layer, hidden, mask)
            except RuntimeError as e:
                if "fail_on_recompile" not in str(e):
                    raise
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                self._compile(layer, hidden, mask)
                return self._run(layer, hidden, mask)

    def _compile(self, layer: nn.Module, hidden: Tensor, mask: Tensor) -> None:
        """The code depends on the sizes that it is first called with, and so may its sums. These must not be those of the
        batch that comes first, which is another one in a run that goes on."""
        B, L = SIZES if hidden.shape[0] * hidden.shape[1] <= LIMIT else LARGE
        hidden = hidden.new_zeros(B, L, hidden.shape[2]).requires_grad_(hidden.requires_grad)
        mask = mask.new_ones(B, 1, 1, L).expand(-1, -1, 1 if mask.shape[2] == 1 else L, -1)
        with torch.random.fork_rng(devices=[hidden.device] if hidden.is_cuda else []):
            self._run(layer, hidden, mask)

    def _run(self, layer: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        for tensor, dims in ((hidden, (0, 1)), (mask, (0, 2, 3))):
            torch._dynamo.mark_dynamic(tensor, [dim for dim in dims if tensor.shape[dim] > 1])
        return self._function(hidden.device.type)(layer, hidden, mask)

    def _function(self, device: str):
        if device not in self._functions:
            options = OPTIONS.get(device) if self.backend == "inductor" else None
            # dynamic=False: of the sizes that are not marked, those of the weights, none becomes a variable
            self._functions[device] = torch.compile(
                _layer, fullgraph=True, dynamic=False, backend=self.backend, options=options
            )
        return self._functions[device]

    def check(self, module: nn.Module, name: str) -> None:
        """Raises UserError for a module whose layers are not known."""
        if family(module).lean is None:
            raise UserError(
                f"--compile knows the layers of {', '.join(LEAN)}, and {name} is a {model_type(module)}; leave it out."
            )

    def try_out(self, device: torch.device) -> None:
        """Compile something small; raises UserError with the reason where nothing can be compiled on `device`."""
        # the cache would have an answer where there is no compiler any more
        options = OPTIONS.get(device.type, {}) | {"fx_graph_cache": False} if self.backend == "inductor" else None
        probe = torch.compile(_probe, fullgraph=True, backend=self.backend, options=options)
        try:
            probe(torch.ones(8, device=device))
        except (RuntimeError, OSError) as e:
            raise UserError(f"--compile needs a compiler that torch can use on this {device.type} device "
                            f"({str(e).splitlines()[0]}); install one, or leave it out.") from e  # fmt: skip

    def describe(self, teachers: str, device: torch.device) -> str:
        """What is compiled in a method whose teachers are "none", "frozen" or "learning", for a reader."""
        what = {"none": "the student's", "frozen": "the student's and the teachers'",
                "learning": "the teachers' and the quiz's, not of the student's pilot, which is differentiated again",
                }[teachers]  # fmt: skip
        text = f"torch.compile: encoder layers in training passes ({what}), each kind of pass when it first comes up."
        little = " On a CPU it changes little: steps were 0.93 to 1.06 times as fast (docs/log.md)."
        return text + little if device.type == "cpu" else text

    def spent(self) -> tuple[int, float]:
        """Graphs that this process compiled since this object was made, and the seconds that took."""
        graphs, seconds = _spent()
        return graphs - self._before[0], seconds - self._before[1]


def _spent() -> tuple[int, float]:
    from torch._dynamo.utils import calculate_time_spent, counters

    return counters["stats"]["unique_graphs"], calculate_time_spent()["total_wall_time"]


@contextmanager
def _without_hooks(layer: nn.Module):
    """transformers leaves hooks in a model that has once given hidden states, to collect attention maps, which nobody asks
    for here; they cannot be traced."""
    hooked = [(m, m._forward_hooks) for m in layer.modules() if m is not layer and m._forward_hooks]
    for m, hooks in hooked:
        m._forward_hooks = type(hooks)()
    try:
        yield
    finally:
        for m, hooks in hooked:
            m._forward_hooks = hooks


def _layer(layer: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
    return type(layer).forward(layer, hidden, mask)


def _probe(x: Tensor) -> Tensor:
    return x.relu() + 1
