"""Layer 3: what was measured, summed up and printed. One table for simulate, bench and compare.

Nothing here knows a node or a world; outcomes come in as plain records.
"""
