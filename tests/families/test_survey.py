"""A sample of the families works in every cell; and the survey notices what is wrong."""

from unittest.mock import Mock

import pytest
import torch
from survey import table

from engine.errors import UserError
from engine.meta.strategies import STRATEGIES, exact
from engine.report import cards
from engine.run.trainer import Trainer

SAMPLE = ["BERT", "RoBERTa", "GPT-2", "T5"]


def survey(names, cells, folder):
    return table(names, cells, folder, lambda *told: None)


@pytest.mark.parametrize("name", SAMPLE)
def test_family_works(name, tmp_path):
    """In most cells: `metadistil` at M 1 is in those of --student-layers and of pairs."""
    cells = ["M2", "kd", "layers", "checkpointing", "pairs"]
    (found,) = survey([name], cells, tmp_path).values()
    assert {cell: result for cell, result in found.items() if result.kind != "works"} == {}


def _spoil_export(patch):
    export = cards.export

    def spoilt(module, *rest):
        with torch.no_grad():
            next(module.parameters()).mul_(1.01)
        export(module, *rest)

    patch.setattr(cards, "export", spoilt)


def _spoil_gradient(patch):
    other = STRATEGIES["finite_difference"].gradient
    patch.setattr(exact, "walk_back", lambda derivative, *of, taped: other(*of))


def _refuse_late(patch):
    patch.setattr(Trainer, "fit", Mock(side_effect=UserError("no.")))


@pytest.mark.parametrize(("spoil", "said"), [
    (_spoil_export, "logits of padded texts are"), (_spoil_gradient, "the meta-gradient is"), (_refuse_late, "refused when training"),
])  # fmt: skip
def test_what_is_wrong_is_a_fault(spoil, said, tmp_path, monkeypatch):
    spoil(monkeypatch)
    (found,) = survey(["BERT"], ["M1"], tmp_path).values()
    assert found["M1"].kind == "FAULT" and said in found["M1"].text
