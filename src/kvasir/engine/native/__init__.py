"""Attention in C++, compiled on demand: `python -m kvasir.engine.native`. Knows tensors and block
tables; must not know models or requests. Without it the engine attends through torch.
"""
