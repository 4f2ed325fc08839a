"""Kernels: the arithmetic of the codecs, one module a backend."""
