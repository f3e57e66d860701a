"""The embedded engine: runs a model over paged KV. Knows steps and blocks, never nodes or queues.

`base` is the contract, `torch_runner` computes with a real model, `fake` with a hash.
"""
