#!/bin/sh
# Installs the simulators that bench/sim.py --peers compares with, each into an environment of its
# own under .peers. DynoSim is part of NVIDIA Dynamo (Apache-2.0). Its declared dependencies include
# a Kubernetes client and transformers, which a replay never imports, so only what it does import
# goes in. Later versions renamed the replay's arguments: bench/dynosim.py is written for 1.2.1.
#
#   sh bench/peers.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3.11}
home=.peers/dynosim
"$python" -m venv "$home"
"$home/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    ai-dynamo==1.2.1 ai-dynamo-runtime==1.2.1 \
    pydantic==2.13.0 pydantic-core==2.46.0 annotated-types==0.8.0 typing-extensions==4.16.0 \
    typing-inspection==0.4.5 msgspec==0.22.0 uvloop==0.23.0
"$home/bin/python" -c 'import dynamo.replay; print("DynoSim 1.2.1 is ready in .peers/dynosim")'
