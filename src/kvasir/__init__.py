"""Kvasir: LLM serving with prefill and decode apart; one scheduler, live and simulated."""

__version__ = "0.1.0"
