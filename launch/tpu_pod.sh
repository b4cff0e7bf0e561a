#!/usr/bin/env bash
# The main job on a Cloud TPU slice: the same two commands on every worker, which JAX then joins by itself.
#
#   TPU=my-v5e-256 ZONE=us-west4-a NFS=10.0.0.2:/share bash launch/tpu_pod.sh
#   TPU=... ZONE=... NFS=... bash launch/tpu_pod.sh --config.seed=1       # more arguments go to stare_jax.main
#
# From your own machine, with the gcloud command. Running it again brings the workers to the same commit, sets up what is
# missing and continues the run. How to stop it, and what the workers' image needs: docs/launching.md.
set -euo pipefail

# --- fill in ---
: "${TPU:?the name of the TPU VM, such as my-v5e-256}"
: "${ZONE:?its zone, such as us-west4-a}"
: "${NFS:?a network folder for the run, which every worker mounts: HOST:/FOLDER, such as a Filestore share}"
: "${REPOSITORY:=$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin)}"    # that the workers can clone
: "${COMMIT:=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse HEAD)}"               # pushed there
: "${CONFIG:=configs/ipi.py}"
: "${RUN:=pod}"                     # the run's folder on the share
# ---------------

# What every worker does; values are quoted here (%q), so that nothing is expanded twice.
quoted() { printf '%q ' "$@"; }
REMOTE="set -euo pipefail
sudo mkdir -p /mnt/stare_jax
mountpoint -q /mnt/stare_jax || sudo mount -t nfs $(quoted "$NFS") /mnt/stare_jax
sudo install -d -o \"\$(id -u)\" /mnt/stare_jax/$(quoted "$RUN")
[ -d ~/stare_jax/.git ] || git clone --quiet $(quoted "$REPOSITORY") ~/stare_jax
cd ~/stare_jax
git fetch --quiet origin
git checkout --quiet --detach $(quoted "$COMMIT")
STARE_ACCELERATOR=tpu bash launch/setup.sh --no-rendering
.venv/bin/python launch/rendering.py --check || sudo .venv/bin/python launch/rendering.py
exec .venv/bin/python -m stare_jax.main --distributed=auto $(quoted --config="$CONFIG" --workdir="/mnt/stare_jax/$RUN" "$@")"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$REMOTE"
