"""--student-layers: a student that is some of a model's layers, as DistilBERT was initialised from BERT."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig

from engine.errors import UserError
from engine.models.encoder_layers import stacks
from engine.models.families import inputs_of, model_type, without_cache

# Where configurations count layers, and how they call lists that have an entry for each
COUNTS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "num_hidden_groups")
PER_LAYER = re.compile("layer|window")
SAME = 1e-5  # of logits, relative to the largest: the same operations in float32


def keep_layers(module: nn.Module, layers: Sequence[int]) -> nn.Module:
    """A model with these layers of `module` (counted from 0, in this order), which is used up; of encoder and decoder the same.

    It is made from its configuration as plain transformers would load it, and gives the logits of the layers that were taken
    out. Raises UserError where it cannot, where the layers are not plain lists, or where a number is outside them.
    """
    kind, depth, places = model_type(module), module.config.num_hidden_layers, stacks(module)
    config = keep_in_config(module.config, layers)
    # ALBERT has one layer for all
    shared = len(places) == 1 and len(places[0][2]) == 1
    nested = any(isinstance(layer, nn.ModuleList) for *_, each in places for layer in each)
    if not places or nested or not (shared or all(len(each) == depth for *_, each in places)):
        raise UserError(f"--student-layers does not know the layers of a {kind}; leave the flag out.")
    for parent in {parent for parent, _, _ in places} if not shared else ():
        _cut(parent, depth, layers)
    for name, value in _changes(module.config, layers).items():
        setattr(module.config, name, value)  # which the layers that stay may still read
    with torch.random.fork_rng(devices=[]):
        kept = type(module)(config).train(module.training)
    missing, unexpected = kept.load_state_dict(module.state_dict(), strict=False)
    if strange := [*missing, *unexpected]:
        raise UserError(f"--student-layers {_text(layers)} does not fit a {kind}, whose layers are not all alike ({strange[0]}); "
                        f"{'begin with layer 0' if layers[0] else 'leave the flag out'}.")  # fmt: skip
    if (apart := _apart(kept, module)) > SAME:
        raise UserError(f"--student-layers {_text(layers)} does not fit a {kind}, whose layers compute something else at another "
                        f"place (logits are {apart:.1e} off); leave the flag out.")  # fmt: skip
    return kept


def keep_in_config(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The configuration of a model with these layers alone. Raises UserError as `keep_layers` does, where it tells."""
    depth = config.num_hidden_layers
    if not layers or sorted(set(layers)) != sorted(layers) or not all(0 <= i < depth for i in layers):
        raise UserError(
            f"--student-layers is {list(layers)}; the student has layers 0 to {depth - 1}, each usable once."
        )
    depths = [getattr(config, name) for name in ("num_decoder_layers", "decoder_layers") if hasattr(config, name)]
    if config.is_encoder_decoder and depths != [depth]:
        raise UserError(f"--student-layers keeps the same layers of encoder and decoder, and the student has {depth} and "
                        f"{', '.join(map(str, depths))}; leave the flag out.")  # fmt: skip
    kept = copy.deepcopy(config)
    try:
        for name, value in _changes(config, layers).items():
            setattr(kept, name, value)
    except NotImplementedError as e:  # counted in blocks
        raise UserError(
            f"--student-layers does not know the layers of a {config.model_type}; leave the flag out."
        ) from e
    return kept


def _changes(config: PretrainedConfig, layers: Sequence[int]) -> dict[str, int | list]:
    """What of a configuration is another with these layers alone."""
    depth = config.num_hidden_layers
    lists = {
        name: [value[i] for i in layers]
        for name, value in config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == depth and PER_LAYER.search(name)
    }
    return lists | {name: len(layers) for name in COUNTS if getattr(config, name, None) == depth}


def _cut(parent: nn.Module, depth: int, layers: Sequence[int]) -> None:
    """Only these layers of every list of `depth` in `parent`, and its own counts of them."""
    for name, child in list(parent.named_children()):
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            setattr(parent, name, nn.ModuleList([child[i] for i in layers]))
    for name in ("n_layers", "n_layer", "num_layers"):
        if getattr(parent, name, None) == depth:
            setattr(parent, name, len(layers))


@torch.no_grad()
def _apart(*modules: nn.Module) -> float:
    """How far the logits of two models are apart, relative to the largest, on tokens drawn at random."""
    config, generator = modules[0].config, torch.Generator().manual_seed(0)
    padding, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    rows = modules[0].get_input_embeddings().weight.shape[0]
    words = torch.tensor([i for i in range(min(rows, 1000)) if i not in (padding, end)])
    ids = words[torch.randint(len(words), (2, 9), generator=generator)]
    if isinstance(end, int) and end < rows:
        ids[:, -1] = end  # which T5's and BART's classifiers read
    found = []
    for module in modules:
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = {name: t for name, t in given.items() if name in inputs_of(module)} | without_cache(module)
        mode = module.training
        found.append(module.eval()(**given).logits)
        module.train(mode)
    return ((found[0] - found[1]).abs().max() / found[1].abs().max().clamp(min=1)).item()


def _text(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
