"""What students and teachers are trained by: the loss head, teacher weights, which layers are compared.

Imports kernels, models, params and what stands below them. Another loss is one file here.
"""
