"""Writes the tiny model that ships for tests: `python tools/make_tiny_model.py`.

95 thousand random parameters of Qwen3 shape in float32, one token per byte. The same libraries give
the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from kvasir.engine.tiny import make_tiny

FOLDER = Path(__file__).parents[1] / "src" / "kvasir" / "models" / "tiny"
WEIGHT_BYTES_MAX = 400_000


def main() -> None:
    make_tiny(FOLDER, "qwen3")
    for file in sorted(FOLDER.iterdir()):
        print(f"{file.stat().st_size:>8,} B  {file.name}")
    size = (FOLDER / "model.safetensors").stat().st_size
    assert size <= WEIGHT_BYTES_MAX, f"{size} bytes of weights, limit {WEIGHT_BYTES_MAX}"


if __name__ == "__main__":
    main()
