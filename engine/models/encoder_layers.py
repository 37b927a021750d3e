"""The layers of a model, and those of known families with less work and memory than transformers takes for the same.

**The last layer on the first token**, which is all that these classifiers read of it. Queries, the output projection and
the feed-forward network are needed of one token. Keys and values of every token are not needed either: with one query a
head, both projections can be moved behind the sums over tokens,

    <q, W_k h_l + b_k> = <W_k^T q, h_l> + <q, b_k>          sum_l a_l (W_v h_l + b_v) = W_v sum_l a_l h_l + b_v sum_l a_l

so that the layer costs next to nothing beside the others. Dropout draws masks for one token instead of L.

**The feed-forward network without its inner activation.** y = W gelu(h) + b keeps h for the backward pass, not gelu(h):

    dh = gelu'(h) (dy W),   dW = dy^T gelu(h) with gelu(h) computed again,   db = sum dy

a quarter of what a layer keeps, for one elementwise pass. First derivatives only.

**Sums over all tokens in float32.** On a CPU torch adds the gradients of bf16 layer norms and embeddings up in bf16: at
2,048 tokens a fifth of the token types' gradient is lost, and 8 to 19 % of a norm's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from engine.models.families import family


def encoder_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a model, in their order, each object once; those of a decoder behind the encoder's.

    Where no record of its family says where they stand: with a configuration that counts them (transformers) each nn.ModuleList
    of that length, else the longest nn.ModuleList, or where there is none the children of the longest nn.Sequential. Raises
    ValueError where that is nothing.
    """
    depth = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    lists = [layers for _, _, layers in stacks(module)]
    if not lists and depth is None:
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
        lists = lists or [m for m in module.modules() if isinstance(m, nn.Sequential)]
        lists = [max(lists, key=len, default=())]  # the first of equally long ones
    layers = list(dict.fromkeys(layer for each in lists for layer in _flat(each)))
    if not layers:
        wanted = "nn.ModuleList or nn.Sequential" if depth is None else f"nn.ModuleList of {depth} layers"
        raise ValueError(f"The layers of a {type(module).__name__} are not known: it has no {wanted}.")
    return layers


