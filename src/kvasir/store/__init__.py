"""Where blocks are kept outside of the device: host memory, local files.

A tier is four methods (`store.base.Shelves`); a cluster's store would be one more class. Knows
slots, keys and bytes; must not know planes, requests, or which block is worth keeping.
"""
