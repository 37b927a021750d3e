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
    make_batch,
    quiz,
    read,
    real_step,
)
from run_helpers import metrics, sentences, succeed, summary, table

from engine.meta.meta_step import MetaStep
from engine.meta.reptile import Reptile

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


def influence(optimizer):
    """The engine's meta-gradient of a teacher behind one round, own loss left out; the state; batch and quizzes."""
    setting = Setting("lgtm", 1, rounds=2)
    setting.student.dropout.p = setting.teachers[0].dropout.p = 0.0
    setting.run()
    setting.student.norm.momentum = 0.0  # forwards leave its statistics alone
    (learner,) = setting.state.meta_step.learners
    step = MetaStep(setting.state.student, [learner], setting.state.objective,
                    pilot_lr=LGTM_PILOT_LR, pilot_optimizer=optimizer)  # fmt: skip
    batch, quizzes = make_batch(77, size=60), quiz(9)  # every word is in it: the direction is finite
    learner.network.flat.clear_gradients()
    step.meta_gradient([batch], quizzes)
    found = torch.cat([p.grad.flatten() for p in setting.teachers[0].parameters() if p.requires_grad])
    return found, setting, batch, quizzes


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_published_finite_difference_converges_to_it(optimizer):
    """Central differences of the teacher's gradient of the student's loss, along v for a plain step and along Adam's own
    direction for Adam's: the error falls with the square of the distance."""
    found, setting, batch, quizzes = influence(optimizer)
    module, teacher = setting.student.train(), setting.teachers[0]
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def loss(phi):
        return distillation(read(module, batch, phi), [read(teacher, batch)], batch.labels)

    gradients = torch.autograd.grad(loss(own), list(own.values()))
    g = {n: x.detach().requires_grad_() for n, x in zip(own, gradients, strict=True)}
    state = setting.state.student.optimizer.state
    moments = {n: (state[p]["exp_avg"].clone(), state[p]["exp_avg_sq"].clone()) for n, p in own.items()}
    if optimizer == "adamw":
        phi, _ = adam_step(setting.state.student.optimizer, LGTM_PILOT_LR)(0, own, own, g, moments)
    else:
        phi = {n: p - LGTM_PILOT_LR * g[n] for n, p in own.items()}
    phi = {n: p.detach().requires_grad_() for n, p in phi.items()} if optimizer == "sgd" else phi
    module.eval()
    q = sum(F.cross_entropy(read(module, b, phi), b.labels) for b in quizzes) / len(quizzes)
    if optimizer == "adamw":
        direction = torch.autograd.grad(q, list(g.values()))  # (d update / d g)^T v
    else:
        direction = [-LGTM_PILOT_LR * v for v in torch.autograd.grad(q, list(phi.values()))]
    module.train()
    norm = torch.cat([d.flatten() for d in direction]).norm()
    ps = [p for p in teacher.parameters() if p.requires_grad]

    def difference(distance):
        sides = []
        for r in (distance / norm, -distance / norm):
            moved = {n: p.detach() + r * d for (n, p), d in zip(own.items(), direction, strict=True)}
            sides.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss(moved), ps)]))
        return (sides[0] - sides[1]) / (2 * distance / norm)

    errors = [(difference(distance) - found).norm() / found.norm() for distance in (1e-1, 1e-2, 1e-3)]
    assert errors[0] < 0.2 and errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50, errors


def test_finite_difference_as_a_strategy_has_the_own_losses_exactly():
    """The own losses do not depend on how the third term is had."""
    own = {}
    for strategy in ("exact", "finite_difference"):
        values = Setting("lgtm", 1, 1, strategy=strategy).run()
        own[strategy] = values[0]["teacher_loss"]
    assert torch.equal(*own.values())


def test_parts_of_a_batch_add_up_to_it():
    found = []
    for size in (None, 4):
        setting = Setting("lgtm", 2, 1)
        for module in (setting.student, *setting.teachers):
            module.dropout.p = 0.0
        setting.student.norm = torch.nn.Identity()
        networks = setting.state.meta_step.problem.teachers
        step = setting.state.meta_step
        step.problem.micro_batch = size
        step.meta_gradient([make_batch(3, size=10)], quiz(0))
        found.append(torch.cat([n.flat.gradients.clone() for n in networks]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        MetaStep(torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], teacher_alpha=1.5)
    with pytest.raises(ValueError, match="leave teacher_alpha out"):
        MetaStep(torch.nn.Linear(2, 2), [torch.nn.Linear(2, 2)], teacher_alpha=0.5, strategy=Reptile([{}]))


def test_a_run_has_three_losses_and_they_fall(cache, tmp_path):
    data = table(tmp_path / "d.tsv", sentences(500))
    run = succeed(data, tmp_path / "run", method="lgtm", train_size=460, max_steps=100, prepare_epochs=3,
                  log_steps=10, eval_steps=1000)  # fmt: skip
    rows = [row for row in metrics(run) if row["phase"] == "lgtm" and "loss" in row]
    assert all({"loss", "pilot_loss", "quiz_loss", "teacher_loss"} <= row.keys() for row in rows)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"] and rows[-1]["teacher_loss"] < 0.9 * rows[0]["teacher_loss"], rows
    assert "pilot_optimizer: adamw" in (run / "config.yaml").read_text()
    assert summary(run)["method"] == "lgtm"
