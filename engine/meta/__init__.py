"""The meta-step for any modules: pilot, quiz, meta-gradient into every teacher, rewind, real step.

    meta_step.py         one round, from batches and quizzes to every optimizer's step
    strategies/          how the quiz loss moves the teachers, one file a strategy
    walk_back.py, passes.py, forward_mode.py, problem.py      what strategies are made of
    pilots/              the student's trial step and its derivative, one file a rule
    tape.py, tape_rules.py      the pilot's forward lent to the forward-mode pass
    time_machine.py      snapshots of the student, and the way back to them
    reptile.py           teachers that follow the student's weights instead
    micro_batches.py     a batch in parts whose gradients add up

Imports losses, kernels, models, params and what stands below them. Another strategy or pilot rule is one file in its folder.
"""
