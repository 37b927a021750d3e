"""The benchmarks' baselines: the published loop's gradient against differences of the procedure, restoring, moving."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

from bench.baselines.fine_tuning import PlainFineTuning
from bench.baselines.published_loop import PlainKD, PublishedLoop, pad

SETTINGS = {"lr": 1e-3, "temperature": 3.0, "alpha": 0.6, "length": 8}
META = SETTINGS | {"teacher_lr": 1e-3, "pilot_lr": 0.5}  # a pilot step large enough to matter in a difference


def bert(seed, layers=1, dropout=0.0, attention="eager"):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3, initializer_range=0.4, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, attn_implementation=attention,
    )  # fmt: skip
    return BertForSequenceClassification(config).double()


def batch(seed, size=4, length=6):
    generator = torch.Generator().manual_seed(seed)
    real = torch.randint(2, length + 1, (size, 1), generator=generator)
    ids = torch.randint(1, 20, (size, length), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(length) < real).long(),
        "token_type_ids": torch.randint(2, (size, length), generator=generator),
        "labels": torch.randint(3, (size,), generator=generator),
    }


def state(*models):
    return copy.deepcopy([dict(model.state_dict()) for model in models])


def same(first, second):
    """Bit for bit, through dicts and lists."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def run(model, batch):
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def soft_loss_by_hand(kind, student, mean):
    p, q = F.softmax(mean / 3.0, -1), F.softmax(student / 3.0, -1)
    return 9.0 * ((p * (p.log() - q.log())).sum(-1).mean() if kind == "kl" else (p - q).square().mean())


def quiz_after_pilot(student, teachers, kind, pilot, quiz):
    """The whole procedure with nothing of the loop: a copy of the student, torch's SGD, then the quiz loss."""
    student = copy.deepcopy(student).train()
    with torch.no_grad():
        mean = sum(run(teacher, pilot) for teacher in teachers) / len(teachers)
    z = run(student, pilot)
    loss = 0.6 * soft_loss_by_hand(kind, z, mean) + 0.4 * F.cross_entropy(z, pilot["labels"])
    loss.backward()
    torch.optim.SGD(student.parameters(), lr=0.5).step()
    with torch.no_grad():
        return F.cross_entropy(run(student.eval(), quiz), quiz["labels"]).item()


@pytest.mark.parametrize(("kind", "count"), [("kl", 1), ("kl", 2), ("mse_prob", 2)])
def test_meta_gradient_is_the_slope_of_the_whole_procedure(kind, count):
    student, teachers = bert(0), [bert(1 + k, layers=2) for k in range(count)]
    pilot, quiz = batch(0), batch(1)
    before = state(student, *teachers)
    PublishedLoop(student, teachers, soft_loss=kind, **META).meta_gradient(pilot, quiz)
    assert same(before, state(student, *teachers)) and all(p.grad is None for p in student.parameters())
    for teacher in teachers:
        weights = list(teacher.parameters())
        norm = torch.cat([p.grad.flatten() for p in weights]).norm().item()
        for seed in range(2):
            torch.manual_seed(seed)
            direction = [torch.randn_like(p) for p in weights]
            direction = torch._foreach_div(direction, torch.cat([d.flatten() for d in direction]).norm().item())
            sides = []
            for eps in (1e-4, -1e-4):  # off by 2e-9 of the slope at most, more at 1e-3 and 1e-6
                with torch.no_grad():
                    torch._foreach_add_(weights, direction, alpha=eps)
                sides.append(quiz_after_pilot(student, teachers, kind, pilot, quiz))
                with torch.no_grad():
                    torch._foreach_sub_(weights, direction, alpha=eps)
            slope = sum((p.grad * d).sum().item() for p, d in zip(weights, direction, strict=True))
            assert abs(slope) > 1e-3 * norm, "a direction that shows nothing"
            assert abs(slope - (sides[0] - sides[1]) / 2e-4) < 1e-6 * abs(slope)


