"""The simulated world: virtual time on a heap, a cost model for steps, a network that contends.

Runs the very nodes that serve. Deterministic: same inputs, same bytes out.
"""
