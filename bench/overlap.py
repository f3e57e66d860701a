"""What streaming KV away adds to prefill: TTFT with prefill and decode apart, beside one worker.

    python -m bench.overlap [--model demo] [--tokens 1008] [--repeats 15] [--transport shm]

Two idle servers, `--prefill 1 --decode 1` and `--mixed 1`, answer prompts of random tokens in
turns, one at a time, each prompt a new one. Under `first_token: prefill` the hand-over delays the
second token, not the first: what TTFT shows is what the transfer takes from the prefill that runs
beside it. Medians, and the median of the differences pair by pair; the last line is JSON. Goal: at
most 5 % more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

START_S = 120.0
IDS = range(10, 250)  # plain tokens in any vocabulary here


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[str]:
    """A server's address, while it runs."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "kvasir", "serve", *flags, "--port", str(port)],
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{url}/health", server)
        yield url
    finally:
        server.terminate()
        server.wait(START_S)


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.2)
    raise TimeoutError(url)


def ttft_s(url: str, model: str, prompt: list[int]) -> float:
    """Seconds to the first token of a stream."""
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "stream": True, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        first = answer.readline()
        found = time.perf_counter() - start
        assert first.startswith(b"data: "), first
        answer.read()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=1008, help="of a prompt")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--transport", default="shm")
    given = parser.parse_args()
    dice, served = random.Random(5), Path(given.model).name
    times: dict[str, list[float]] = {"apart": [], "together": []}
    apart_flags = ("--prefill", "1", "--decode", "1", "--transport", given.transport)
    with (
        serving(given.model, *apart_flags) as apart,
        serving(given.model, "--mixed", "1") as together,
    ):
        for turn in range(given.repeats + 2):
            for name, url in (("apart", apart), ("together", together)):
                prompt = dice.choices(IDS, k=given.tokens)
                found = ttft_s(url, served, prompt)
                if turn > 1:  # the first ones warm up
                    times[name].append(found)
    medians = {name: statistics.median(values) for name, values in times.items()}
    pairs = [a / b - 1 for a, b in zip(times["apart"], times["together"], strict=True)]
    for name, values in times.items():
        spread = f"({min(values) * 1e3:.1f} to {max(values) * 1e3:.1f})"
        print(f"{name:9s} TTFT {medians[name] * 1e3:8.1f} ms {spread}")
    print(f"apart takes {statistics.median(pairs):+.1%} (median of pairs; goal: at most 5 %)")
    print(json.dumps({
        "bench": "overlap", "model": given.model, "tokens": given.tokens, "ttft_s": medians,
        "added": statistics.median(pairs), "transport": given.transport,
        "load": os.getloadavg()[0], "repeats": given.repeats,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
