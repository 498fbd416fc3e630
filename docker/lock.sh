#!/bin/sh
# Write docker/requirements*.txt anew from setup.py and constraints.txt: every file that a build may download, by its
# hash. Needs uv (`pip install uv`). Options, such as `--find-links FOLDER`, replace the index of torch's CPU builds.
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- --index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match

lock() { # NAME OPTIONS: what is read from standard input and from the options' files, for Python 3.11 and later
    name=$1
    shift
    uv pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate --constraint constraints.txt \
        --custom-compile-command docker/lock.sh --output-file "docker/$name.txt" "$@"
}

without_torch=$(mktemp)
trap 'rm -f "$without_torch"' EXIT
echo torch > "$without_torch"

printf 'pip\nsetuptools\nwheel\n' | lock requirements-build --universal -
# DeepSpeed asks for the second where it is built for CUDA.
printf 'torch\nnvidia-ml-py\n' | lock requirements-torch-cuda --universal -
# Linux alone: elsewhere torch's builds have other names.
echo torch | lock requirements-torch-cpu --python-platform linux "$@" -
lock requirements --universal --excludes "$without_torch" setup.py \
    --extra hf --extra tensorboard --extra data --extra clean --extra sweep --extra trafilatura
