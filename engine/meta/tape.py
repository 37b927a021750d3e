"""A tape of a forward pass, so that the derivative along v of the same pass, y_t = J v, recomputes next to nothing.

With x_t, W_t, b_t the tangents that exist, and outputs y, dropout masks m and probabilities A as the tape holds them:

    linear        y_t = x_t W^T + x W_t^T + b_t                  two matrix products where forward mode does three
    convolution   y_t = x_t * W + x * W_t + b_t
    matmul        y_t = a_t b + a b_t
    dropout       y_t = x_t m / (1 - p)                          draws nothing
    softmax       y_t = y (x_t - <y, x_t>)                       a symmetric Jacobian: the kernel of its backward
    gelu          y_t = gelu'(x) x_t                             likewise
    layer_norm    y_t = w J x_t + x^ w_t + b_t                   J = d x^ / d x, symmetric; x^ w_t + b_t is a layer_norm
    attention     S_t = s (q_t k^T + q k_t^T), A_t = A (S_t - <A, S_t>), y_t = D_t v + D v_t with D = A m / (1 - p)
                  Math attention is recorded with A and m, its dropout included; after a fused kernel, which has no
                  forward mode of its own, A is recomputed, and then there must be no dropout.
    a + b, a b    y_t = a_t + b_t, a_t b + a b_t                 y is recomputed, which costs less than holding it

Every other operation goes through torch's forward mode as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode


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
        self._entries: list[_Entry] = []

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
            with player:
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


class _Entry(NamedTuple):
    call: tuple  # name, shape and dtype of the input, shape of the output
    output: Tensor  # of a dropout its mask alone
    version: int  # of `output` when it was recorded: a later one means that something was written over it
    mask: Tensor | None = None  # bool, of a dropout
    probabilities: Tensor | None = None  # [B, heads, L, L], of math attention before its dropout
    dropped: Tensor | None = None  # the same after it

    def intact(self) -> bool:
        return self.output._version == self.version


class _Recorder(TorchFunctionMode):
    def __init__(self, entries: list[_Entry]):
        super().__init__()
        self.entries = entries

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _NAMES.get(func)
        if name is None or not _known(name, args, kwargs):
            return func(*args, **kwargs)
        held = {}
        if name == "dropout":
            output, held = _record_dropout(*args, **kwargs)
        elif name == "attention":
            if _runs_math(*args, **kwargs):
                output, held = _math_attention(*args, **kwargs)
            elif _dropout_p(*args, **kwargs) > 0:
                return func(*args, **kwargs)  # a fused kernel does not tell its masks
            else:
                output = func(*args, **kwargs)
        else:
            output = func(*args, **kwargs)
        y = held["mask"] if name == "dropout" else output.detach()  # which shares the version counter
        self.entries.append(_Entry(_call(name, args, kwargs, output), y, y._version, **held))
        return output


class _Player(TorchFunctionMode):
    def __init__(self, entries: list[_Entry]):
        super().__init__()
        self.entries, self.position = entries, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.gelu:
            return _gelu(*args, **kwargs)
        if func in _ARITHMETIC and not kwargs and all(isinstance(a, Tensor | float | int) for a in args):
            return _arithmetic(func, *args)
        name = _NAMES.get(func)
        if name is None or not _known(name, args, kwargs):
            return func(*args, **kwargs)
        entry = self.entries[self.position] if self.position < len(self.entries) else None
        if name == "attention" and (entry is None or entry.call[0] != name):
            return func(*args, **kwargs)  # it was not recorded
        now = name if entry is None else _call(name, args, kwargs, entry.output)
        if entry is None or now != entry.call:
            raise _not_a_sequence(self.position, entry and entry.call, now)
        self.position += 1
        if name in _DRAWING:
            return _DRAWING[name](entry, *args, **kwargs)
        if not entry.intact():  # by an operation in place, which will come again
            return func(*args, **kwargs)
        return _dual(entry.output, _TANGENTS[name](entry.output, *args, **kwargs))


def _call(name: str, args: tuple, kwargs: dict, output: Tensor) -> tuple:
    """What has to be the same in recording and replay."""
    x = args[0] if args else kwargs["query" if name == "attention" else "input"]
    weight = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else kwargs.get("weight", kwargs.get("key"))
    return name, tuple(x.shape), x.dtype, None if weight is None else tuple(weight.shape), tuple(output.shape)


def _known(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a rule is for this call; depends only on what recording and replay have in common."""
    if name == "dropout":
        return _drops(*args, **kwargs)
    if name == "attention":
        return _bidirectional(*args, **kwargs)
    if name == "softmax" and not isinstance(args[1] if len(args) > 1 else kwargs.get("dim"), int):
        return False  # a dim that torch guesses, or a named one
    return "out" not in kwargs


def _not_a_sequence(position: int, recorded: object, now: object) -> RuntimeError:
    return RuntimeError(
        "The student's forward is not a fixed sequence of operations, so a tape cannot follow it: operation "
        f"{position} was {recorded or 'none'} and is now {now}. Run the same model, mode and batch in both passes."
    )


