"""Families of models that are not BERT's: each is read as transformers reads it by itself."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

from engine.batch import Batch
from engine.models.families import PLAIN, family
from engine.models.network import Encoder

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 24, "num_labels": 3, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip


def tiny(kind, **settings):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**SIZES | settings)
    return AutoModelForSequenceClassification.from_config(config).eval()


def inputs(module, length=9):
    """Rows of different length with what this module's forward takes."""
    ids = torch.randint(5, 40, (3, length), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(length) < torch.tensor([[length], [1], [length // 2]])).long()
    return {"input_ids": torch.where(mask == 1, ids, module.config.pad_token_id), "attention_mask": mask}


def read(module, given, **more):
    return Encoder("own", module, "own")(Batch(torch.zeros(3).long(), {"own": given}), **more).logits


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_an_encoder_that_is_a_decoder_keeps_its_causal_mask(kind):
    module = tiny(kind, is_decoder=True)
    assert family(module) is PLAIN
    given = inputs(module)
    for higher in (False, True):
        torch.testing.assert_close(read(module, given, higher=higher), module(**given).logits, rtol=0, atol=1e-5)
