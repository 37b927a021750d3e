"""A tape of a forward pass, so that the derivative along v of the same pass, y_t = J v, recomputes next to nothing.

What is recorded, and the rule by which each operation's tangent follows from it, stands in `engine.meta.tape_rules`; every other
operation goes through torch's forward mode as it is.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.meta import tape_rules as rules
from engine.meta.dual_pass import DualPass
from engine.meta.tape_rules import ARITHMETIC, DRAWING, NAMES, TANGENTS, Entry


class UnrecordedRandomness(RuntimeError):
    """A replay drew random numbers (torch.bernoulli, F.dropout2d): what it computed is not what was recorded."""


class Tape:
    """Records one forward pass, and lends it to forward-mode passes at the same weights on the same batch.

        with tape.recording():
            logits = student(batch)                                 # values, draws and gradients of a plain forward
        with torch.no_grad(), forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(p, t) for ...}
            with tape.replaying():
                out = student(batch, duals)                         # forward_ad.unpack_dual(out).tangent is J v

    What is held are references, mostly to tensors that the recorded pass's graph holds too; `clear` drops them.
    A replay runs operations that the tape does not know a second time: buffers that they write (BatchNorm's running
    statistics) are written again, so rewind them. Non-reentrant activation checkpointing of the recorded pass does not
    go with dropout on the CPU: its recomputation, outside the tape, saves other tensors, and torch refuses.
    """

    def __init__(self):
        self._entries: list[Entry] = []

    @contextmanager
    def recording(self):
        """Forget what was held and record the body, in which one forward pass runs as it would without a tape."""
        self.clear()
        try:
            with _Recorder(self._entries):
                yield
        except BaseException:
            self.clear()  # half a pass is no use
            raise

    @contextmanager
    def replaying(self):
        """The recorded pass again, on dual numbers and without grad mode.

        Raises RuntimeError where the body does not do what was recorded, and UnrecordedRandomness where it drew random
        numbers: then restore the generators to before the recorded pass and take a plain forward-mode pass.
        """
        if not self._entries:
            raise RuntimeError("Nothing is recorded: run the student's forward in `recording()` before `replaying()`.")
        if torch.is_grad_enabled():
            raise RuntimeError("What a tape lends carries no graph: replay under torch.no_grad().")
        before = self._generators()
        player = _Player(self._entries)
        failure = None
        try:
            with torch.enable_grad(), player:
                yield
        except RuntimeError as e:  # perhaps because other numbers were drawn than in the recorded pass (LayerDrop, say)
            failure = e
        if any(not torch.equal(a, b) for a, b in zip(before, self._generators(), strict=True)):
            raise UnrecordedRandomness(
                "The student's forward drew random numbers that the tape does not record. It knows F.dropout, and the "
                "dropout of scaled_dot_product_attention in its math kernel, without is_causal and enable_gqa."
            ) from failure
        if failure is not None:
            raise failure
        if player.position != len(self._entries):
            raise _not_a_sequence(player.position, self._entries[player.position].call, "the end")

    def clear(self) -> None:
        """Drop what is held."""
        self._entries.clear()

    def _generators(self) -> list[Tensor]:
        """States of the default generators of the CPU and of every GPU in use; host memory, so nothing waits."""
        states = [torch.get_rng_state()]
        # Not during a capture, which forbids the question; its warm-up steps run the same code and have asked it
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            devices = {entry.output.device.index for entry in self._entries if entry.output.is_cuda}
            states += [torch.cuda.get_rng_state(d) for d in sorted(devices | {torch.cuda.current_device()})]
        return states


class _Recorder(TorchFunctionMode):
    def __init__(self, entries: list[Entry]):
        super().__init__()
        self.entries = entries

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = NAMES.get(func)
        if name is None or not _known(name, args, kwargs):
            return func(*args, **kwargs)
        held = {}
        if name == "dropout":
            output, held = rules.record_dropout(*args, **kwargs)
        elif name == "attention":
            if rules.runs_math(*args, **kwargs):
                output, held = rules.math_attention(*args, **kwargs)
            elif rules.dropout_p(*args, **kwargs) > 0:
                return func(*args, **kwargs)  # a fused kernel does not tell its masks
            else:
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        y = held["mask"] if name == "dropout" else output.detach()  # which shares the version counter
        self.entries.append(Entry(_call(name, args, kwargs, output), y, y._version, **held))
        return output


class _Player(DualPass):
    def __init__(self, entries: list[Entry]):
        super().__init__(reverse=False)
        self.entries, self.position = entries, 0

    def call(self, func, args: tuple, kwargs: dict):
        if func is F.gelu:
            return rules.gelu(*args, **kwargs)
        if func in ARITHMETIC and not kwargs and all(isinstance(a, Tensor | float | int) for a in args):
            return rules.arithmetic(func, *args)
        name = NAMES.get(func)
        if name is None or not _known(name, args, kwargs):
            return func(*args, **kwargs)
        entry = self.entries[self.position] if self.position < len(self.entries) else None
        if name == "attention" and (entry is None or entry.call[0] != name):
            return func(*args, **kwargs)  # it was not recorded
        now = name if entry is None else _call(name, args, kwargs, entry.output)
        if entry is None or now != entry.call:
            raise _not_a_sequence(self.position, entry and entry.call, now)
        self.position += 1
        if name in DRAWING:
            return DRAWING[name](entry, *args, **kwargs)
        if not entry.intact():  # by an operation in place, which will come again
            return func(*args, **kwargs)
        return rules.dual(entry.output, TANGENTS[name](entry.output, *args, **kwargs))


def _call(name: str, args: tuple, kwargs: dict, output: Tensor) -> tuple:
    """What has to be the same in recording and replay."""
    x = args[0] if args else kwargs["query" if name == "attention" else "input"]
    weight = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("weight", kwargs.get("key"))
    return name, tuple(x.shape), x.dtype, None if weight is None else tuple(weight.shape), tuple(output.shape)


def _known(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a rule is for this call; depends only on what recording and replay have in common."""
    if name == "dropout":
        return rules.drops(*args, **kwargs)
    if name == "attention":
        return rules.bidirectional(*args, **kwargs)
    if name == "linear" and (args[1] if len(args) > 1 else kwargs["weight"]).ndim != 2:
        return False
    if name == "softmax" and not isinstance(args[1] if len(args) > 1 else kwargs.get("dim"), int):
        return False  # a dim that torch guesses, or a named one
    return "out" not in kwargs


def _not_a_sequence(position: int, recorded: object, now: object) -> RuntimeError:
    return RuntimeError(
        "The student's forward is not a fixed sequence of operations, so a tape cannot follow it: operation "
        f"{position} was {recorded or 'none'} and is now {now}. Run the same model, mode and batch in both passes."
    )
