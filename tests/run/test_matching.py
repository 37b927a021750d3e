"""What student and teachers compare of their inside, and what the student learns for that and loses again."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from engine.batch import Batch
from engine.config import Config
from engine.errors import UserError
from engine.losses.objectives import Objective
from engine.models.learner import Learner
from engine.models.network import Encoder
from engine.run.matching import match


def encoder(name, width=8, layers=4, heads=2, encoding="words"):
    torch.manual_seed(width + layers)
    config = BertConfig(vocab_size=40, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                        intermediate_size=16, max_position_embeddings=16, num_labels=2)  # fmt: skip
    return Encoder(name, BertForSequenceClassification(config).eval(), encoding)


def settings(feature_loss, **more):
    return Config.from_flat({"feature_loss": feature_loss, "method": "kd"} | more)


def batch():
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(torch.tensor([0, 1, 1]), {"words": inputs}, columns={"domain": torch.tensor([0, 1, 0])})


@pytest.mark.parametrize(("feature_loss", "width"), [("patient", 8), ("patient", 6), ("tinybert", 8), ("tinybert", 6)])
def test_projections_come_learn_and_go(feature_loss, width):
    """TinyBERT always projects, Patient KD where widths differ; afterwards the student is what it was before."""
    student, teacher = encoder("student", width, 2), encoder("teacher")
    names, count = set(student.module.state_dict()), student.size()
    matching = match(settings(feature_loss), student, [teacher])
    with matching.between(student, [teacher]):
        assert hasattr(student.module, "extras") == (feature_loss == "tinybert" or width != 8)
        learner = Learner.adamw(student, lr=0.1, steps=10, warmup_ratio=0, weight_decay=0, max_grad_norm=1.0)
        before = {n: p.detach().clone() for n, p in student.trainable().items()}
        objective = Objective(feature_loss=feature_loss, on_logits=False, beta=1.0)
        losses = []
        for _ in range(5):
            outputs, lookups = learner.forward(batch())
            with torch.no_grad():
                taught = [teacher(batch())]
            assert outputs.features.shape == taught[0].features.shape
            loss, slopes = objective.slopes(outputs, taught, batch().labels)
            learner.backward(outputs.given(), slopes, lookups)
            learner.update()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        moved = [n for n, p in student.trainable().items() if n.startswith("extras") and not torch.equal(p, before[n])]
        assert bool(moved) == hasattr(student.module, "extras")
    assert set(student.module.state_dict()) == names and student.size() == count
    assert not student.inner and not teacher.inner and student(batch()).features is None


def test_domain_features_for_metakd_alone():
    student, teacher = encoder("student", layers=2), encoder("teacher")
    assert match(settings("tinybert"), student, [teacher]).student.domain == ""
    matching = match(settings("tinybert", method="metakd"), student, [teacher])
    with matching.between(student, [teacher]):
        assert student(batch()).domain.shape == teacher(batch()).domain.shape == (3, 8)


UNLIKE = [
    ("patient", [{"encoding": "others"}], "another tokenizer than the student"),
    ("tinybert", [{"encoding": "others"}], "another tokenizer than the student"),
    ("tinybert", [{"heads": 4}], "has 2 heads and teacher 4"),
    ("tinybert", [{"layers": 1}], "which has 2, but a teacher has 1"),
    ("patient", [{"layers": 1}], "student has 2 layers and a teacher 1"),
    ("patient", [{}, {"width": 4}], "several .teacher 8, teacher1 4"),
    ("tinybert", [{}, {"width": 4}], "use teachers of one width"),
]


@pytest.mark.parametrize(("feature_loss", "teachers", "said"), UNLIKE)
def test_models_that_cannot_be_compared(feature_loss, teachers, said):
    networks = [encoder(f"teacher{k or ''}", **t) for k, t in enumerate(teachers)]
    with pytest.raises(UserError, match=said):
        match(settings(feature_loss), encoder("student", layers=2), networks)


SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("kind", "sizes"), [("t5", {"d_model": 8, "num_layers": 2, "num_heads": 2}), ("bert", SMALL | {"is_decoder": True})]
)
def test_patient_needs_one_token_that_the_classifier_reads(kind, sizes):
    module = AutoModelForSequenceClassification.from_config(CONFIG_MAPPING[kind](vocab_size=40, d_ff=8, **sizes))
    with pytest.raises(UserError, match=f"and teacher, a {kind}, reads several, or it is not known which"):
        match(settings("patient"), encoder("student", layers=2), [Encoder("teacher", module, "words")])
