"""LGTM against its update written out: Adam's step simulated with a graph, the teachers' own losses, and what the published
finite difference comes to."""

import pytest
import torch
import torch.nn.functional as F
from method_oracle import (
    LGTM_PILOT_LR,
    LR,
    TEACHER_ALPHA,
    TEACHER_LR,
    TOLERANCE,
    Adam,
    Setting,
    T,
    apart,
    distillation,
    quiz,
    read,
    real_step,
)

from engine import cli
from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile
from engine.models.load import ModelSource
from engine.run.choices import resolve_defaults

B1, B2, EPS = 0.9, 0.999, 1e-8


def adam_step(optimizer, lr):
    """(step number, weights, gradients, moments) -> weights, moments: torch.optim.AdamW's, as differentiable operations."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    taken = max((int(s["step"]) for s in optimizer.state.values() if s), default=0)

    def step(number, own, weights, gradients, moments):
        t, moved = taken + number + 1, {}
        for name, p in weights.items():
            g, (m, s) = gradients[name], moments[name]
            m, s = B1 * m + (1 - B1) * g, B2 * s + (1 - B2) * g * g
            moments[name] = m, s
            used = s > 0  # the slope of a root at 0; a word that was never seen
            root = torch.where(used, torch.where(used, s, 1.0).sqrt(), 0.0) / (1 - B2**t) ** 0.5
            decay = groups[id(own[name])]["weight_decay"]
            moved[name] = (1 - lr * decay) * p - lr / (1 - B1**t) * m / (root + EPS)
        return moved, moments

    return step


def own_loss(teacher, student, labels):
    """a T^2 KL(student || teacher) + (1 - a) CE."""
    p, log_p = F.softmax(student.detach() / T, -1), F.log_softmax(student.detach() / T, -1)
    kl = (p * (log_p - F.log_softmax(teacher / T, -1))).sum() / len(labels)
    return TEACHER_ALPHA * T**2 * kl + (1 - TEACHER_ALPHA) * F.cross_entropy(teacher, labels)


def published_gradient(student, teachers, batches, quizzes):
    """Leaves the teachers' gradients in their grad. Returns losses and the generator's states before each pilot."""
    module = student.module
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    module.train()
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}
    state = student.optimizer.state
    zero = {n: torch.zeros_like(p) for n, p in own.items()}
    moments = {
        n: (state[p]["exp_avg"], state[p]["exp_avg_sq"]) if state[p] else (zero[n], zero[n]) for n, p in own.items()
    }
    step, phi, pilots, masks, theirs = adam_step(student.optimizer, LGTM_PILOT_LR), dict(own), [], [], []
    for number, batch in enumerate(batches):
        logits = [read(t.eval(), batch) for t in teachers]
        masks.append(torch.get_rng_state())
        outputs = read(module, batch, phi)
        loss = distillation(outputs, logits, batch.labels)
        theirs += [own_loss(z, outputs, batch.labels) / len(batches) for z in logits]
        gradients = dict(zip(phi, torch.autograd.grad(loss, list(phi.values()), create_graph=True), strict=True))
        phi, moments = step(number, own, phi, gradients, moments)
        pilots.append(loss.detach())
    module.eval()
    q = sum(F.cross_entropy(read(module, b, phi), b.labels) for b in quizzes) / len(quizzes)
    for teacher in teachers:
        ps = [p for p in teacher.parameters() if p.requires_grad]
        for p, g in zip(ps, torch.autograd.grad(q + sum(theirs), ps, retain_graph=True), strict=True):
            p.grad = g
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    losses = {"pilot_loss": torch.stack(pilots).mean(), "quiz_loss": q.detach(),
              "teacher_loss": (sum(theirs) / len(teachers)).detach()}  # fmt: skip
    return losses, masks


@pytest.mark.parametrize("independent_masks", [False, True], ids=["the pilot's masks", "new masks"])
@pytest.mark.parametrize("strategy", ["exact", "double_backward"])
@pytest.mark.parametrize(("teachers", "size"), [(1, 1), (2, 1), (2, 2)])
def test_rounds_are_the_written_ones(teachers, size, strategy, independent_masks):
    """Teachers first, by the three terms; then the student, rewound, from the updated teachers."""
    setting = Setting("lgtm", teachers, 3, size, strategy, independent_masks=independent_masks)
    values, after = setting.run(), torch.get_rng_state()
    torch.manual_seed(7)
    copied, *others = setting.copies
    student = Adam(copied, LR, setting.student_steps, size)
    updates = [Adam(t, TEACHER_LR, setting.teacher_steps) for t in others]
    for number, (batches, value) in enumerate(zip(setting.batches, values, strict=True)):
        expected, masks = published_gradient(student, others, batches, quiz(number))
        for update in updates:
            update.step()
        masks = [None] * size if independent_masks else masks
        losses = [real_step(student, others, batch, None, mask) for batch, mask in zip(batches, masks, strict=True)]
        expected["loss"] = torch.stack(losses).mean()
        assert value.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(value[name], expected[name], rtol=1e-8, atol=0)
    for mine, theirs in zip([setting.student, *setting.teachers], setting.copies, strict=True):
        assert apart(mine, theirs) < 10 * TOLERANCE  # Adam's division twice: in the pilot too
    assert torch.equal(torch.get_rng_state(), after)


def test_finite_difference_as_a_strategy_has_the_own_losses_exactly():
    """The own losses do not depend on how the third term is had."""
    own = {}
    for strategy in ("exact", "finite_difference"):
        values = Setting("lgtm", 1, 1, strategy=strategy).run()
        own[strategy] = values[0]["teacher_loss"]
    assert torch.equal(*own.values())


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        MetaStep(torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], teacher_alpha=1.5)
    with pytest.raises(ValueError, match="leave teacher_alpha out"):
        MetaStep(torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], teacher_alpha=0.5, strategy=Reptile([{}]))


def test_what_it_sets_where_no_flag_does():
    config, source = cli.parse(["--method", "lgtm"]), ModelSource("bert", "bert", "embedded", "bert")
    resolve_defaults(config, source, [source])
    found = config.method
    assert (found.pilot_optimizer, found.alpha, found.temperature) == ("adamw", 1.0, 1.0)
