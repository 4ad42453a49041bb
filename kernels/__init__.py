"""Kernels: one function per operation, one signature, several implementations.

They know nothing of `sparse_lm`: arrays and functions in, arrays out.
"""