def test_student_and_optimizer_are_restored_before_the_real_step(monkeypatch):
    student, teacher = bert(0, dropout=0.1), bert(1)
    loop = PublishedLoop(student, [teacher], **META)
    loop.step(batch(0), batch(1))  # so that AdamW has moments to restore
    optimizer, meta_gradient, real_step = loop.kd.learner.optimizer, loop.meta_gradient, loop.kd.step
    seen = []

    def kept():
        return copy.deepcopy([dict(student.state_dict()), optimizer.state_dict()])

    def meddle(*batches):
        losses = meta_gradient(*batches)
        with torch.no_grad():
            for weight in student.parameters():
                for tensor in (weight, *optimizer.state[weight].values()):
                    tensor.add_(1)
        return losses

    monkeypatch.setattr(loop, "meta_gradient", meddle)
    monkeypatch.setattr(loop.kd, "step", lambda batch: seen.append(kept()) or real_step(batch))
    before = kept()
    assert before[1]["state"]
    loop.step(batch(2), batch(3))
    assert same(before, seen[0]) and not same(before, kept())


def test_step_moves_the_student_and_every_teacher_and_leaves_what_is_not_used():
    student, teachers = bert(0, dropout=0.1), [bert(1), bert(2)]
    for model in (student, *teachers):
        model.extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    loop = PublishedLoop(student, teachers, **META)
    before = state(student, *teachers)
    losses = loop.step(batch(0), batch(1))
    assert set(losses) == {"pilot_loss", "quiz_loss", "loss"}
    assert all(isinstance(value, float) for value in losses.values())
    for old, new in zip(before, state(student, *teachers), strict=True):
        assert not torch.equal(old["classifier.weight"], new["classifier.weight"])
        assert torch.equal(old["extra"], new["extra"])
    for learner in [loop.kd.learner, *loop.teacher_learners]:
        assert learner.schedule.get_last_lr() == [pytest.approx(1e-3 * (1 - 1 / 10_000))]


@pytest.mark.parametrize("count", [0, 2])
def test_plain_steps_are_what_the_formulas_give(count):
    """Fine-tuning without teachers, else KD."""
    student, teachers = bert(0, attention="eager" if count else "sdpa"), [bert(1 + k) for k in range(count)]
    expected, data, frozen = copy.deepcopy(student), batch(0), state(*teachers)
    z = run(expected, data)
    loss = F.cross_entropy(z, data["labels"])
    if teachers:
        mean = sum(run(t.eval(), data) for t in teachers).detach() / count
        loss = 0.6 * soft_loss_by_hand("kl", z, mean) + 0.4 * loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0).step()
    plain = PlainKD(student, teachers, **SETTINGS) if teachers else PlainFineTuning(student, lr=1e-3, length=8)
    assert plain.step(data)["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert same(frozen, state(*teachers))
    # an entry whose gradient is zero but for rounding moves by up to lr in either direction: look where it is not
    for old, new in zip(expected.parameters(), student.parameters(), strict=True):
        clear = old.grad.abs() > 1e-9
        torch.testing.assert_close(new[clear], old[clear], rtol=0, atol=1e-8)
    assert plain.learner.schedule.get_last_lr() == [pytest.approx(1e-3 * (1 - 1 / 10_000))]


def test_padding_reaches_the_length_and_changes_no_logit():
    model, data = bert(0).eval(), batch(0)
    longer = pad(data, 12, pad_id=5)
    assert {name: tuple(tensor.shape) for name, tensor in longer.items()} == {
        "input_ids": (4, 12), "attention_mask": (4, 12), "token_type_ids": (4, 12), "labels": (4,),
    }  # fmt: skip
    assert (longer["input_ids"][:, 6:] == 5).all()
    assert longer["attention_mask"][:, 6:].sum() == 0
    torch.testing.assert_close(run(model, longer), run(model, data), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="12 tokens, more than the length 8"):
        pad(longer, 8)


def test_models_with_fused_attention_are_refused():
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        PublishedLoop(bert(0), [bert(1, attention="sdpa")], **META)
