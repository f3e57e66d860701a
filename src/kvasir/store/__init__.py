"""Where blocks are kept outside of the device: host memory, local files, a store of the cluster.

A tier is four methods (`store.base.Shelves`); of a store, `store.cluster` wants four others. Knows
slots, keys and bytes; must not know planes, requests, or which block is worth keeping.
"""
