#!/usr/bin/env bash
# Make the development environment: `.venv` with the real SGLang and this project in it.
#
#     scripts/setup.sh [--force]
#
# Safe to run at any time. When nothing has changed it takes about a second; otherwise it does
# only what is missing. `--force` starts from an empty environment.
#
# With an NVIDIA GPU, SGLang is installed the ordinary way. Without one, its ordinary way pulls
# in several GB of CUDA packages that cannot work, so it gets a CPU build of torch and just the
# packages it imports there, and `scripts/cpu_env` is copied in (see its docstring).
#
# Environment variables:
#     PYTHON           the interpreter to use (default: the first suitable python3)
#     SETUP_FLAVOUR    cpu or gpu, instead of asking nvidia-smi
set -euo pipefail

readonly SGLANG_VERSION=0.5.23
readonly TORCH_VERSION=2.13.0
readonly TORCHVISION_VERSION=0.28.0
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
readonly DISK_NEEDED_CPU_MB=4000 DISK_NEEDED_GPU_MB=25000
readonly HEARTBEAT_S=10
# Packages that can be done without, and what is missed then.
readonly -A WITHOUT=(
    [fio]="disk benchmarks will have nothing to compare with"
    [redis-tools]="tests of the Redis store are skipped"
    [bindfs]="tests of a mount that hangs are skipped"
    [libssl-dev]="SGLang cannot compile its hashing of pages, they are hashed in Python"
)
readonly IMPORT_CHECK='
import torchvision, sgl_kernel
import sglang.launch_server, sglang.bench_serving
import sglang.srt.entrypoints.http_server
import sglang.srt.managers.scheduler, sglang.srt.managers.detokenizer_manager
import sglang.srt.models.registry
import sglang.test.kits.unified_radix_cache.fixtures
import httpx, pytest
'

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT VENV="$ROOT/.venv" SCRIPTS="$ROOT/scripts" LOG="$ROOT/logs/setup.log"
readonly STAMP="$VENV/.setup-stamp" PROJECT_STAMP="$VENV/.project-stamp"

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

die() {
    printf '\nsetup.sh: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf '  %s\n' "$hint" >&2; done
    exit 1
}

# logged COMMAND...: run it with its output in the log and a sign of life every HEARTBEAT_S.
logged() {
    local pid next=$((SECONDS + HEARTBEAT_S))
    printf '\n+ %s\n' "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if ((SECONDS >= next)); then
            # pip's own progress; its warnings about index locations say nothing about it.
            say "    ... $(grep -v '^WARNING\|^$' "$LOG" | tail -n 1 | cut -c 1-90)"
            next=$((SECONDS + HEARTBEAT_S))
        fi
        sleep 0.2
    done
    wait "$pid"
}

# must HINT COMMAND...: `logged`, and if it fails show the end of the log and what to do.
must() {
    local hint=$1
    shift
    if ! logged "$@"; then
        tail -n 25 "$LOG" >&2
        die "failed: $*" "$hint" "The whole output is in $LOG."
    fi
}

pip_install() {
    # Bytecode is left to the first import: most of what is installed is never imported.
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile \
        --progress-bar off "$@"
}

find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.13)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if command -v "$candidate" >/dev/null && "$candidate" -c \
            'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    [[ -z ${PYTHON:-} ]] || die "PYTHON is '$PYTHON', which is no Python 3.11, 3.12 or 3.13." \
        "Name another one, or unset it: then one is looked for."
    die "no Python 3.11, 3.12 or 3.13 found." \
        "Debian 12 and Ubuntu 24.04 have one: apt-get install python3" \
        "Elsewhere: PYTHON=/path/to/python3.12 make test (or any other target)"
}

flavour() {
    if [[ -n ${SETUP_FLAVOUR:-} ]]; then
        [[ $SETUP_FLAVOUR == cpu || $SETUP_FLAVOUR == gpu ]] ||
            die "SETUP_FLAVOUR is '$SETUP_FLAVOUR'; it can be cpu or gpu."
        echo "$SETUP_FLAVOUR"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo gpu
    else
        echo cpu
    fi
}

