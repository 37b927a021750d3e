"""ReptileDistil against its published update, written out with copies, torch's AdamW and clipping; and what maps what."""

import copy
from types import SimpleNamespace

import pytest
import torch
from method_oracle import (
    CLASSES,
    CLIP,
    DECAY,
    LR,
    PILOT_LR,
    TEACHER_LR,
    TOLERANCE,
    WARMUP,
    WORDS,
    Adam,
    apart,
    distillation,
    make_batch,
    read,
)  # fmt: skip
from run_helpers import metrics, succeed
from torch import nn
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

from engine.errors import UserError
from engine.losses.layer_map import freeze_unmapped, layer_map, pairs
from engine.losses.objectives import Objective
from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile
from engine.methods import METHODS, State
from engine.models.learner import Learner
from engine.models.network import Encoder

WIDTH, ROUNDS = 5, 3
# Teacher layers of student layers 0 and 1 where the teacher has 4, as published: i, 2 i + 1, i + 2
MAPS = {"first": {0: [0], 1: [1]}, "skip": {1: [0], 3: [1]}, "last": {2: [0], 3: [1]}}
MAPS["both"] = {**MAPS["first"], **MAPS["last"]}
ALL_THREE = {0: [0], 1: [0, 1], 2: [1]}  # both, of a teacher with 3 layers


class Stack(nn.Module):
    """Layers on a mean of words, with dropout; a student's batch norm has buffers, and no counterpart."""

    def __init__(self, layers, seed, norm=False, dropout=0.3):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(num_hidden_layers=layers, hidden_size=WIDTH)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]
        hidden = (self.words(input_ids) * mask).sum(1) / mask.sum(1)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(self.dropout(hidden)))
        return SimpleNamespace(logits=self.classifier(self.norm(hidden)))


class Setting:
    def __init__(self, how, depths=(4,), dropout=0.3, table_rows=1, **settings):
        student = Encoder("student", Stack(2, 0, norm=True, dropout=dropout).double(), "words")
        teachers = [Encoder(f"teacher {k}", Stack(n, k + 1).double(), "words") for k, n in enumerate(depths)]
        self.copies = copy.deepcopy([n.module for n in (student, *teachers)])
        self.maps = [layer_map(student.module, t.module, how) for t in teachers]
        for network, found in zip(teachers, self.maps, strict=True):
            freeze_unmapped(network.module, found)
        for network in (student, *teachers):
            network.table_rows = table_rows
        common = {"warmup_ratio": WARMUP, "weight_decay": DECAY, "max_grad_norm": CLIP}
        objective = Objective("kl", 3.0, 0.6)
        learner = Learner.adamw(student, lr=LR, steps=ROUNDS, **common)
        learners = [Learner.adamw(t, lr=TEACHER_LR, steps=ROUNDS, **common) for t in teachers]
        meta_step = MetaStep(learner, learners, objective, pilot_lr=PILOT_LR,
                             strategy=Reptile([m.sources for m in self.maps]), **settings)  # fmt: skip
        self.state = State(learner, objective, meta_step=meta_step)
        self.student, self.teachers = student.module, [t.module for t in teachers]

    def run(self, batches=None):
        torch.manual_seed(7)
        values = []
        for batch in batches or [make_batch(i) for i in range(ROUNDS)]:
            values.append(METHODS["reptile"].step(self.state, [batch], self.state.draw()))
            self.state.advance(1)
        return values


def published_round(student, updates, layers, batch, independent_masks):
    """`layers`: of each teacher, teacher layer -> student layers."""
    fast, teachers = copy.deepcopy(student.module).train(), [u.module.eval() for u in updates]
    masks = torch.get_rng_state()
    with torch.no_grad():
        taught = [read(t, batch) for t in teachers]
    pilot = distillation(read(fast, batch), taught, batch.labels)
    pilot.backward()
    after = torch.get_rng_state()
    nn.utils.clip_grad_norm_(fast.parameters(), CLIP)
    ps = list(fast.parameters())
    torch.optim.AdamW([{"params": [p for p in ps if p.ndim >= 2], "weight_decay": DECAY},
                       {"params": [p for p in ps if p.ndim < 2], "weight_decay": 0.0}],
                      lr=PILOT_LR, foreach=False).step()  # fmt: skip
    moved = dict(fast.named_parameters())
    for update, mine in zip(updates, layers, strict=True):
        for name, p in update.module.named_parameters():
            head, _, rest = name.partition(".")
            if head == "layers":
                number, kind = rest.split(".")
                phi = [moved[f"layers.{i}.{kind}"] for i in mine.get(int(number), [])]
            else:
                phi = [moved[name]]
            p.grad = p.detach() - (sum(phi) / len(phi)).detach() if phi else None
        update.step()
    if not independent_masks:
        torch.set_rng_state(masks)
    with torch.no_grad():
        taught = [read(t, batch) for t in teachers]
    loss = distillation(read(student.module.train(), batch), taught, batch.labels)
    loss.backward()
    student.step()
    if not independent_masks:
        torch.set_rng_state(after)
    return loss.detach(), pilot.detach()


