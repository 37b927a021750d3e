"""Which of a teacher's parameters the meta-update trains: --teacher-params all, last-N, head or lora:R.

    all       every parameter
    last-N    the last N encoder layers and the head
    head      what is neither in the encoder's layers nor in its embeddings: the classifier and, since it is learned with
              the task and read by the classifier alone, the pooler, which transformers counts as part of the encoder
    lora:R    W + B A with A [R, in] random and B [out, R] zero, in the query and value projection of every layer, and
              the head. Source: Hu et al., "LoRA", ICLR 2022, whose alpha is R here: no scale beside the learning rate.

What is not trained is frozen by requires_grad_(False), so that it costs no gradient, no optimizer state and, below the
lowest trained layer, no backward. Nothing is wrapped: the module's forward, configuration and class stay its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from engine.errors import UserError
from engine.models.encoder_layers import encoder_layers, stacks
from engine.models.families import family

ALLOWED = "all, last-N (N layers, 1 or more), head, or lora:R (rank 1 or more)"


class Choice(NamedTuple):
    kind: str  # "all", "last", "head" or "lora"
    number: int = 0  # layers of "last", rank of "lora"


def parse(choice: str) -> Choice:
    """What --teacher-params says. Raises UserError for anything else, and for lora where peft is not installed."""
    if choice in ("all", "head"):
        return Choice(choice)
    match = re.fullmatch(r"(?:(last)-|(lora):)([1-9]\d{0,8})", choice)
    if match is None:
        raise UserError(f"--teacher-params is {choice!r}; it can be {ALLOWED}.")
    if match[2] and importlib.util.find_spec("peft") is None:
        raise UserError(
            f"--teacher-params {choice} needs the package peft, which is not installed; run pip install "
            "'metadistil-engine[lora]' (or pip install peft), or choose all, last-N or head."
        )
    return Choice(match[1] or match[2], int(match[3]))


def check(module: nn.Module, choice: str) -> None:
    """Raises UserError where `restrict` would, and changes nothing."""
    kind, number = parse(choice)
    if kind == "all":
        return
    layers = _layers(module, choice)
    parents = [parent for parent, _, _ in stacks(module)]
    if kind == "last" and len(set(parents)) < len(parents):
        raise UserError(f"--teacher-params {choice} does not fit {_name(module)}, whose layers are not modules of their own; "
                        "choose head, or all.")  # fmt: skip
    if kind == "last" and number > len(layers):
        raise UserError(
            f"--teacher-params is {choice}, but {_name(module)} has {len(layers)} layers; choose last-{len(layers)} or "
            "fewer, head, or all."
        )
    if kind == "lora":
        _projections(module, layers, choice, number)


def restrict(module: nn.Module, choice: str, seed: int = 0) -> nn.Module:
    """Freeze in place what `choice` leaves out, put the adapters in, and return the module.

    Logits stay the same bit for bit. `seed` fixes the adapters' A; the global random state is left alone. Parameters that
    were frozen before stay frozen. Raises UserError where the choice is malformed or does not fit the module.
    """
    check(module, choice)
    kind, number = parse(choice)
    if kind == "all":
        return module
    layers = _layers(module, choice)
    trainable = {p for p in module.parameters() if p.requires_grad}
    wanted = _chosen(module, layers, number if kind == "last" else 0) & trainable
    if not wanted:
        raise UserError(f"--teacher-params {choice} leaves nothing to train in {_name(module)}; choose all.")
    if kind == "lora":
        _add_adapters(module, layers, choice, number, seed)
    for p in trainable:
        p.requires_grad_(p in wanted)
    for p in trainable - wanted:
        p.grad = None  # from its preparation; a view into the buffer of all gradients, which it would keep alive
    return module


@contextmanager
def merged(module: nn.Module):
    """The module without adapters for the body, its weights W + B A: a plain model to save.

    Behind it adapters and weights are bit for bit what they were. Without adapters nothing happens. The module itself
    gives the same logits but for rounding; not so an engine.models.network.Encoder, which holds flat parameters and bf16 copies by
    the names from before.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if _is_adapted(child)
    ]
    kept = [child.base_layer.weight.data for _, _, child in places]
    try:
        for (parent, name, child), weight in zip(places, kept, strict=True):
            with torch.no_grad():
                delta = sum(child.get_delta_weight(adapter) for adapter in child.active_adapters)
            child.base_layer.weight.data = weight + delta
            setattr(parent, name, child.base_layer)
        yield module
    finally:
        for (parent, name, child), weight in zip(places, kept, strict=True):
            child.base_layer.weight.data = weight
            setattr(parent, name, child)


