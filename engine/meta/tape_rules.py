"""What a tape (engine.meta.tape) holds of each operation, and the rule that gives the operation's tangent y_t from it.

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
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


class Entry(NamedTuple):
    call: tuple  # name, shape and dtype of the input, shape of the output
    output: Tensor  # of a dropout its mask alone
    version: int  # of `output` when it was recorded: a later one means that something was written over it
    mask: Tensor | None = None  # bool, of a dropout
    probabilities: Tensor | None = None  # [B, heads, L, L], of math attention before its dropout
    dropped: Tensor | None = None  # the same after it

    def intact(self) -> bool:
        return self.output._version == self.version


def _unpack(t: Tensor | float | None) -> tuple:
    """Primal and tangent; None for one that does not exist."""
    return tuple(forward_ad.unpack_dual(t)) if isinstance(t, Tensor) else (t, None)


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
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


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Holds nothing: a feed-forward network that does not keep its inner activation would keep it here."""
    x, x_t = _unpack(input)
    y = F.gelu(x, approximate=approximate)
    return dual(y, None if x_t is None else torch.ops.aten.gelu_backward(x_t, x, approximate=approximate))


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


def drops(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
    return training and 0 < p < 1 and input.numel() > 0  # where F.dropout draws; native_dropout does at 0 and 1 as well


def record_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    """The values and draws of F.dropout; the graph gets a bool mask, where on the CPU that keeps a floating-point one."""
    output, mask = torch.native_dropout(input, p, True)
    return (input.copy_(output) if inplace else output), {"mask": mask}


def _replay_dropout(entry: Entry, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    x, x_t = _unpack(input)
    y = dual(_masked(x, entry.mask, p), None if x_t is None else _masked(x_t, entry.mask, p))
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


def bidirectional(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> bool:
    learned_mask = attn_mask is not None and (attn_mask.requires_grad or _unpack(attn_mask)[1] is not None)
    return not (is_causal or enable_gqa or learned_mask or query.numel() == 0 or dropout_p >= 1)


def dropout_p(query, key, value, attn_mask=None, dropout_p=0.0, *_, **__) -> float:
    return dropout_p


def runs_math(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> bool:
    choice = torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return choice == SDPBackend.MATH.value


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def math_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
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
    entry: Entry, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
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
    return dual(output, _products(dtype, (tangent, v), (dropped, v_t)))


def arithmetic(function: Callable, a: Tensor | float, b: Tensor | float) -> Tensor:
    """a + b, a * b or a @ b, which hold nothing: a recorded product of batches (attention scores) would be as big as the
    probabilities made of it. Torch's forward mode takes eight passes for a product with a number, five for a sum."""
    (a, a_t), (b, b_t) = _unpack(a), _unpack(b)
    y = function(a, b)
    if a_t is None and b_t is None:
        return y
    if ARITHMETIC[function] == "matmul":
        tangent = _products(y.dtype, (a_t, b), (a, b_t))
    elif ARITHMETIC[function] == "mul":
        one = None if a_t is None else torch.mul(a_t, b)
        two = None if b_t is None else torch.mul(a, b_t)
        tangent = one.add_(two) if a_t is not None and b_t is not None else two if one is None else one
    elif a_t is not None and b_t is not None:
        tangent = torch.add(a_t, b_t)
    else:
        # A copy: an operation in place on y would otherwise reach the operand's tangent too
        tangent = torch.empty_like(y).copy_(b_t if a_t is None else a_t)
    return forward_ad.make_dual(y, tangent.to(y.dtype))


TANGENTS = {
    "linear": _linear,
    "conv1d": _convolution(F.conv1d),
    "conv2d": _convolution(F.conv2d),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
}
DRAWING = {"dropout": _replay_dropout, "attention": _replay_attention}
NAMES = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax"),
    F.layer_norm: "layer_norm",
    F.dropout: "dropout",
    F.scaled_dot_product_attention: "attention",
}
ARITHMETIC = {
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), "add"),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), "mul"),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), "matmul"),
}
