"""The embedded engine on an accelerator: kernels, graphs of decode steps, draws on the device.

Knows tensors, block tables and devices; must not know requests' texts, schedulers or transports.
"""
