#!/usr/bin/env bash
# Checks and times qrm on a machine with an NVIDIA GPU, in a bare copy of the repository.
#
#   bash benchmarks/device.sh prepare [--tokenizer=DIR] [--pairs=FILE.jsonl[.gz]]
#       where there is a network: fills .device/, which git ignores and which must travel along
#   bash benchmarks/device.sh [--minutes=8.5] [--output=DIR] [--shape=gpt2-small]
#       on the machine: needs no network, and prints a Markdown table last
#
# The machine has Python 3.12 with JAX for CUDA, flax, optax, orbax-checkpoint, transformers, torch
# and accelerate; what else qrm and TRL need is carried. Results go to --output, to $OUT or to
# .device/out: device.json, device.md and device.log. $PYTHON names another Python.
set -euo pipefail
from="$PWD"  # paths are given from here
cd "$(dirname "${BASH_SOURCE[0]}")/.."

WHEELS=(ml_collections==1.1.0 datasets==5.2.0 trl==1.16.0 dill==0.4.1 multiprocess==0.70.19
        xxhash==4.1.0)
MOST_MIB=48
python="${PYTHON:-python3}"

fail() {
  echo "error: $*; see the first lines of benchmarks/device.sh" >&2
  exit 2
}

absolute() {  # a path that was given from the folder of the caller
  case "$1" in /*) echo "$1" ;; *) echo "$from/$1" ;; esac
}

prepare() {
  local tokenizer='' pairs='' argument wheel name size
  for argument in "$@"; do
    case "$argument" in
      --tokenizer=?*) tokenizer="$(absolute "${argument#*=}")" ;;
      --pairs=?*) pairs="$(absolute "${argument#*=}")" ;;
      *) fail "prepare: unknown argument '$argument'" ;;
    esac
  done
  [[ -z $tokenizer || -d $tokenizer ]] || fail "--tokenizer=$tokenizer: no such folder"
  [[ -z $pairs || $pairs == *.jsonl || $pairs == *.jsonl.gz ]] ||
    fail "--pairs=$pairs: expected a .jsonl or .jsonl.gz file"
  [[ -z $pairs || -f $pairs ]] || fail "--pairs=$pairs: no such file"
  mkdir -p .device/wheels
  for wheel in "${WHEELS[@]}"; do
    name="${wheel%%==*}"
    compgen -G ".device/wheels/$name-${wheel##*==}-*.whl" > /dev/null && continue
    rm -f ".device/wheels/$name"-*.whl  # two versions of one package stop an installation
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
      --only-binary=:all: --implementation cp --python-version 3.12 \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 --dest .device/wheels "$wheel"
  done
  if [[ -n $tokenizer ]]; then
    rm -rf .device/tokenizer
    mkdir .device/tokenizer
    cp "$tokenizer"/* .device/tokenizer/
  fi
  case "$pairs" in
    *.gz) gunzip --stdout "$pairs" > .device/pairs.jsonl ;;
    *.jsonl) cp "$pairs" .device/pairs.jsonl ;;
  esac
  size="$(du -sm .device | cut -f 1)"
  ls -R .device
  echo ".device: $size MiB"
  (( size <= MOST_MIB )) || fail ".device has $size MiB, expected at most $MOST_MIB"
}

measure() {
  local output="${OUT:-$PWD/.device/out}" options=() argument missing=()
  for argument in "$@"; do
    case "$argument" in
      --output=?*) output="$(absolute "${argument#*=}")" ;;
      --minutes=* | --shape=*) options+=("$argument") ;;
      *) fail "unknown argument '$argument'" ;;
    esac
  done
  command -v "$python" > /dev/null || fail "PYTHON=$python: no such program"
  [[ ! -e $output || -d $output ]] || fail "--output=$output: expected a folder"
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  if compgen -G '.device/wheels/*.whl' > /dev/null; then
    # Only what the machine lacks, as PYTHONPATH comes before its own packages.
    mapfile -t missing < <("$python" - .device/wheels/*.whl <<'PYTHON'
import importlib.metadata, os, sys
for wheel in sys.argv[1:]:
    try:
        importlib.metadata.version(os.path.basename(wheel).split('-')[0])
    except importlib.metadata.PackageNotFoundError:
        print(wheel)
PYTHON
    )
  fi
  if (( ${#missing[@]} )); then
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
      --no-cache-dir --target "$site" "${missing[@]}" ||
      echo 'note: the carried wheels could not be installed' >&2
  fi
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
  export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2 XLA_CLIENT_MEM_FRACTION=.9
  export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
  # A card that JAX cannot use is an error, not a reason to go on without it.
  command -v nvidia-smi > /dev/null && export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"
  unset XLA_PYTHON_CLIENT_MEM_FRACTION  # the older name, which may not be set beside the other
  "$python" -m benchmarks.device --spent="$SECONDS" --output="$output" "${options[@]}"
}

if [[ ${1-} == --help || ${1-} == -h ]]; then
  sed -n '2,/^set /{/^#/p}' benchmarks/device.sh | cut -c 3-
elif [[ ${1-} == prepare ]]; then
  prepare "${@:2}"
else
  measure "$@"
fi
