"""Knowledge distillation in which the teacher learns to teach."""

__version__ = "0.1.0"
