#!/usr/bin/env bash
# The main job on one machine with one or more GPUs, in one process.
#
#   bash launch/one_gpu.sh                                   # configs/ipi.py
#   CONFIG=configs/ipi.py:openvla_7b_lora bash launch/one_gpu.sh --config.policy.checkpoint=FOLDER    # 80 GB
#
# Running it again continues the run. More arguments go to stare_jax.main.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# --- fill in ---
: "${CONFIG:=configs/ipi.py}"
: "${WORKDIR:=}"                    # the run folder; empty: runs/<task>-<preset>-seed<seed>
# What set-up was told before, or cuda13; drivers before 580 want cuda12 (`nvidia-smi` names the driver).
: "${STARE_ACCELERATOR:=$(grep -hs ^cuda .venv/stare_jax_accelerator || echo cuda13)}"
: "${CUDA_VISIBLE_DEVICES:=0}"      # 0,1,... for more GPUs: config.mesh spreads over all that are visible
# ---------------

# Of the GPU's memory for the learner; JAX's own share is three quarters, which is too little for 7B on 80 GB. A simulator
# that draws on the same GPU needs the rest.
if [[ "$CONFIG" == *7b* && -z "${XLA_CLIENT_MEM_FRACTION:-}" ]]; then
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
fi

export STARE_ACCELERATOR CUDA_VISIBLE_DEVICES
bash launch/setup.sh

exec .venv/bin/python -m stare_jax.main --config="$CONFIG" ${WORKDIR:+--workdir="$WORKDIR"} "$@"
