"""Layer 6: HTTP in front of a `Desk`. Knows OpenAI's protocol and text; no worker, no schedule."""
