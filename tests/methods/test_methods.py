"""One round of each method against its published update, written out with autograd, AdamW and clipping on copies."""

import pytest
import torch
import torch.nn.functional as F
from method_oracle import (
    LR,
    TEACHER_LR,
    TOLERANCE,
    WEIGHTS_LR,
    Adam,
    Setting,
    apart,
    meta_gradient,
    quiz,
    read,
    real_step,
    schedule_positions,
)

from engine.meta.pilots import PILOTS
from engine.meta.strategies import STRATEGIES
from engine.methods import METHODS


@pytest.mark.parametrize("size", [1, 2])
def test_finetune(size):
    setting = Setting("finetune", size=size)
    values = setting.run()
    torch.manual_seed(7)
    student = Adam(setting.copies[0], LR, setting.student_steps, size)
    student.module.train()
    for batches, value in zip(setting.batches, values, strict=True):
        losses = []
        for batch in batches:
            losses.append(F.cross_entropy(read(student.module, batch), batch.labels))
            losses[-1].backward()
            student.step()
        torch.testing.assert_close(value["loss"], torch.stack(losses).mean().detach(), rtol=1e-9, atol=0)
    assert apart(setting.student, student.module) < TOLERANCE
    assert schedule_positions(setting.state) == [3 * size]


@pytest.mark.parametrize("weights", [None, "given"])
@pytest.mark.parametrize("size", [1, 2])
def test_kd(size, weights):
    setting = Setting("kd", size=size, weights=weights)
    setting.teachers[0].train()  # and must not drop anything for that
    values = setting.run()
    torch.manual_seed(7)
    copied, *teachers = setting.copies
    student = Adam(copied, LR, setting.student_steps, size)
    for batches, value in zip(setting.batches, values, strict=True):
        loss = torch.stack([real_step(student, teachers, batch, setting.weights) for batch in batches]).mean()
        torch.testing.assert_close(value["loss"], loss, rtol=1e-9, atol=0)
    assert apart(setting.student, student.module) < TOLERANCE
    for mine, before in zip(setting.teachers, teachers, strict=True):
        assert apart(mine, before) == 0
        assert all(p.grad is None for p in mine.parameters())
    assert setting.teachers[0].training and setting.teachers[0].dropout.training  # as they were
    assert schedule_positions(setting.state) == [3 * size]


@pytest.mark.parametrize("independent_masks", [False, True], ids=["the pilot's masks", "new masks"])
@pytest.mark.parametrize("strategy", ["exact", "double_backward"])
@pytest.mark.parametrize(
    ("teachers", "size", "weights"),
    [(1, 1, None), (2, 1, None), (2, 2, None), (1, 3, None), (2, 1, "given"), (3, 2, "given"), (2, 2, "learned")],
)
def test_metadistil(teachers, size, weights, strategy, independent_masks):
    """Pilot, quiz, teachers' update, rewind, real steps on the pilot's batches from the updated teachers.

    A real step repeats its pilot's dropout masks unless they are independent, and moves the buffers once either way.
    """
    setting = Setting("metadistil", teachers, 3, size, strategy, weights, independent_masks)
    setting.teachers[0].train()
    values = setting.run()
    after = torch.get_rng_state()
    torch.manual_seed(7)
    copied, *copied_teachers = setting.copies
    student = Adam(copied, LR, setting.student_steps, size)
    updates = [Adam(t, TEACHER_LR, setting.teacher_steps) for t in copied_teachers]
    w, learning = setting.weights, None
    if weights == "learned":
        learning = torch.optim.AdamW(w.parameters(), lr=WEIGHTS_LR, weight_decay=0.0)
    for number, (batches, value) in enumerate(zip(setting.batches, values, strict=True)):
        pilot, q, masks = meta_gradient(copied, copied_teachers, batches, quiz(number), w)
        for update in updates:
            update.step()
        if learning is not None:
            learning.step()
        masks = [None] * size if independent_masks else masks
        losses = [real_step(student, copied_teachers, *each, w, m) for *each, m in zip(batches, masks, strict=True)]
        expected = {"loss": torch.stack(losses).mean(), "pilot_loss": pilot, "quiz_loss": q}
        if w is not None:
            expected |= {f"weight_{k + 1}": x for k, x in enumerate(w.log.detach().exp() / w.log.detach().exp().sum())}
        assert value.keys() == expected.keys()
        assert not any(v.requires_grad for v in value.values())
        for name in expected:
            torch.testing.assert_close(value[name], expected[name], rtol=1e-9, atol=0)
    for mine, theirs in zip([setting.student, *setting.teachers], setting.copies, strict=True):
        assert apart(mine, theirs) < TOLERANCE
    assert torch.equal(torch.get_rng_state(), after)
    assert setting.quizzed == [0, 1, 2] and setting.state.round == 3
    learners = teachers + (weights == "learned")
    assert schedule_positions(setting.state) == [3 * size] + [3] * learners
    models = [setting.student, *setting.teachers]
    assert not any(p.grad is not None and p.grad.any() for m in models for p in m.parameters())


def test_the_files_of_the_folder_are_the_methods():
    assert set(METHODS) == {"finetune", "kd", "lgtm", "metadistil", "metakd", "reptile"}
    for name, method in METHODS.items():
        said = METHODS.facts(name)  # read from the text of the file
        assert said == {key: getattr(method, key) for key in said}
        assert said.keys() >= {"help", "teachers", "title", "report"}
    assert set(STRATEGIES) == {"double_backward", "exact", "finite_difference", "first_order"}
    assert set(PILOTS) == {"adamw", "sgd"}
