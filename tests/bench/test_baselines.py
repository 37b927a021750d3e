"""The benchmarks' baselines: plain steps by their formulas, what the published loop restores, moves and refuses.

That its meta-gradient is the engine's is a test of the benchmark of whole steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bench import step_cases
from bench.baselines.fine_tuning import PlainFineTuning
from bench.baselines.published_loop import PlainKD, PublishedLoop, pad
from bench.step_cases import SIZES, Case, Setting, as_dict

SETTINGS = {"lr": 1e-3, "temperature": 3.0, "alpha": 0.6, "length": 8}
META = SETTINGS | {"teacher_lr": 1e-3, "pilot_lr": 0.5}  # a pilot step large enough to matter in a difference


def models(teachers, dropout=False, attention="eager"):
    given = Setting(Case("metadistil", 4, 6, teachers), SIZES["miniature"], torch.device("cpu"))
    student, teachers = given.models(attention=attention, dropout=dropout)
    return student.double(), [teacher.double() for teacher in teachers]


def batch(seed):
    return as_dict(step_cases.batch(SIZES["miniature"], 6, 4, torch.device("cpu"), seed))


def state(*models):
    return copy.deepcopy([dict(model.state_dict()) for model in models])


def run(model, batch):
    return model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits


def test_student_and_optimizer_are_restored_before_the_real_step(monkeypatch):
    student, teachers = models(1, dropout=True)
    loop = PublishedLoop(student, teachers, **META)
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
    assert_close(before, seen[0], rtol=0, atol=0)
    with pytest.raises(AssertionError, match="not equal"):
        assert_close(before, kept(), rtol=0, atol=0)


def test_step_moves_the_student_and_every_teacher_and_leaves_what_is_not_used():
    student, teachers = models(2, dropout=True)
    for model in (student, *teachers):
        model.extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    loop = PublishedLoop(student, teachers, **META)
    before = state(student, *teachers)
    losses = loop.step(batch(0), batch(1))
    assert set(losses) == {"pilot_loss", "quiz_loss", "loss"}
    for old, new in zip(before, state(student, *teachers), strict=True):
        assert not torch.equal(old["classifier.weight"], new["classifier.weight"])
        assert torch.equal(old["extra"], new["extra"])
    for learner in [loop.kd.learner, *loop.teacher_learners]:
        assert learner.schedule.get_last_lr() == [pytest.approx(1e-3 * (1 - 1 / 10_000))]


@pytest.mark.parametrize("count", [0, 2])
def test_plain_steps_are_what_the_formulas_give(count):
    """Fine-tuning without teachers, else KD."""
    student, teachers = models(count, attention="eager" if count else "sdpa")
    expected, data, frozen = copy.deepcopy(student), batch(0), state(*teachers)
    z = run(expected, data)
    loss = F.cross_entropy(z, data["labels"])
    if teachers:
        mean = sum(run(t.eval(), data) for t in teachers).detach() / count
        p, q = F.softmax(mean / 3.0, -1), F.softmax(z / 3.0, -1)
        loss = 0.6 * 9.0 * (p * (p.log() - q.log())).sum(-1).mean() + 0.4 * loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0).step()
    plain = PlainKD(student, teachers, **SETTINGS) if teachers else PlainFineTuning(student, lr=1e-3, length=8)
    assert plain.step(data)["loss"] == pytest.approx(loss.item(), rel=1e-12)
    assert_close(frozen, state(*teachers), rtol=0, atol=0)
    # an entry whose gradient is zero but for rounding moves by up to lr in either direction: look where it is not
    for old, new in zip(expected.parameters(), student.parameters(), strict=True):
        clear = old.grad.abs() > 1e-9
        assert_close(new[clear], old[clear], rtol=0, atol=1e-8)
    assert plain.learner.schedule.get_last_lr() == [pytest.approx(1e-3 * (1 - 1 / 10_000))]


def test_padding_reaches_the_length_and_changes_no_logit():
    model, data = models(0)[0].eval(), batch(0)
    longer = pad(data, 12, pad_id=5)
    assert {name: tuple(tensor.shape) for name, tensor in longer.items()} == {
        "input_ids": (4, 12), "attention_mask": (4, 12), "labels": (4,),
    }  # fmt: skip
    assert (longer["input_ids"][:, 6:] == 5).all()
    assert longer["attention_mask"][:, 6:].sum() == 0
    assert_close(run(model, longer), run(model, data), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="12 tokens, more than the length 8"):
        pad(longer, 8)


def test_models_with_fused_attention_are_refused():
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        PublishedLoop(models(0)[0], models(1, attention="sdpa")[1], **META)
