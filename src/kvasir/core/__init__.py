"""Layer 0: frozen types that every other layer speaks. Knows no policy, no clock, no I/O."""
