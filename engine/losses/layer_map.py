"""Which weights of a student stand for which of a teacher's, where two models are compared weight by weight (ReptileDistil).

Of a student with S layers and a teacher with T >= S, counted from 0, student layer i is compared with teacher layer

    first   i                         last   T - S + i
    skip    (i + 1) T // S - 1        both   those of first and of last

and the rest (embeddings, pooler, classifier) by name. DistilBERT's names and some others' are read as BERT's (`SAME`), and a
classifier's hidden layer as the pooler. What has no counterpart stays unmapped and is named in `LayerMap.describe`.
Source: Ma et al., "Reptile for knowledge distillation", COLING 2022.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from engine.errors import UserError
from engine.models.encoder_layers import encoder_layers

How = Literal["first", "skip", "last", "both"]

# A layer's modules (or weights) under the names that BERT gives them.
SAME = {
    # DistilBERT
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
    # DeBERTa
    "attention.self.query_proj": "attention.self.query",
    "attention.self.key_proj": "attention.self.key",
    "attention.self.value_proj": "attention.self.value",
    # MPNet
    "attention.attn.q": "attention.self.query",
    "attention.attn.k": "attention.self.key",
    "attention.attn.v": "attention.self.value",
    "attention.attn.o": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
}
# What stands behind the layers: DistilBERT's, and that of RoBERTa and ELECTRA
SAME_HEAD = {
    "pre_classifier": "pooler.dense",
    "classifier.dense": "pooler.dense",
    "classifier.out_proj": "classifier",
}


@dataclass(frozen=True)
class LayerMap:
    """`sources`: a teacher's weight by name -> the names of the student's that it is compared with, one or two."""

    student: str
    teacher: str
    layers: dict[int, list[int]]  # teacher layer -> student layers
    sources: dict[str, list[str]]
    unmapped: list[str]  # of the teacher, layers as "layer N"

    def describe(self) -> str:
        pairs = ", ".join(f"{i} to {t}" for t, several in sorted(self.layers.items()) for i in several)
        left = _shorter(self.unmapped)
        return (f"Layer map: of {self.student} to {self.teacher}, layers {pairs}, {len(self.sources)} weights in all; "
                f"unmapped of {self.teacher}, which stay as they are: {left}.")  # fmt: skip


def pairs(student: int, teacher: int, how: How) -> dict[int, list[int]]:
    """Teacher layer -> student layers, from the numbers of layers. Raises ValueError where the teacher has fewer."""
    if how not in get_args(How):
        raise ValueError(f"a layer map is {how!r}; it must be one of {', '.join(get_args(How))}.")
    if teacher < student:
        raise ValueError(f"the student has {student} layers and the teacher {teacher}")
    rules = {
        "first": [lambda i: i],
        "skip": [lambda i: (i + 1) * teacher // student - 1],
        "last": [lambda i: teacher - student + i],
        "both": [lambda i: i, lambda i: teacher - student + i],
    }
    found: dict[int, list[int]] = {}
    for i in range(student):
        for t in dict.fromkeys(rule(i) for rule in rules[how]):
            found.setdefault(t, []).append(i)
    return found


def layer_map(
    student: nn.Module, teacher: nn.Module, how: How, names: tuple[str, str] = ("student", "teacher"),
    same_tokens: bool = True,
) -> LayerMap:  # fmt: skip
    """The map of two classifiers of transformers; word embeddings are in it only where both read the `same_tokens`.

    Embedding tables of different shapes stay unmapped, and so do a teacher's frozen weights. Raises UserError where widths
    differ, where a model's layers are not known, or where mapped layers have nothing in common.
    """
    _check_widths(student, teacher, names)
    ours, theirs = _Named(student, names[0]), _Named(teacher, names[1])
    try:
        layers = pairs(len(ours.layers), len(theirs.layers), how)
    except ValueError as e:
        raise UserError(f"--layer-map {how} needs a teacher with at least as many layers as the student: {e} "
                        f"({names[1]}); choose another teacher, or fewer layers (--student-layers).") from e  # fmt: skip
    sources: dict[str, list[str]] = {}
    for t, several in layers.items():
        for i in several:
            for name in ours.layers[i].keys() & theirs.layers[t].keys():
                sources.setdefault(theirs.layers[t][name], []).append(ours.layers[i][name])
        if not any(name in sources for name in theirs.layers[t].values()):
            raise UserError(f"--method reptile compares weights by name, but a layer of {names[0]} has none in common with "
                            f"one of {names[1]}; choose models of like architecture, or --method metadistil.")  # fmt: skip
    for name in ours.rest.keys() & theirs.rest.keys():
        mine, other = ours.rest[name], theirs.rest[name]
        if not same_tokens and (mine in ours.words or other in theirs.words):
            continue
        if other in theirs.tables and ours.weights[mine].shape != theirs.weights[other].shape:
            continue
        sources[other] = [mine]
    _check_shapes(sources, ours, theirs, names)
    order = [n for n in theirs.weights if n in sources and theirs.weights[n].requires_grad]
    if not order:
        raise UserError(f"--method reptile has no weight of {names[1]} to train: those that it shares with {names[0]} are "
                        "frozen; use --teacher-params all.")  # fmt: skip
    unmapped = [f"layer {i}" for i in range(len(theirs.layers)) if i not in layers]
    unmapped += [n for n in theirs.weights if n not in sources and theirs.place[n] not in unmapped]
    return LayerMap(*names, layers, {n: sources[n] for n in order}, unmapped)


def freeze_unmapped(teacher: nn.Module, found: LayerMap) -> None:
    """In place. A frozen weight has no gradient, no moments and no weight decay: it stays bit for bit."""
    for name, p in teacher.named_parameters():
        if name not in found.sources:
            p.requires_grad_(False)
            p.grad = None  # from its preparation; a view into the buffer of all gradients, which it would keep alive


class _Named:
    """A model's weights by their common names: those of each layer, and the rest."""

    def __init__(self, module: nn.Module, name: str):
        self.weights = dict(module.named_parameters())
        try:
            layers = encoder_layers(module)
        except ValueError as e:
            raise UserError(f"--method reptile compares models layer by layer, but does not know those of {name} "
                            f"({str(e).rstrip('.')}); choose another model, or --method metadistil.") from e  # fmt: skip
        prefixes = [next(n for n, m in module.named_modules() if m is layer) + "." for layer in layers]
        self.layers: list[dict[str, str]] = [
            {_common(n.removeprefix(prefix), SAME): n for n in self.weights if n.startswith(prefix)}
            for prefix in prefixes
        ]
        self.place = {n: f"layer {i}" for i, layer in enumerate(self.layers) for n in layer.values()}
        base = getattr(module, "base_model_prefix", "") + "."
        outside = [n for n in self.weights if n not in self.place]
        self.place |= dict.fromkeys(outside, "")
        self.rest = {_common(n.removeprefix(base), SAME_HEAD): n for n in outside}
        embeddings = {f"{n}.weight": m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
        self.tables = embeddings.keys() & self.weights.keys()
        words = module.get_input_embeddings()
        self.words = {n for n, m in embeddings.items() if m is words}


def _common(name: str, same: dict[str, str]) -> str:
    module, _, kind = name.rpartition(".")
    return f"{same.get(module, module)}.{kind}"


def _check_widths(student: nn.Module, teacher: nn.Module, names: tuple[str, str]) -> None:
    for setting, what in (("hidden_size", "width"), ("intermediate_size", "inner width")):
        found = [_setting(module, setting) for module in (student, teacher)]
        if found[0] != found[1] and None not in found:
            raise UserError(
                f"--method reptile compares weights of one {what}, but the student {names[0]} has {found[0]} and "
                f"{names[1]} {found[1]}; choose models of equal width, or --method metadistil.")  # fmt: skip


def _setting(module: nn.Module, name: str) -> int | None:
    found = getattr(module.config, name, None)
    return getattr(module.config, "hidden_dim", None) if found is None and name == "intermediate_size" else found


def _check_shapes(sources: dict[str, list[str]], student: _Named, teacher: _Named, names: tuple[str, str]) -> None:
    for name, several in sources.items():
        for other in several:
            shapes = [list(teacher.weights[name].shape), list(student.weights[other].shape)]
            if shapes[0] != shapes[1]:
                raise UserError(f"--method reptile compares weights of one width, but {name} of {names[1]} is {shapes[0]} "
                                f"and {other} of {names[0]} {shapes[1]}; choose models of equal width, or --method "
                                "metadistil.")  # fmt: skip


def _shorter(names: Iterable[str]) -> str:
    """Layers in one word, weights and biases of a module as the module."""
    layers = [match[1] for name in names if (match := re.fullmatch(r"layer (\d+)", name))]
    rest = dict.fromkeys(n.rpartition(".")[0] for n in names if not re.fullmatch(r"layer \d+", n))
    text = [f"layer{'s' * (len(layers) > 1)} {', '.join(layers)}"] if layers else []
    return "; ".join([*text, *rest]) or "nothing"
