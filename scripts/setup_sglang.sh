#!/usr/bin/env bash
# Make an environment with another version of SGLang: `.venv/sglang-VERSION`, for `make test-versions`.
#
#     scripts/setup_sglang.sh VERSION
#
# It has that SGLang of its own and everything else from `.venv`, which scripts/setup.sh makes first: the versions
# we support import the same packages on a CPU. With a GPU they do not, and nothing is made. Done once; it goes with
# `.venv`.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT VENV="$ROOT/.venv"

die() {
    printf 'setup_sglang.sh: %s\n' "$1" >&2
    exit 1
}

[[ $# == 1 && $1 =~ ^[0-9]+(\.[0-9]+)+$ ]] || die "usage: scripts/setup_sglang.sh VERSION, for example 0.5.22"
readonly VERSION=$1 ENVIRONMENT="$VENV/sglang-$1"
[[ -f $VENV/.setup-stamp ]] || die "there is no environment yet: run scripts/setup.sh first"
[[ $(<"$VENV/.setup-base") == cpu\ * ]] ||
    die "on a GPU SGLang's versions want kernels of their own: make an environment with sglang==$VERSION there"
if "$ENVIRONMENT/bin/python" -c 'import sys; from importlib.metadata import version
sys.exit(version("sglang") != sys.argv[1])' "$VERSION" 2>/dev/null; then
    exit 0
fi

echo "SGLang $VERSION in ${ENVIRONMENT#"$ROOT"/}"
rm -rf "$ENVIRONMENT"
"$VENV/bin/python" -m venv --without-pip "$ENVIRONMENT"
of_all=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$ENVIRONMENT/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Behind its own packages, and with what their .pth files do.
echo "import site; site.addsitedir('$of_all')" >"$own/packages_of_all_versions.pth"
"$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile --no-deps \
    --progress-bar off --quiet --target "$own" "sglang==$VERSION"
# Also writes the bytecode of what a start of a server imports.
env -u PYTHONDONTWRITEBYTECODE "$ENVIRONMENT/bin/python" -W ignore -c '
import sglang, sglang.launch_server, sglang.srt.managers.scheduler, sglang.srt.models.registry
import sys; assert sglang.__version__ == sys.argv[1], sglang.__file__' "$VERSION" >"$ENVIRONMENT/import.log" 2>&1 ||
    die "it does not import: $(tail -n 3 "$ENVIRONMENT/import.log")"
