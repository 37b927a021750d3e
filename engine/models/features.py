"""What a classifier of transformers gives beside its logits, for losses that compare a student's inside with its teacher's.

`InnerStates` says which states are wanted and reads them off a forward; what a loss compares comes ready to be subtracted:

    token      [B, n, H]            hidden states of the token whose last state the classifier reads: the first one, or in a
                                    causal model the last real one              (Patient KD, Sun et al. 2019)
    hidden     [B, n, L, H]         hidden states of every token                (TinyBERT, Jiao et al. 2020)
    attention  [B, n, heads, L, L]  attention scores before the softmax         (TinyBERT)
    domain     [B, H]               the mean state of an example in its domain  (Meta-KD, Pan et al. 2021)

n are the matched layers. `hidden` and `attention` have zeros where a token is padding, and are divided by the square root of
how many numbers of an example are not, so that a sum of squared differences is the mean squared difference over real tokens.

Layers of a module that is only there for such a loss (a projection to the teacher's width, a domain classifier) hang on the
model as `extras` while it lasts: they are trained, saved and restored with it, and `detach` takes them off again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from engine.errors import UserError
from engine.models.families import state_read

EXTRAS = "extras"
SCORES = "metadistil_scores"  # the attention of transformers that also tells its scores


@dataclass(frozen=True)
class InnerStates:
    """Hidden states are counted from 0, the embedding's output; layers of attention from 0, the first layer.

    `domain` is "feature" where the state that domains are compared by is wanted, "logits" for the domain classifier's.
    """

    token: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    domain: Literal["", "feature", "logits"] = ""

    def __bool__(self) -> bool:
        return bool(self.token or self.hidden or self.attention or self.domain)

    @property
    def whole(self) -> bool:
        """Whether the last layer is needed of every token."""
        return bool(self.hidden or self.attention or self.domain)

    def read(
        self, module: nn.Module, forward: Callable, inputs: dict[str, Any], mask: Tensor, domains: Tensor | None
    ) -> dict[str, Tensor]:
        """`forward(**inputs)` and what is wanted of it, by the names of `engine.models.network.Outputs`, as they come (bf16 too).

        mask [B, L] is 1 where a token is real, domains [B] are the numbers of the examples' domains.
        """
        with recording(self.attention) if self.attention else nullcontext([]) as scores:
            out = forward(**inputs, output_hidden_states=True)
        states, extras, found = out.hidden_states, getattr(module, EXTRAS, {}), {"logits": out.logits}
        project = extras["hidden"] if "hidden" in extras else nn.Identity()
        if self.token:
            place = _place_read(module, inputs["input_ids"])
            found["features"] = project(torch.stack([states[i][place] for i in self.token], 1))
        if self.hidden:
            found["features"] = over_real(project(torch.stack([states[i] for i in self.hidden], 1)), mask)
        if self.attention:
            found["attention"] = over_real_pairs(torch.stack(scores, 1), mask)
        if self.domain:
            h = mean_state(states[-1], mask)
            found["domain"] = getattr(extras["domain"], self.domain)(h, domains) if "domain" in extras else h
        return found


def _place_read(module: nn.Module, ids: Tensor) -> tuple:
    """The index of the token, in ids [B, L], that the classifier reads."""
    if state_read(module) != "last":
        return slice(None), 0
    positions = torch.arange(ids.shape[1], device=ids.device)
    last = (positions * (ids != module.config.get_text_config().pad_token_id)).argmax(1)
    return torch.arange(len(ids), device=ids.device), last


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """The mean [B, H] of states [B, L, H] over the real tokens, mask [B, L]."""
    mask = mask.to(states.dtype)
    return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)


def over_real(states: Tensor, mask: Tensor) -> Tensor:
    """[B, n, L, H] whose squares sum to their mean over real tokens and H, in each layer."""
    real = mask.to(states.dtype)
    scale = real / (real.sum(1, keepdim=True) * states.shape[-1]).sqrt()  # [B, L]
    return states * scale[:, None, :, None]


def over_real_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """[B, n, heads, L, L] whose squares sum to their mean over heads and pairs of real tokens, in each layer."""
    real = mask.to(scores.dtype)
    scale = real / real.sum(1, keepdim=True)
    pairs = scale[:, :, None] * real[:, None, :] / scores.shape[2] ** 0.5  # [B, L, L]
    return scores * pairs[:, None, None]


# Attention scores

_wanted: dict[int, int] = {}  # number of the layer -> its place in `_found`
_found: list[Tensor] | None = None
_layer = 0


@contextmanager
def recording(layers: Sequence[int]):
    """The scores [B, heads, L, L] of these layers in the forward of the body, one model with SCORES for its attention."""
    global _wanted, _found, _layer
    before = _wanted, _found, _layer
    _wanted, _found, _layer = {n: i for i, n in enumerate(layers)}, [], 0
    try:
        yield _found
    finally:
        _wanted, _found, _layer = before


def _attention_with_scores(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **kwargs,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Plain attention of query, key, value [B, heads, L, d], operation for operation that of transformers."""
    global _layer
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if _found is not None:
        if _layer in _wanted:
            assert len(_found) == _wanted[_layer], "layers are wanted in their order"
            _found.append(scores)
        _layer += 1
    weights = F.softmax(scores if attention_mask is None else scores + attention_mask, dim=-1)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(SCORES, _attention_with_scores)


