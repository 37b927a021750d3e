"""A sample of docs/families.md: what stands there is what the command does today; and the survey notices what is wrong."""

from unittest.mock import Mock

import pytest
import torch

from bench.survey import CELLS, PAGE, page, table
from bench.zoo import FAMILIES
from engine.errors import UserError
from engine.meta.strategies import STRATEGIES, exact
from engine.report import cards
from engine.run.trainer import Trainer

SAMPLE = ["BERT", "GPT-2", "RoBERTa", "T5"]
MAY_BE_REFUSED = {"BLOOM", "BigBird", "Funnel"}  # in cells where the others work


def survey(names, cells, folder):
    return table(names, cells, folder, lambda *told: None)


def documented(name):
    """The family's row of the page: what each cell says."""
    line = next(line for line in PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    return dict(zip(CELLS, (cell.strip() for cell in line.split("|")[2:-1]), strict=True))


@pytest.mark.parametrize("name", [*SAMPLE[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLE[2:])])
def test_family_works_as_documented(name, tmp_path):
    """In most cells: M 1 is in those of --student-layers and of pairs, M 2 in that of --checkpointing."""
    (found,) = survey([name], ["kd", "layers", "checkpointing", "pairs"], tmp_path).values()
    assert {cell: result for cell, result in found.items() if result.kind != "works"} == {}
    assert {documented(name)[cell] for cell in found} == {"works"}


@pytest.mark.slow
def test_page_is_what_the_command_does(tmp_path):
    results = survey(list(FAMILIES), list(CELLS), tmp_path)
    kinds = {(name, cell): result.kind for name, found in results.items() for cell, result in found.items()}
    assert [where for where, kind in kinds.items() if kind == "FAULT"] == []
    refused = {name for (name, cell), kind in kinds.items() if kind == "refused" and cell != "patient"}
    assert refused <= MAY_BE_REFUSED
    written, made = (text.partition("Made with")[0] for text in (PAGE.read_text(), page(results)))
    assert written == made, "`make families` writes it again"


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