def _unpack(t: Tensor | float | None) -> tuple:
    """Primal and tangent, None for what there is not."""
    return tuple(forward_ad.unpack_dual(t)) if isinstance(t, Tensor) else (t, None)


def _dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    return primal if tangent is None else forward_ad.make_dual(primal, tangent)


def _products(dtype: torch.dtype, *pairs: tuple[Tensor | None, Tensor | None], scale: float = 1.0) -> Tensor | None:
    """scale * sum of left @ right over the pairs that exist, in one buffer where the batch dimensions agree."""
    total = None
    for left, right in pairs:
        if left is None or right is None:
            continue
        left, right = left.to(dtype), right.to(dtype)
        if left.ndim < 3 or left.shape[:-2] != right.shape[:-2]:
            part = torch.matmul(left, right)
            part = part if scale == 1 else part.mul_(scale)
            total = part if total is None else total.add_(part)
            continue
        shape = (*left.shape[:-1], right.shape[-1])
        left, right = left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:])
        if total is None:
            total = left.new_empty(shape)
            total.view(-1, *shape[-2:]).baddbmm_(left, right, beta=0, alpha=scale)
        else:
            total.view(-1, *shape[-2:]).baddbmm_(left, right, alpha=scale)
    return total


# Each rule below takes the recorded output and the arguments of its function, and gives the output's tangent, or None.
# Everything is cast to the output's dtype, as the function itself casts under autocast.