# Layers that a loss brings with it


def attach(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Hang a trainable layer on a model."""
    if not hasattr(module, EXTRAS):
        module.add_module(EXTRAS, nn.ModuleDict())
    getattr(module, EXTRAS)[name] = layer


def detach(module: nn.Module) -> None:
    """Take all of them off; the weights of the model stay what and where they are."""
    if hasattr(module, EXTRAS):
        delattr(module, EXTRAS)


def projection(width: int, to: int, seed: int) -> nn.Linear:
    """A learned map of states [..., width] to [..., to]: the identity where that is possible, else random by `seed`."""
    layer = nn.Linear(width, to)
    with torch.no_grad():
        layer.bias.zero_()
        if width == to:
            layer.weight.copy_(torch.eye(to))
        else:
            generator = torch.Generator().manual_seed(seed)
            layer.weight.copy_(torch.randn(to, width, generator=generator) / width**0.5)
    return layer


# Which layers are matched


def layers_to_match(student: int, teacher: int, how: str) -> tuple[list[int], list[int]]:
    """Hidden-state numbers (0 is the embedding's output) of a student of `student` layers and its teacher of `teacher`, pair by pair.

    The embedding's output and the last layer are left out. `skip`: student layer i and teacher layer i * teacher / student,
    rounded down; `last`: i and teacher - student + i. Raises UserError where the student has no inner layer, or more
    layers than its teacher.
    """
    if student < 2 or teacher < student:
        raise UserError(
            f"--feature-loss patient matches inner layers, but the student has {student} layers and a teacher {teacher}; "
            "the student needs at least two, and no more than the teacher. Use --feature-loss none.")  # fmt: skip
    inner = list(range(1, student))
    return inner, _teachers(inner, student, teacher, how)


def all_layers(student: int, teacher: int, how: str) -> tuple[InnerStates, InnerStates]:
    """What TinyBERT compares in a student of `student` layers and its teacher of `teacher`: the embeddings' output, and every
    layer of the student with the one that `layers_to_match` finds for it, the last with the last. Raises UserError for a
    teacher with fewer layers."""
    if teacher < student:
        raise UserError(
            f"--feature-loss tinybert matches every layer of the student, which has {student}, but a teacher has {teacher}; "
            "use a student with no more layers than its teacher, or --feature-loss none.")  # fmt: skip
    layers = list(range(1, student + 1))
    matched = _teachers(layers, student, teacher, how)
    return tuple(InnerStates(hidden=(0, *own), attention=tuple(i - 1 for i in own)) for own in (layers, matched))


def _teachers(layers: list[int], student: int, teacher: int, how: str) -> list[int]:
    if how == "skip":
        return [i * teacher // student for i in layers]
    return [teacher - student + i for i in layers]
