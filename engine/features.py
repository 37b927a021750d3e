"""Which inner layers of teacher and student a feature loss matches (Patient KD, Sun et al. 2019)."""

from __future__ import annotations

from engine.errors import UserError


def layers_to_match(student: int, teacher: int, how: str) -> tuple[list[int], list[int]]:
    """Hidden-state numbers (0 is the embedding's output) of a student and a teacher of so many layers, pair by pair.

    The embedding's output and the last layer are left out. `skip`: student layer i and teacher layer i * teacher / student,
    rounded down; `last`: i and teacher - student + i. Raises UserError where the student has no inner layer, or more
    layers than its teacher.
    """
    if student < 2 or teacher < student:
        raise UserError(
            f"--feature-loss patient matches inner layers, but the student has {student} layers and a teacher {teacher}; "
            "the student needs at least two, and no more than the teacher. Use --feature-loss none.")  # fmt: skip
    inner = list(range(1, student))
    if how == "skip":
        return inner, [i * teacher // student for i in inner]
    return inner, [teacher - student + i for i in inner]
