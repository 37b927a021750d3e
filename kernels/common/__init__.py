"""What the ops share, and none of them alone: which implementation serves a device, checks, plumbing of autograd, Triton.

Imports nothing but torch, triton and this folder. The ops are the folders beside it.
"""
