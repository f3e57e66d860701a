"""Layer 5: binds nodes to a world and launches processes. The only place that spawns tasks."""