# What the system lacks, as Debian package names on stdout.
missing_packages() {
    command -v g++ >/dev/null || echo build-essential
    "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null || echo "python$PYTHON_VERSION-venv"
    "$BASE_PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
        echo "python$PYTHON_VERSION-dev"
    [[ -f /usr/include/xxhash.h || -f /usr/local/include/xxhash.h ]] || echo libxxhash-dev
    # SGLang compiles its hashing of pages with it; where it cannot, ours hashes them in Python.
    [[ -f /usr/include/openssl/sha.h || -f /usr/local/include/openssl/sha.h ]] || echo libssl-dev
    # The benchmarks compare against what fio reads from the same disk; nothing else needs it.
    command -v fio >/dev/null || echo fio
    # Tests start a Redis server of their own. redis-tools has the same program under another name, and unlike
    # redis-server no service that the machine would start.
    command -v redis-server >/dev/null || command -v redis-check-rdb >/dev/null || echo redis-tools
    # They also mount a directory by FUSE, and stop what serves it.
    command -v bindfs >/dev/null || echo bindfs
}

install_system_packages() {
    local packages still
    mapfile -t packages < <(missing_packages)
    ((${#packages[@]})) || return 0
    local sudo=()
    ((EUID == 0)) || sudo=(sudo)
    if command -v apt-get >/dev/null && { ((EUID == 0)) || command -v sudo >/dev/null; }; then
        say "system packages: ${packages[*]}"
        # Ask for the password now: in `logged` the question would be invisible.
        ((EUID == 0)) || sudo true || true
        logged "${sudo[@]}" apt-get update || true
        logged "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends "${packages[@]}" || true
    fi
    mapfile -t still < <(missing_packages)
    for package in "${still[@]}"; do
        [[ -n ${WITHOUT[$package]:-} ]] || die "the system lacks: ${still[*]}" \
            "Install them with your package manager, for example" \
            "    apt-get update && apt-get install ${still[*]}" \
            "and run scripts/setup.sh again. What apt said is in $LOG."
        say "    $package could not be installed: ${WITHOUT[$package]}"
    done
}

environment_hash() {
    {
        echo "$FLAVOUR $BASE_PYTHON $PYTHON_VERSION"
        cat "$SCRIPTS"/setup.sh "$SCRIPTS"/requirements-*.txt
        find "$SCRIPTS/cpu_env" -type f ! -name '*.pyc' -print0 | sort -z | xargs -0 cat
    } | sha256sum | cut -d ' ' -f 1
}

# Native sources by content. Python sources by name only: an editable install reads them where
# they are, but has to be told about new ones.
project_hash() {
    local prune=(-name .venv -o -name .git -o -name .gpu -o -path "$ROOT/build" -o -path "$ROOT/models"
        -o -name node_modules)
    {
        cat "$STAMP"
        find "$ROOT" \( "${prune[@]}" \) -prune -o -type f \
            \( -name '*.cpp' -o -name '*.cc' -o -name '*.c' -o -name '*.cu' -o -name '*.h' \
            -o -name '*.hpp' -o -name '*.cuh' -o -name '*.cmake' -o -name CMakeLists.txt \
            -o -path "$ROOT/pyproject.toml" \) -print0 | sort -z | xargs -0 -r sha256sum
        find "$ROOT" \( "${prune[@]}" \) -prune -o -type f \
            \( -name '*.py' -o -name '*.pyi' -o -name py.typed \) -print | sort
    } | sha256sum | cut -d ' ' -f 1
}

make_venv() {
    local have=""
    [[ -f $VENV/.setup-base ]] && have=$(<"$VENV/.setup-base")
    # A different interpreter or flavour cannot be reached by adding packages.
    if [[ -n $FORCE || $have != "$FLAVOUR $BASE_PYTHON $PYTHON_VERSION" ]] ||
        ! "$VENV/bin/python" -c pass 2>/dev/null; then
        [[ ! -e $VENV || -f $VENV/pyvenv.cfg ]] ||
            die "$VENV exists and is not a Python environment." "Move it away and try again."
        local needed_mb free_mb
        needed_mb=$([[ $FLAVOUR == gpu ]] && echo $DISK_NEEDED_GPU_MB || echo $DISK_NEEDED_CPU_MB)
        rm -rf "$VENV"
        free_mb=$(($(df --output=avail -k "$ROOT" | tail -n 1) / 1024))
        ((free_mb >= needed_mb)) ||
            die "only $free_mb MB free for $VENV, $needed_mb MB needed." "Make room and try again."
        say "new environment in .venv ($FLAVOUR, Python $PYTHON_VERSION)"
        must "Is $BASE_PYTHON a complete Python?" "$BASE_PYTHON" -m venv "$VENV"
        echo "$FLAVOUR $BASE_PYTHON $PYTHON_VERSION" >"$VENV/.setup-base"
    fi
    rm -f "$STAMP"
}

install_torch_cpu() {
    local installed
    installed=$("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' \
        2>/dev/null || true)
    [[ ${installed%+cpu} == "$TORCH_VERSION" ]] && return
    say "torch $TORCH_VERSION (CPU)"
    # First where pip is configured to look; then PyTorch's own index, since PyPI's Linux wheel
    # is the CUDA one; and that one at last, which works on a CPU too but is ten times the size.
    logged pip_install "torch==$TORCH_VERSION+cpu" && return
    say "    not in the configured index, trying $TORCH_CPU_INDEX"
    logged pip_install --timeout 20 --retries 1 --extra-index-url "$TORCH_CPU_INDEX" \
        "torch==$TORCH_VERSION+cpu" && return
    say "    not reachable, taking the default build (much larger)"
    must "Is a package index reachable? Try: pip download torch==$TORCH_VERSION" \
        pip_install "torch==$TORCH_VERSION"
}

install_cpu() {
    local hint="Is the package index reachable? Look at 'pip config list', then run setup.sh again."
    install_torch_cpu
    say "what SGLang imports on a CPU, and the development tools"
    must "$hint" pip_install -r "$SCRIPTS/requirements-cpu.txt" -r "$SCRIPTS/requirements-dev.txt"
    say "SGLang $SGLANG_VERSION"
    # --no-deps: both name a CUDA build of torch.
    must "$hint" pip_install --no-deps "sglang==$SGLANG_VERSION" "torchvision==$TORCHVISION_VERSION"

    local site
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    rm -rf "$site/sgl_kernel"
    mkdir "$site/sgl_kernel"
    cp "$SCRIPTS"/cpu_env/sgl_kernel/*.py "$site/sgl_kernel/"
    install -m 644 "$SCRIPTS"/cpu_env/sglang_cpu_env.{py,pth} "$site/"
}

install_gpu() {
    say "SGLang $SGLANG_VERSION with CUDA torch (many GB), and the development tools"
    must "Is the package index reachable? Look at 'pip config list', then run setup.sh again." \
        pip_install "sglang==$SGLANG_VERSION" -r "$SCRIPTS/requirements-dev.txt"
}

install_environment() {
    local wanted
    wanted=$(environment_hash)
    if [[ -z $FORCE && -f $STAMP && $(<"$STAMP") == "$wanted" ]] &&
        "$VENV/bin/python" -c pass 2>/dev/null; then
        say "environment is up to date"
        return
    fi
    install_system_packages
    make_venv
    "install_$FLAVOUR"
    say "checking that it imports"
    # This also writes the bytecode of what a server start imports, and it must: with
    # PYTHONDONTWRITEBYTECODE set (as in many container images) every start would compile
    # anew, and take 18 s of imports instead of 8 s in each of its three processes.
    must "Run 'scripts/setup.sh --force'; if that does not help, this is a bug in setup.sh." \
        env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -c "$IMPORT_CHECK"
    # Last, so that an interrupted run is continued by the next one.
    echo "$wanted" >"$STAMP"
}

install_project() {
    if [[ ! -f $ROOT/pyproject.toml ]]; then
        say "no pyproject.toml yet: skipping the project itself"
        return
    fi
    local wanted
    wanted=$(project_hash)
    if [[ -f $PROJECT_STAMP && $(<"$PROJECT_STAMP") == "$wanted" ]]; then
        say "project is up to date"
        return
    fi
    rm -f "$PROJECT_STAMP"
    say "building and installing the project (editable)"
    # The build runs in this environment, and so uses its cmake and ninja, not the system's.
    PATH="$VENV/bin:$PATH" must "Fix the error above, then run scripts/setup.sh again." \
        pip_install --no-build-isolation --no-deps -e "$ROOT"
    echo "$wanted" >"$PROJECT_STAMP"
}

FORCE=""
case "${1:-}" in
"") ;;
--force) FORCE=yes ;;
*) die "unknown argument '$1'." "usage: scripts/setup.sh [--force]" ;;
esac

# Two runs at once would install into the same directory: the second waits for the first.
exec 9<"${BASH_SOURCE[0]}"
flock 9

mkdir -p "$(dirname "$LOG")"
: >"$LOG"
BASE_PYTHON=$(find_python)
PYTHON_VERSION=$("$BASE_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
FLAVOUR=$(flavour)
install_environment
install_project
say "ready: $VENV"
