"""Layer 3: what arrives. Reads and generates request traces; knows lengths and block ids, no text.

Nothing here knows a worker or a clock: `at_s` counts from the start of the trace.
"""