def describe(module: nn.Module) -> str:
    """Such as "trains 1,234,567 of 109,483,778 parameters (last 2 layers and head)", from what takes gradients."""
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return f"trains {trained:,} of {sum(p.numel() for p in parameters):,} parameters ({_what(module)})"


def _what(module: nn.Module) -> str:
    parameters = list(module.parameters())
    trained = {p for p in parameters if p.requires_grad}
    if len(trained) == len(parameters):
        return "all"
    ranks = {rank for child in module.modules() if _is_adapted(child) for rank in child.r.values()}
    if ranks:
        return f"adapters of rank {', '.join(map(str, sorted(ranks)))} and head"
    try:
        layers = encoder_layers(module)
    except ValueError:
        layers = []
    last = sum(any(p in trained for p in layer.parameters()) for layer in layers)
    if trained != _chosen(module, layers, last):  # some were frozen by other hands
        return f"{len(trained)} of {len(parameters)} tensors"
    return {0: "head", 1: "last layer and head"}.get(last, f"last {last} layers and head")


def _layers(module: nn.Module, choice: str) -> list[nn.Module]:
    try:
        return encoder_layers(module)
    except ValueError as e:
        raise UserError(f"--teacher-params {choice} does not know the layers of {_name(module)}; choose all.") from e


def _name(module: nn.Module) -> str:
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return f"the {kind} teacher" if kind else f"a teacher of the class {type(module).__name__}"


def _chosen(module: nn.Module, layers: list[nn.Module], last: int) -> set[nn.Parameter]:
    """The head and the last layers: all but the layers before them, and the encoder's embeddings and modules named for them."""
    kept = {p for layer in layers[len(layers) - last :] for p in layer.parameters()}
    left_out = {p for layer in layers for p in layer.parameters()}
    encoder = getattr(module, "base_model", module)
    if encoder is not module:
        for name, child in encoder.named_modules():
            if isinstance(child, nn.Embedding) or any("embed" in part for part in name.split(".")):
                left_out.update(child.parameters())
    return set(module.parameters()) - (left_out - kept)


def _projections(module: nn.Module, layers: list[nn.Module], choice: str, rank: int) -> dict[str, nn.Linear]:
    """What gets adapters, by name; raises UserError where there is nothing, or nothing of that rank."""
    names = {id(m): name for name, m in module.named_modules()}
    targets = {
        names[id(m)]: m
        for layer in layers
        for name, m in layer.named_modules()
        if isinstance(m, nn.Linear) and name.rsplit(".", 1)[-1] in family(module).query_and_value
    }
    if not targets:
        raise UserError(
            f"--teacher-params {choice} finds no query and value projections in {_name(module)}; choose all, last-N or head."
        )
    widest = min(min(m.weight.shape) for m in targets.values())
    if rank > widest:
        raise UserError(
            f"--teacher-params is {choice}, but the projections of {_name(module)} have rank {widest} at the most; choose a "
            "smaller rank, 8 is usual."
        )
    return targets


def _add_adapters(module: nn.Module, layers: list[nn.Module], choice: str, rank: int, seed: int) -> None:
    """Adapters in place; every parameter that is not an adapter's is frozen."""
    targets = _projections(module, layers, choice, rank)
    peft = importlib.import_module("peft")  # optional, and slow to import: two seconds
    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=list(targets))
    mode = module.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, module)
    module.train(mode)  # new modules begin in train mode


def _is_adapted(module: nn.Module) -> bool:
    """Without an import of peft, which may not be there."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")
