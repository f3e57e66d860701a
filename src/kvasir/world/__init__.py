"""Layer 4: worlds perform effects. `live` with sockets, processes and torch; `sim` on a heap.

They never import each other. What both need (the journal) stands beside them.
"""
