"""The losses of students and teachers: the loss head, the teachers' weights, the layers that are compared, the domain head.

Imports kernels, models, params and what stands below them. Another divergence for the soft loss is one file in `divergences/`;
another part of the loss is a term of `objectives.py`.
"""
