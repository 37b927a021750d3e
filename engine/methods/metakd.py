"""Meta-KD (Pan et al., ACL 2021): a student of one domain, or of all, learns from a meta-teacher of several.

    first on features   L = mean_i w_i [attention_i + hidden_i + domain_i]      (engine.losses.objectives, `tinybert`)
    then on logits      L = T^2 KL(softmax(zbar / T) || softmax(z_S / T)), which is soft cross-entropy but for a constant

w_i is the meta-teacher's expertise on example i (engine.run.prototypes), its own for every example. What makes a teacher a
meta-teacher is its preparation (engine.methods.meta_teacher); the student's steps are then those of distillation from a frozen teacher.
"""

from __future__ import annotations

from engine.methods.kd import step

__all__ = ["step"]
