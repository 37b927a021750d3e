"""What several ops share: which implementation serves a device, checks of inputs, the plumbing of autograd and of Triton.

Imports nothing but torch, triton and this folder. The ops are the folders beside it.
"""
