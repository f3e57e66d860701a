"""The live world: effects performed with sockets, threads, processes' clocks and a real runner.

Runs the very nodes that the simulator runs.
"""
