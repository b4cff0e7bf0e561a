#!/usr/bin/env bash
# The main job on a Cloud TPU slice: the same two commands on every worker, which JAX then joins by itself.
#
#   TPU=my-v5e-256 ZONE=us-west4-a NFS=10.0.0.2:/share bash launch/tpu_pod.sh
#   TPU=... ZONE=... NFS=... bash launch/tpu_pod.sh --config.seed=1       # more arguments go to stare_jax.main
#
# PYTHON, STARE_TORCH_INDEX (both of launch/setup.sh) and MS_ASSET_DIR (the simulators' assets) are handed to the workers.
#
# From your own machine, with the gcloud command. The run belongs to the workers: this only shows what they print, and may
# be ended (Ctrl-C, a laptop that sleeps). Running it again shows it again where the run is still going on; otherwise it
# brings the workers to the same commit, sets up what is missing and continues the run. How to stop it, and what the
# workers' image needs: docs/launching.md.
set -euo pipefail

# --- fill in ---
: "${TPU:?the name of the TPU VM, such as my-v5e-256}"
: "${ZONE:?its zone, such as us-west4-a}"
: "${NFS:?a network folder for the run, which every worker mounts: HOST:/FOLDER, such as a Filestore share}"
: "${REPOSITORY:=$(git -C "$(dirname "${BASH_SOURCE[0]}")" remote get-url origin)}"    # that the workers can clone
: "${COMMIT:=$(git -C "$(dirname "${BASH_SOURCE[0]}")" rev-parse HEAD)}"               # pushed there
: "${CONFIG:=configs/ipi.py}"
: "${RUN:=pod}"                     # the run's folder on the share
: "${MOUNT:=/mnt/stare_jax}"        # where the workers mount the share
# ---------------

# What every worker does; values are quoted here (%q), so that nothing is expanded twice. The run holds the lock through
# descriptor 9 for as long as it lives, however it ends; the shell that waits for it has let go by then.
quoted() { printf '%q ' "$@"; }
passed=""
for name in PYTHON STARE_TORCH_INDEX MS_ASSET_DIR; do
  [[ -z "${!name:-}" ]] || passed+="export $name=$(quoted "${!name}")"$'\n'
done
REMOTE="set -euo pipefail
${passed}run=$(quoted "$MOUNT/$RUN")
share=$(quoted "$MOUNT")
exec 9>~/stare_jax.lock
if flock -n 9; then
  rm -f ~/stare_jax.pid
  sudo mkdir -p \"\$share\"
  mountpoint -q \"\$share\" || sudo mount -t nfs $(quoted "$NFS") \"\$share\"
  sudo install -d -o \"\$(id -u)\" \"\$run\"
  [ -d ~/stare_jax/.git ] || git clone --quiet $(quoted "$REPOSITORY") ~/stare_jax
  cd ~/stare_jax
  git fetch --quiet origin
  git checkout --quiet --detach $(quoted "$COMMIT")
  STARE_ACCELERATOR=tpu bash launch/setup.sh --no-rendering
  .venv/bin/python launch/rendering.py --check || sudo .venv/bin/python launch/rendering.py
  log=\"\$run/worker-\$(hostname).log\"
  ln -sfn \"\$log\" ~/stare_jax.log
  echo \"\$(date) $(quoted "$COMMIT")\" >>\"\$log\"
  from=\$((\$(wc -c <\"\$log\") + 1))
  setsid nohup .venv/bin/python -m stare_jax.main --distributed=auto \
    $(quoted --config="$CONFIG" --workdir="$MOUNT/$RUN" "$@") </dev/null >>\"\$log\" 2>&1 &
  pid=\$!
  echo \"\$pid\" >~/stare_jax.pid
  exec 9>&-
  tail -c +\"\$from\" --pid=\"\$pid\" -f \"\$log\" || true
  status=0
  wait \"\$pid\" || status=\$?
  exit \"\$status\"
fi
exec 9>&-
if ! [ -s ~/stare_jax.pid ]; then
  echo \"\$(hostname): a run is being set up here; start this again in some minutes to see what it prints\" >&2
  exit 1
fi
echo \"\$(hostname): a run is going on here (\$(readlink ~/stare_jax.log)); nothing was started, this is what it prints\"
exec tail -n 20 --pid=\"\$(cat ~/stare_jax.pid)\" -f ~/stare_jax.log"

exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$REMOTE"