@pytest.mark.parametrize("independent_masks", [False, True], ids=["the pilot's masks", "new masks"])
@pytest.mark.parametrize(("how", "depths", "layers"), [
    ("first", (4,), [MAPS["first"]]), ("skip", (4,), [MAPS["skip"]]), ("last", (4,), [MAPS["last"]]),
    ("both", (4,), [MAPS["both"]]), ("both", (3,), [ALL_THREE]), ("skip", (4, 2), [MAPS["skip"], {0: [0], 1: [1]}]),
])  # fmt: skip
def test_rounds_are_the_published_ones(how, depths, layers, independent_masks):
    table_rows = None if independent_masks else 1  # tables dense, or by rows
    setting = Setting(how, depths, table_rows=table_rows, independent_masks=independent_masks)
    values, after = setting.run(), torch.get_rng_state()
    torch.manual_seed(7)
    copied, *teachers = setting.copies
    student, updates = Adam(copied, LR, ROUNDS), [Adam(t, TEACHER_LR, ROUNDS) for t in teachers]
    for number, value in enumerate(values):
        expected = published_round(student, updates, layers, make_batch(number), independent_masks)
        assert value.keys() == {"loss", "pilot_loss"}
        torch.testing.assert_close((value["loss"], value["pilot_loss"]), expected, rtol=1e-9, atol=0)
    for mine, theirs in zip([setting.student, *setting.teachers], setting.copies, strict=True):
        assert apart(mine, theirs) < TOLERANCE  # also what no map names: trained, weight decay would move it
    for network, found in zip(setting.teachers, setting.maps, strict=True):
        assert all((p.grad is not None) == (n in found.sources) for n, p in network.named_parameters())
    assert torch.equal(torch.get_rng_state(), after)


def test_a_gradient_that_is_not_finite_moves_nothing():
    setting = Setting("skip")
    with torch.no_grad():
        setting.teachers[0].classifier.bias[0] = float("nan")
    before = [copy.deepcopy(m.state_dict()) for m in (setting.student, *setting.teachers)]
    setting.run([make_batch(0)])
    for module, then in zip((setting.student, *setting.teachers), before, strict=True):
        for name, p in module.named_parameters():
            torch.testing.assert_close(p.detach(), then[name], rtol=0, atol=0, equal_nan=True)
    assert [learner.skipped.item() for learner in setting.state.learners()] == [1, 1]


def test_what_does_not_fit_is_refused():
    setting = Setting("skip")
    with pytest.raises(ValueError, match="one batch a round; got 2"):
        setting.state.meta_step([make_batch(0), make_batch(1)], [])
    student, teacher = Stack(2, 0), Stack(4, 1)
    optimizers = {"student_optimizer": torch.optim.AdamW(student.parameters()),
                  "teacher_optimizers": [torch.optim.AdamW(teacher.parameters())]}  # fmt: skip
    with pytest.raises(ValueError, match=r"layers.0.weight, layers.0.bias.* is trained, but in no map"):
        MetaStep(student, [teacher], strategy=Reptile([layer_map(student, teacher, "skip").sources]), **optimizers)
    with pytest.raises(ValueError, match="maps for 2 teachers, and 1"):
        MetaStep(student, [teacher], strategy=Reptile([{}, {}]), **optimizers)


# Maps


@pytest.mark.parametrize(("student", "teacher", "how", "found"), [
    (2, 4, "first", MAPS["first"]), (2, 4, "skip", MAPS["skip"]), (2, 4, "last", MAPS["last"]), (2, 4, "both", MAPS["both"]),
    (6, 12, "skip", {2 * i + 1: [i] for i in range(6)}), (6, 12, "last", {i + 6: [i] for i in range(6)}),
    (2, 3, "both", ALL_THREE), (2, 2, "both", {0: [0], 1: [1]}), (3, 4, "skip", {0: [0], 1: [1], 3: [2]}),
])  # fmt: skip
def test_pairs(student, teacher, how, found):
    assert pairs(student, teacher, how) == found


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def model(kind, layers=2, **changes):
    if kind == "distilbert":
        config = DistilBertConfig(dim=16, n_heads=2, hidden_dim=32, vocab_size=50, n_layers=layers)
    else:
        config = {"bert": BertConfig, "roberta": RobertaConfig, "electra": ElectraConfig}[kind](
            **SMALL | {"num_hidden_layers": layers} | ({"embedding_size": 16} if kind == "electra" else {}) | changes)  # fmt: skip
    return Classifier.from_config(config)


