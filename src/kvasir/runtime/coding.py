"""How fast this machine codes a model's KV, measured when a worker starts.

Knows the codec and the clock. Sizes are not measured here, as made-up KV says nothing of them: they
are known from a model's KV at first (cost/codec.py) and then from what was sent.
"""

from __future__ import annotations

import time

import numpy as np

from kvasir.core.codec import Offer
from kvasir.core.specs import Deployment
from kvasir.cost.codec import KNOWN
from kvasir.engine.base import RunnerSpec
from kvasir.policy.codec import allowed
from kvasir.transfer.codec import Chunk, Tensor, fastest_kernels
from kvasir.transfer.codec.floats import bytes_of
from kvasir.transfer.codec.offers import CODINGS, measure, offers_of
from kvasir.world.live.worker import kv_form

TOKENS = 256
VALUES = 1 << 19  # of the chunk that is timed, about: some milliseconds a form


def offers_here(deployment: Deployment, spec: RunnerSpec) -> tuple[Offer, ...]:
    """The ways that the deployment allows; none when it codes nothing. Takes less than a second,
    and some more when kernels are compiled for the first time. Raises ConfigError for KV that has
    no coded form, UnsupportedEffect when a library is missing."""
    codec = deployment.transport.codec
    if codec.kind == "off":
        return ()
    every = [Offer(name, known.loss) for name, known in KNOWN.items()]
    wanted = {offer.name for offer in allowed(every, codec.kind, codec.level_max)}
    codings = [coding for coding in CODINGS if str(coding) in wanted]
    chunk = made_up(spec)
    rates = measure(chunk, codings, fastest_kernels(), time.perf_counter, repeats=2)
    return offers_of(rates, dtype=chunk.dtype)


def made_up(spec: RunnerSpec) -> Chunk:
    """KV of the model's shape with made-up values: as many of its first layers as there is room for
    here."""
    dtype = kv_form(spec).dtype
    rng, tensors = np.random.default_rng(0), list[Tensor]()
    for index, layer in enumerate(spec.layers):
        for plane in range(2 if layer.kind == "kv" else 1):
            shape = (TOKENS, layer.kv_heads * layer.head_dim)
            values = rng.normal(0, 1, shape).astype(np.float32)
            tensors.append(Tensor(index, plane, bytes_of(values, dtype)))
        if sum(tensor.data.size for tensor in tensors) >= 2 * VALUES:
            break
    return Chunk(dtype, len(spec.layers), tensors)
