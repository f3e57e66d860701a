"""Tensor parallel: the layers of one model on several ranks (Megatron-LM, arXiv 1909.08053).

Rank 0 is the runner in the worker's own process. The others are processes that it starts: they know
layers and a cache, no requests, no tokens and no files.
"""
