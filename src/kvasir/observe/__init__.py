"""Layer 3: what happened, for people and tools. Knows core's events; decides nothing."""
