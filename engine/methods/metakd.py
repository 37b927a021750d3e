"""Meta-KD (Pan et al., ACL 2021): a student of one domain, or of all, learns from a meta-teacher of several.

    first on features   L = mean_i w_i [attention_i + hidden_i + domain_i]      (engine.losses.objectives, `tinybert`)
    then on logits      L = T^2 KL(softmax(zbar / T) || softmax(z_S / T)), which is soft cross-entropy but for a constant

w_i is the meta-teacher's expertise on example i (engine.run.prototypes), its own for every example. What makes a teacher a
meta-teacher is its preparation (engine.methods.common.meta_teacher); the student's steps are then those of distillation from a frozen teacher.
"""

from __future__ import annotations

from engine.methods import Method
from engine.methods.kd import step

METHOD = Method(
    step=step,
    help="by frozen meta-teachers of several domains",
    teachers="frozen",
    meta_teachers=True,
    defaults={"temperature": 2.0, "alpha": 1.0, "feature_loss": "tinybert", "feature_epochs": "--epochs",
              "prepare_method": "meta"},
    title="Meta-KD",
    report="One meta-teacher was trained on several domains. The student learns its inner states first, then its logits; each "
    "example is weighted by the teacher's expertise on it.",
)  # fmt: skip
