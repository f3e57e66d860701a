"""Layer 1: bookkeeping of KV blocks. Knows ids and keys, never bytes, clocks or transfers."""
