"""The network: where instances stand, which links they share, what a transfer will take."""
