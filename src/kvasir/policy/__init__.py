"""Layer 1: decisions. Each is `decide(view, memory) -> (decision, memory)`: pure, timeless, seeded.

A view is a read-only window, valid during the call; memory is a small frozen value that the node
keeps. Policies stand in dicts by name: adding one is one function, one test, one line.
"""