def _linear(y: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    (x, x_t), (w, w_t), (_, b_t) = _unpack(input), _unpack(weight), _unpack(bias)
    tangent = None  # [rows, out]
    for left, right in ((x_t, w), (x, w_t)):  # [..., in], [out, in]
        if left is None or right is None:
            continue
        left, right = left.to(y.dtype).reshape(-1, left.shape[-1]), right.to(y.dtype).t()
        if tangent is not None:
            tangent.addmm_(left, right)
        elif b_t is not None:
            tangent = torch.addmm(b_t.to(y.dtype), left, right)
        else:
            tangent = torch.mm(left, right)
    if tangent is None:
        return None if b_t is None else b_t.to(y.dtype).expand(y.shape)
    return tangent.view(y.shape)


def _convolution(function: Callable) -> Callable:
    def rule(y: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args, **kwargs) -> Tensor | None:
        (x, x_t), (w, w_t), (_, b_t) = _unpack(input), _unpack(weight), _unpack(bias)
        b_t = None if b_t is None else b_t.to(y.dtype)
        tangent = None
        for left, right in ((x_t, w), (x, w_t)):
            if left is None or right is None:
                continue
            part = function(left.to(y.dtype), right.to(y.dtype), b_t if tangent is None else None, *args, **kwargs)
            tangent = part if tangent is None else tangent.add_(part)
        if tangent is None and b_t is not None:
            return b_t.view(-1, *[1] * (weight.ndim - 2)).expand(y.shape)
        return tangent

    return rule


def _softmax(y: Tensor, input: Tensor, dim: int, *_, **__) -> Tensor | None:
    x_t = _unpack(input)[1]
    return None if x_t is None else torch._softmax_backward_data(x_t.to(y.dtype), y, dim, y.dtype)


def _gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Holds nothing: a feed-forward network that does not keep its inner activation would keep it here."""
    x, x_t = _unpack(input)
    y = F.gelu(x, approximate=approximate)
    return _dual(y, None if x_t is None else torch.ops.aten.gelu_backward(x_t, x, approximate=approximate))


def _layer_norm(
    y: Tensor, input: Tensor, normalized_shape, weight: Tensor | None = None, bias: Tensor | None = None, eps=1e-5
) -> Tensor | None:
    (x, x_t), (w, w_t), (_, b_t) = _unpack(input), _unpack(weight), _unpack(bias)
    if x_t is None and w_t is None and b_t is None:
        return None
    x = x.to(y.dtype)
    if w is not None:
        w_t = torch.zeros_like(w, dtype=y.dtype) if w_t is None else w_t.to(y.dtype)
        b_t = None if b_t is None else b_t.to(y.dtype)
    tangent, mean, rstd = torch.native_layer_norm(x, normalized_shape, w_t, b_t, eps)  # x^ w_t + b_t
    if x_t is None:
        return tangent
    along = torch.ops.aten.native_layer_norm_backward(
        x_t.to(y.dtype), x, normalized_shape, mean, rstd, None, None, [True, False, False]
    )[0]  # J x_t
    return along if w is None else tangent.addcmul_(along, w.to(y.dtype))


# Operations that draw: recorders give the output and what to hold, players the output as a dual number.


def _drops(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and 0 < p < 1 and input.numel() > 0  # where F.dropout draws; native_dropout does at 0 and 1 as well


def _record_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    """The values and draws of F.dropout; the graph gets a bool mask, where on the CPU that keeps a floating-point one."""
    output, mask = torch.native_dropout(input, p, True)
    return (input.copy_(output) if inplace else output), {"mask": mask}


def _replay_dropout(entry: _Entry, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    x, x_t = _unpack(input)
    y = _dual(_masked(x, entry.mask, p), None if x_t is None else _masked(x_t, entry.mask, p))
    return input.copy_(y) if inplace else y


BLOCK = 1 << 18  # elements: what is cast for one block, 1 MB in float32, stays in the cache


def _masked(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """x * mask / (1 - p)."""
    if x.is_cuda or not x.is_contiguous() or not mask.is_contiguous():
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))
    # On the CPU that takes three passes and a floating-point copy of the mask. In blocks, and with the bool's bytes read
    # as int8, whose cast is vectorised: 2.3 ms instead of 30 to 48 on [32, 12, 128, 128] float32 (one core, AVX-512)
    y = torch.empty_like(x)
    for out, t, kept in zip(*(z.view(-1).split(BLOCK) for z in (y, x, mask.view(torch.int8))), strict=True):
        torch.mul(t, kept, out=out).mul_(1 / (1 - p))
    return y


def _bidirectional(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> bool:
    learned_mask = attn_mask is not None and (attn_mask.requires_grad or _unpack(attn_mask)[1] is not None)
    return not (is_causal or enable_gqa or learned_mask or query.numel() == 0 or dropout_p >= 1)


def _dropout_p(query, key, value, attn_mask=None, dropout_p=0.0, *_, **__) -> float:
    return dropout_p


def _runs_math(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> bool:
    choice = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return choice == SDPBackend.MATH.value


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _math_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The operations of torch's math kernel one by one, hence its bits and its draws."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:
        low = torch.get_autocast_dtype(kind)
        query, key, value = query.to(low), key.to(low), value.to(low)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(low)
    dtype, scale = query.dtype, query.shape[-1] ** -0.5 if scale is None else scale
    if dtype in (torch.float16, torch.bfloat16) and not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = query.float(), key.float(), value.float()
    root = abs(scale) ** 0.5
    with torch.autocast(kind, enabled=False):
        scores = torch.matmul(query * (root if scale >= 0 else -root), key.transpose(-2, -1) * root)
        if attn_mask is not None:
            scores.add_(_additive(attn_mask, dtype))
        probabilities = dropped = torch._safe_softmax(scores, -1)  # [B, heads, L, L]
        mask = None
        if dropout_p > 0:
            dropped, mask = torch.native_dropout(probabilities, dropout_p, True)
        output = torch.matmul(dropped, value).to(dtype)
    return output, {"mask": mask, "probabilities": probabilities.detach(), "dropped": dropped.detach()}


def _replay_attention(
    entry: _Entry, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    (q, q_t), (k, k_t), (v, v_t) = _unpack(query), _unpack(key), _unpack(value)
    dtype, scale = entry.output.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    k, k_t = k.transpose(-2, -1), None if k_t is None else k_t.transpose(-2, -1)
    if entry.probabilities is None:
        scores = _products(dtype, (q, k), scale=scale)
        mask = _additive(attn_mask, dtype)
        probabilities = dropped = torch._safe_softmax(scores if mask is None else scores.add_(mask), -1)
    else:
        probabilities, dropped = entry.probabilities.to(dtype), entry.dropped.to(dtype)
    tangent = _products(dtype, (q_t, k), (q, k_t), scale=scale)
    if tangent is not None:
        tangent = torch._softmax_backward_data(tangent, probabilities, -1, dtype)
        if entry.mask is not None:
            tangent = _masked(tangent, entry.mask, dropout_p)
    output = entry.output if entry.intact() else torch.matmul(dropped, v.to(dtype))
    return _dual(output, _products(dtype, (tangent, v), (dropped, v_t)))


def _arithmetic(function: Callable, a: Tensor | float, b: Tensor | float) -> Tensor:
    """a + b, a * b or a @ b, which hold nothing: a recorded product of batches (attention scores) would be as big as the
    probabilities made of it. Torch's forward mode takes eight passes for a product with a number, five for a sum."""
    (a, a_t), (b, b_t) = _unpack(a), _unpack(b)
    y = function(a, b)
    if a_t is None and b_t is None:
        return y
    if _ARITHMETIC[function] == "matmul":
        tangent = _products(y.dtype, (a_t, b), (a, b_t))
    elif _ARITHMETIC[function] == "mul":
        one = None if a_t is None else torch.mul(a_t, b)
        two = None if b_t is None else torch.mul(a, b_t)
        tangent = one.add_(two) if a_t is not None and b_t is not None else two if one is None else one
    elif a_t is not None and b_t is not None:
        tangent = torch.add(a_t, b_t)
    else:
        # A copy: an operation in place on y would otherwise reach the operand's tangent too
        tangent = torch.empty_like(y).copy_(b_t if a_t is None else a_t)
    return forward_ad.make_dual(y, tangent.to(y.dtype))


_TANGENTS = {
    "linear": _linear,
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
}
_DRAWING = {"dropout": _replay_dropout, "attention": _replay_attention}
_NAMES = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax"),
    F.layer_norm: "layer_norm",
    F.dropout: "dropout",
    F.scaled_dot_product_attention: "attention",
}
_ARITHMETIC = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), "add"),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), "mul"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), "matmul"),
}
