"""Neighborhood attention: every position of a map attends to the k x k positions around it."""

from vision_kernels.neighborhood_attention.op import neighborhood_attention

__all__ = ["neighborhood_attention"]
