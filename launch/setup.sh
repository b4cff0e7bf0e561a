#!/usr/bin/env bash
# Sets up this checkout: .venv with the pinned packages, and a Vulkan device to render with. Idempotent; the second time
# it only compares two stamps. Called by every make target.
#
#   bash launch/setup.sh                    everything
#   bash launch/setup.sh --no-rendering     packages only (a machine that will never simulate)
#
# Environment:
#   STARE_ACCELERATOR   what the learner runs on: cpu (the default), cuda12, cuda13 (drivers from 580 on) or tpu. Installs
#                       JAX's plugin of the pinned version. Once given it stays, until another one is given.
#   PYTHON              the interpreter to build .venv from; otherwise python3.11, python3.12 or a fitting python3
#   STARE_TORCH_INDEX   a package index to take torch from. Torch only runs inside the simulator workers, so the CPU build is
#                       enough. Where pip's own index has nothing but the CUDA build for Linux (some gigabytes more to
#                       download, otherwise harmless), point this at the CPU index that PyTorch's install page names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/stare_jax_requirements
CHOICE=$VENV/stare_jax_accelerator
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' >/dev/null 2>&1; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.11 python3.12 python3 python; fi
  for candidate in "$@"; do
    if supported "$candidate"; then echo "$candidate"; return; fi
  done
  if [ -n "${PYTHON:-}" ]; then die "PYTHON=$PYTHON is not a working Python 3.11 or 3.12; unset it or name one"; fi
  die "no Python 3.11 or 3.12 found; install one (Debian 12: apt-get install python3.11-venv) or set PYTHON=/path/to/python3.11"
}

make_venv() {
  local python=$1 version
  say "creating $VENV with $("$python" --version)"
  if "$python" -m venv --clear "$VENV" >"${TMPDIR:-/tmp}/stare_jax_venv.$$" 2>&1; then
    rm -f "${TMPDIR:-/tmp}/stare_jax_venv.$$"
    return
  fi
  cat "${TMPDIR:-/tmp}/stare_jax_venv.$$" >&2
  rm -f "${TMPDIR:-/tmp}/stare_jax_venv.$$"
  # Debian and Ubuntu split venv off from the interpreter.
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    die "Python $version cannot create virtual environments; install its venv module (Debian/Ubuntu: apt-get install python$version-venv)"
  fi
  say "installing python$version-venv"
  apt-get -qq update || say "apt-get update complained, going on"
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "python$version-venv" </dev/null >/dev/null
  "$python" -m venv --clear "$VENV"
}

# The accelerator asked for, else the one this environment was made for.
accelerator() {
  local wanted=${STARE_ACCELERATOR:-$(cat "$CHOICE" 2>/dev/null || echo cpu)}
  case "$wanted" in
    cpu | cuda12 | cuda13 | tpu) echo "$wanted" ;;
    *) die "STARE_ACCELERATOR=$wanted is unknown; expected cpu, cuda12, cuda13 or tpu" ;;
  esac
}

# The stamp: what is installed follows from this script, the requirements and the interpreter.
wanted() { { cat requirements.txt launch/setup.sh; "$VENV/bin/python" --version; accelerator; } | sha256sum; }

install_packages() {
  local plugin; plugin=$(accelerator)
  if [ "$(cat "$STAMP" 2>/dev/null)" = "$(wanted)" ]; then return; fi
  rm -f "$STAMP"
  local torch; torch=$(grep -oE '^torch==[^ ]+' requirements.txt)
  say "installing the packages of requirements.txt (minutes the first time)"
  # -qq: errors only, as pip warns once per package about anything odd in the machine's own index settings.
  # Torch first, and without its dependencies (they are pinned like everything else), so that the build chosen here stays.
  if [ -n "${STARE_TORCH_INDEX:-}" ]; then
    "$VENV/bin/pip" install -qq --no-deps --index-url "$STARE_TORCH_INDEX" "$torch"
  else
    "$VENV/bin/pip" install -qq --no-deps "$torch"
    if "$VENV/bin/python" -c 'import importlib.metadata as m, sys; sys.exit(not any("nvidia" in r for r in m.requires("torch")))'; then
      say "note: pip's index gave the CUDA build of torch, which brings gigabytes along; STARE_TORCH_INDEX can name a CPU index (see launch/setup.sh)"
    fi
  fi
  # The extra takes its version from the pin: the plugin of a JAX version is published with it.
  local extra=(); if [ "$plugin" != cpu ]; then extra=("jax[$plugin]"); fi
  "$VENV/bin/pip" install -qq --prefer-binary -r requirements.txt ${extra[@]+"${extra[@]}"}
  "$VENV/bin/pip" check >/dev/null || { "$VENV/bin/pip" check >&2 || true; die "the installed packages do not fit together; remove $VENV and run this again"; }
  echo "$plugin" >"$CHOICE"
  wanted >"$STAMP"
}

main() {
  accelerator >/dev/null  # a wrong one is answered before anything is made
  if ! supported "$VENV/bin/python" || ! [ -x "$VENV/bin/pip" ]; then
    local python; python=$(find_python)
    make_venv "$python"
  fi
  install_packages
  if [ "${1:-}" != --no-rendering ]; then "$VENV/bin/python" launch/rendering.py; fi
}

main "$@"
