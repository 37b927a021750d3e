"""LGTM (Ren et al., "Tailoring instructions to student's learning levels boosts knowledge distillation", ACL 2023).

A round is MetaDistil's, with two differences: the pilot step is AdamW's, from the moments of the student's own optimizer,
and each teacher follows its own loss beside the quiz loss q,

    theta_k.grad = d/dtheta_k [ a T^2 KL(p_T(z_S) || p_T(z_k)) + (1 - a) CE(z_k, y) + q(phi') ],    a = --teacher-alpha

with z_S the student's logits in the pilot, a constant here. The last term, every example's influence on q by way of its soft
labels, is the meta-gradient, exact and through AdamW (engine.meta.pilots.adamw), so that --pilot-lr is its scale. With several teachers
the student learns from the mean of their logits, and each has an own loss.

The published code (twinkle0331/LGTM) replaces the last term by -eta (grad_theta l(phi + r v) - grad_theta l(phi - r v)) / 2r
with v = grad q(phi'), r = 0.01 / |v|, eta the teacher's learning rate and l the teacher's own loss: a step of plain SGD is
differentiated where AdamW's was taken, and of another loss than the student's. Teachers are in eval mode here (one forward
serves both terms, and they teach in it), there in train mode for their own loss; the quiz is without dropout, there with it.
T^2, which the published temperature of 1 hides, is the soft loss's of every method.
"""

from __future__ import annotations

from engine.methods import Method
from engine.methods.metadistil import step  # what differs is the meta-step's settings: `teacher_alpha` and its pilot

METHOD = Method(
    step=step,
    help="by teachers that learn to teach, and also learn the task and from the student",
    teachers="learning",
    learn_from="quiz",
    own_loss=True,
    defaults={"temperature": 1.0, "alpha": 1.0, "pilot_optimizer": "adamw"},
    title="LGTM",
    report="As in MetaDistil the quiz loss flows back into every teacher, here through an AdamW pilot step, and teachers also keep "
    "learning the task and from the student.",
)