def stacks(module: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    """(parent, name, list) of each nn.ModuleList that a model of transformers has its layers in; none for any other module."""
    depth = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if depth is None:
        return []
    if paths := family(module).layers:
        places = [path.rpartition(".") for path in paths]
        return [
            (parent := module.base_model.get_submodule(where), name, getattr(parent, name)) for where, _, name in places
        ]
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    inside = {m for *_, layers in found for layer in layers for m in layer.modules()}
    return [each for each in found if each[2] not in inside]


def _flat(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The layers of a list that may have lists in it."""
    return [each for layer in layers for each in (_flat(layer) if isinstance(layer, nn.ModuleList) else [layer])]


@contextmanager
def lean_layers(
    module: nn.Module, kind: str | None, higher: bool, compiled: Callable | None = None, whole: bool = False
):
    """For the body, the last layer gives [B, 1, H] unless it is wanted `whole`, and where no `higher` derivatives are taken,
    networks keep less.

    Layers before the last are `compiled(layer, hidden, mask)` where it is given; it may take first derivatives only.
    Raises ValueError where a layer that it is for has another forward already (activation checkpointing).
    """
    if kind is None:
        yield
        return
    layers = encoder_layers(module)
    last = _bert if kind == "bert" else _distilbert
    with ExitStack() as stack:
        if not whole:
            stack.enter_context(_set(layers[-1], "forward", _on_hidden(last, layers[-1])))
        if compiled is not None:
            # the compiler itself keeps h and not gelu(h)
            layers, rest = layers[-1:], layers[:-1]
            if any("forward" in layer.__dict__ for layer in rest):
                raise ValueError("compiled layers do not go with activation checkpointing, which runs layers in its own way; "
                                 "leave one of the two out.")  # fmt: skip
            for layer in rest:
                stack.enter_context(_set(layer, "forward", _on_hidden(compiled, layer)))
        if not higher and torch.is_grad_enabled():
            for each in (each for part in (module.base_model.embeddings, *layers) for each in part.modules()):
                if type(each) is nn.Embedding and each.max_norm is None and not each.scale_grad_by_freq:
                    stack.enter_context(_set(each, "forward", _bound(_embed, each)))
                if type(each) is nn.LayerNorm and each.weight is not None and each.bias is not None:
                    stack.enter_context(_set(each, "forward", _bound(_norm, each)))
            for layer in layers:
                if kind == "bert" and _is_gelu(layer.intermediate.intermediate_act_fn, layer.output.dense):
                    stack.enter_context(_set(layer, "feed_forward_chunk", _bound(_bert_network, layer)))
                if kind == "distilbert" and _is_gelu(layer.ffn.activation, layer.ffn.lin2):
                    stack.enter_context(_set(layer.ffn, "ff_chunk", _bound(_distilbert_network, layer.ffn)))
        yield


@contextmanager
def _set(module: nn.Module, name: str, function: Callable):
    """A method of this one module for the body, and then what stood there."""
    before = module.__dict__.get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def _on_hidden(function: Callable, layer: nn.Module) -> Callable:
    return lambda hidden_states, attention_mask=None, *args, **kwargs: function(layer, hidden_states, attention_mask)


def _bound(function: Callable, module: nn.Module) -> Callable:
    return lambda x: function(module, x)


def _is_gelu(activation: nn.Module, projection: nn.Module) -> bool:
    """The exact one, before a plain projection (an adapter's layer is more than its weight)."""
    exact = type(activation).__name__ == "GELUActivation" and getattr(activation, "act", None) is F.gelu
    exact = exact or (type(activation) is nn.GELU and activation.approximate == "none")
    return exact and type(projection) is nn.Linear


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [..., F], [H, F], [H]
        ctx.save_for_backward(h, weight)
        ctx.biased = bias is not None
        return F.linear(F.gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        h, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dh = dw = db = None
        if ctx.needs_input_grad[1]:
            dw = rows.t() @ F.gelu(h).reshape(-1, h.shape[-1])
        if ctx.needs_input_grad[0]:
            dh = torch.ops.aten.gelu_backward(dy @ weight, h)
        if ctx.biased and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dh, dw, db


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, padding: int) -> Tensor:  # [V, H], [...] -> [..., H]
        ctx.save_for_backward(ids)
        ctx.rows, ctx.padding = len(weight), padding
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (ids,) = ctx.saved_tensors
        dw = torch.ops.aten.embedding_dense_backward(dy.float(), ids, ctx.rows, ctx.padding, False)
        return dw.to(dy.dtype), None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # [..., H], [H], [H] -> [..., H]
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, bias = (t.float() for t in ctx.saved_tensors)
        shape, wanted = weight.shape, list(ctx.needs_input_grad[:3])
        _, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, ctx.eps)
        found = torch.ops.aten.native_layer_norm_backward(dy.float(), x, shape, mean, rstd, weight, bias, wanted)
        return *(None if g is None else g.to(dy.dtype) for g in found), None


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    if _exact(norm.weight):
        return type(norm).forward(norm, x)
    return _Norm.apply(x, norm.weight, norm.bias, norm.eps)


def _exact(weight: Tensor) -> bool:
    """Whether torch's own gradient of this weight is summed in float32 or better."""
    return weight.dtype != torch.bfloat16 or weight.is_cuda


def _embed(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    if _exact(embedding.weight):
        return type(embedding).forward(embedding, ids)
    return _Embed.apply(embedding.weight, ids, -1 if embedding.padding_idx is None else embedding.padding_idx)


def _gelu_linear(h: Tensor, projection: nn.Linear) -> Tensor:
    return _GeluLinear.apply(h, projection.weight, projection.bias)


def _bert_network(layer: nn.Module, x: Tensor) -> Tensor:
    output = layer.output
    return output.LayerNorm(output.dropout(_gelu_linear(layer.intermediate.dense(x), output.dense)) + x)


def _distilbert_network(ffn: nn.Module, x: Tensor) -> Tensor:
    return ffn.dropout(_gelu_linear(ffn.lin1(x), ffn.lin2))


def _bert(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    attention, first = layer.attention.self, hidden[:, :1]
    p = attention.dropout.p if attention.training else 0.0
    context = _attend(
        attention.query(first), attention.key, attention.value, hidden, mask, attention.num_attention_heads,
        attention.scaling, p,
    )  # fmt: skip
    return layer.feed_forward_chunk(layer.attention.output(context, first))


def _distilbert(layer: nn.Module, hidden: Tensor, mask: Tensor | None) -> Tensor:
    attention, first = layer.attention, hidden[:, :1]
    p = attention.dropout.p if attention.training else 0.0
    context = _attend(
        attention.q_lin(first), attention.k_lin, attention.v_lin, hidden, mask, attention.n_heads, attention.scaling, p
    )
    attended = layer.sa_layer_norm(attention.out_lin(context) + first)
    return layer.output_layer_norm(layer.ffn.ff_chunk(attended) + attended)


def _attend(
    query: Tensor, key: nn.Module, value: nn.Module, hidden: Tensor, mask: Tensor | None, heads: int, scaling: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """Query [B, 1, H] and hidden [B, L, H] -> [B, 1, H]; `mask` is bool or additive, [B, 1, 1 or L, L]."""
    q = query.squeeze(1).unflatten(-1, (heads, -1)) * scaling  # [B, heads, d]
    folds = type(key) is nn.Linear and type(value) is nn.Linear  # an adapter's layer is more than its weight
    if folds:
        keys = key.weight.unflatten(0, (heads, -1))  # [heads, d, H]
        scores = torch.matmul(torch.matmul(q.transpose(0, 1), keys).transpose(0, 1), hidden.transpose(1, 2))
        if key.bias is not None:
            scores = scores + (q * key.bias.unflatten(0, (heads, -1))).sum(-1, keepdim=True)
    else:
        keys = key(hidden).unflatten(-1, (heads, -1)).permute(0, 2, 3, 1)  # [B, heads, d, L]
        scores = torch.matmul(q.unsqueeze(2), keys).squeeze(2)
    if mask is not None:
        row = mask[:, :, 0]  # [B, 1, L]
        if row.dtype == torch.bool:
            row = torch.zeros_like(row, dtype=scores.dtype).masked_fill(~row, torch.finfo(scores.dtype).min)
        scores = scores + row
    weights = F.dropout(F.softmax(scores, -1), dropout, dropout > 0)  # [B, heads, L]
    if folds:
        values = value.weight.unflatten(0, (heads, -1)).transpose(1, 2)  # [heads, H, d]
        context = torch.matmul(torch.matmul(weights, hidden).transpose(0, 1), values).transpose(0, 1)
        if value.bias is not None:
            context = context + weights.sum(-1, keepdim=True) * value.bias.unflatten(0, (heads, -1))
    else:
        values = value(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B, heads, L, d]
        context = torch.matmul(weights.unsqueeze(2), values).squeeze(2)
    return context.flatten(1).unsqueeze(1)