def test_distilbert_and_bert_by_equivalent_names():
    found = layer_map(model("distilbert"), model("bert", 4), "skip", ("distilbert", "bert"))
    layer, other = "bert.encoder.layer.3.", "distilbert.transformer.layer.1."
    expected = {"attention.self.query": "attention.q_lin", "attention.self.key": "attention.k_lin",
                "attention.self.value": "attention.v_lin", "attention.output.dense": "attention.out_lin",
                "attention.output.LayerNorm": "sa_layer_norm", "intermediate.dense": "ffn.lin1", "output.dense": "ffn.lin2",
                "output.LayerNorm": "output_layer_norm"}  # fmt: skip
    assert {n: s for n, s in found.sources.items() if n.startswith(layer)} == {
        f"{layer}{a}.{kind}": [f"{other}{b}.{kind}"] for a, b in expected.items() for kind in ("weight", "bias")}  # fmt: skip
    rest = {n: s for n, s in found.sources.items() if ".layer." not in n}
    embeddings = ("word_embeddings.weight", "position_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    assert rest == {f"bert.embeddings.{n}": [f"distilbert.embeddings.{n}"] for n in embeddings} | {
        f"{a}.{kind}": [f"{b}.{kind}"] for kind in ("weight", "bias")
        for a, b in (("bert.pooler.dense", "pre_classifier"), ("classifier", "classifier"))}  # fmt: skip
    assert found.describe() == (
        "Layer map: of distilbert to bert, layers 0 to 1, 1 to 3, 40 weights in all; unmapped of bert, which stay as they "
        "are: layers 0, 2; bert.embeddings.token_type_embeddings.")  # fmt: skip
    back = layer_map(model("bert"), model("distilbert", 4), "skip")  # and the other way round
    assert back.sources["pre_classifier.weight"] == ["bert.pooler.dense.weight"]
    assert back.unmapped == ["layer 0", "layer 2"]


def test_tables_of_other_shapes_or_other_tokens_stay_unmapped():
    student, teacher = model("distilbert"), model("roberta", 2, max_position_embeddings=514)
    found = layer_map(student, teacher, "skip", same_tokens=False)
    tables = {f"roberta.embeddings.{n}_embeddings.weight" for n in ("word", "position", "token_type")}
    assert set(found.unmapped) == tables and not tables & found.sources.keys()
    assert found.sources["classifier.out_proj.weight"] == ["classifier.weight"]
    assert found.sources["classifier.dense.weight"] == ["pre_classifier.weight"]
    wider = model("bert", vocab_size=60)
    assert layer_map(student, wider, "skip").unmapped[0] == "bert.embeddings.word_embeddings.weight"
    same = layer_map(model("electra"), model("roberta"), "skip")
    assert same.unmapped == [] and "roberta.embeddings.word_embeddings.weight" in same.sources


def test_frozen_weights_are_not_mapped():
    teacher = model("bert")
    teacher.bert.embeddings.requires_grad_(False)
    found = layer_map(model("distilbert"), teacher, "skip")
    assert not any("embeddings" in n for n in found.sources) and len(found.sources) == 36
    with pytest.raises(UserError, match="no weight of teacher to train.*--teacher-params all"):
        layer_map(model("distilbert"), teacher.requires_grad_(False), "skip")


def test_models_that_cannot_be_compared():
    other, unknown = Stack(2, 0), Stack(2, 0)
    other.config.hidden_size = unknown.config.hidden_size = 16
    unknown.layers = unknown.layers[0]
    for student, teacher, how, message in (
        ("distilbert", model("bert", hidden_size=24), "skip", "student student has 16 and teacher 24; choose models of equal width"),
        ("distilbert", model("bert", intermediate_size=64), "skip", "inner width, but the student student has 32 and teacher 64"),
        (model("distilbert", 3), model("bert"), "first", "the student has 3 layers and the teacher 2"),
        (other, model("bert"), "skip", "none in common with one of teacher"),
        (unknown, model("bert"), "skip", "does not know those of student"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            layer_map(model(student) if isinstance(student, str) else student, teacher, how)


# Runs


def test_a_run_says_what_is_mapped(data, tmp_path, capsys):
    run = succeed(data, tmp_path / "run", method="reptile", teacher_params="head", layer_map="last", train_size=48)
    said = " ".join(capsys.readouterr().out.split())
    assert "Layer map: of distilbert to bert" in said and "4 weights in all" in said
    assert "No quiz batches are drawn: the quiz set stays unused." in said
    assert not any("quiz_loss" in row for row in metrics(run))
