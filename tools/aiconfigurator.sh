#!/bin/sh
# Installs AIConfigurator into an environment of its own, for bench/ask_aiconfigurator.py.
#   tools/aiconfigurator.sh VENV
# 850 MB. It pins its own numpy and pandas, which Kvasir's environment must not be bent to.
set -eu
venv=${1:?usage: tools/aiconfigurator.sh VENV}
python3.11 -m venv "$venv"
"$venv/bin/pip" install --quiet aiconfigurator==0.12.0
"$venv/bin/python" -c "import aiconfigurator.cli.api"
echo "$venv/bin/python bench/ask_aiconfigurator.py FILE"
