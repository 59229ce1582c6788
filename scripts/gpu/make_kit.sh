#!/usr/bin/env bash
# Makes the kit that verifies the project on a GPU machine without a network: real SGLang and FlashInfer with
# kernels compiled for Hopper, this project's current code, models, and what runs them (`run.sh`).
#
#     make gpu-kit                          # or: scripts/gpu/make_kit.sh [STAGE ...]
#
# STAGEs, in this order (default: all): image wheels site core jit flashinfer models pack. What is there is not
# made again, except the core and the pack, which follow the current code. Run it on x86-64 Linux with nvcc 13,
# g++ (and xxhash.h), Python 3.12 and a package index; no GPU is needed. From nothing it takes 4 minutes of
# downloads and, on two cores, about half an hour of nvcc.
#
#     PYTHON      a Python 3.12 with headers (default: python3.12, or pyenv's)
#     WORK        where everything is made, 9 GB (default: .gpu/work)
#     KIT         the folder to carry, at most MAX_MIB (default: .gpu/kit)
#     MAX_MIB     what the folder may have (default: 64)
#     MAX_JOBS    compilers at once (default: all cores)
set -euo pipefail

readonly HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly ROOT=$(cd "$HERE/../.." && pwd)
mkdir -p "${WORK:-$ROOT/.gpu/work}"
WORK=$(cd "${WORK:-$ROOT/.gpu/work}" && pwd)
KIT=${KIT:-$ROOT/.gpu/kit}
MAX_MIB=${MAX_MIB:-64}
readonly WORK KIT MAX_MIB
readonly VENV=$WORK/venv
readonly PY=$VENV/bin/python
readonly STAGES=(image wheels site core jit flashinfer models pack)

export FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_WORKSPACE_BASE=$WORK/flashinfer PYTHONDONTWRITEBYTECODE=1
# Where SGLang finds what it has compiled before: a stage that was stopped goes on.
export SGLANG_JIT_CACHE_DIR=$WORK/jit-cache
MAX_JOBS=${MAX_JOBS:-$(nproc)}
export MAX_JOBS

say() { printf '[kit %4d s] %s\n' "$SECONDS" "$*"; }

die() {
    printf '\nmake_kit.sh: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf '  %s\n' "$hint" >&2; done
    exit 1
}

find_python() {
    local candidate candidates=(python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python3.12)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if [[ $("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == 3.12 ]]; then
            echo "$candidate"
            return
        fi
    done
    [[ -z ${PYTHON:-} ]] || die "PYTHON is '$PYTHON', which is no Python 3.12; the GPU machine has that." \
        "Name another one, or unset it: then one is looked for."
    die "no Python 3.12, which is what the GPU machine has, was found." \
        "Name one: PYTHON=/path/to/python3.12 make gpu-kit" \
        "Ubuntu 24.04 has it (python3.12-venv, python3.12-dev); elsewhere: pyenv install 3.12"
}

# made FILE NAME: whether the stage that writes NAME.done has run with this FILE.
made() { cmp -s "$1" "$WORK/$2.done"; }

find_toolkit() {
    local nvcc home
    # nvcc on the path can be a wrapper that lies elsewhere than its toolkit.
    nvcc=$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
    for home in "${CUDA_HOME:-}" "$(dirname "$(dirname "$nvcc")")" /usr/local/cuda; do
        if [[ -x $home/bin/nvcc && -f $home/include/cuda_runtime.h ]]; then
            export CUDA_HOME=$home
            toolkit_extras
            return
        fi
    done
    die "the CUDA toolkit was not found." "Install nvcc 13 and set CUDA_HOME to its folder."
}

# What the compilers also need: a driver to link against, which is not on a machine without a GPU, and cuRAND's
# headers, which not every toolkit has.
toolkit_extras() {
    mkdir -p "$WORK/extras/curand"
    [[ -f $WORK/extras/libcuda.so ]] ||
        echo 'int kit_stub;' | gcc -shared -x c - -o "$WORK/extras/libcuda.so" -Wl,-soname,libcuda.so.1
    find "$VENV"/lib/python3.12/site-packages/nvidia -name 'curand*.h' -exec cp -t "$WORK/extras/curand" {} +
    export LIBRARY_PATH=$WORK/extras CPLUS_INCLUDE_PATH=$WORK/extras/curand
}

# The packages of the GPU machine: SGLang and FlashInfer compile against them.
image() {
    made "$HERE/requirements-machine.txt" image && return
    local python
    python=$(find_python)
    say "a Python 3.12 with the packages of the GPU machine (6 GB)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
    "$PY" -m pip install -q --disable-pip-version-check -r "$HERE/requirements-machine.txt"
    # Some package above brings these along, and the GPU machine does not have them: they have to travel.
    "$PY" -m pip uninstall -q -y pydantic pydantic-core annotated-types typing-inspection
    cp "$HERE/requirements-machine.txt" "$WORK/image.done"
}

wheels() {
    made "$HERE/requirements-kit.txt" wheels && return
    say "the wheels that travel"
    local platforms=() tag
    for tag in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2014 2_12 2010 2_5 1; do
        if [[ $tag == 2_* ]]; then tag="_$tag"; fi
        platforms+=(--platform "manylinux${tag}_x86_64")
    done
    rm -rf "$WORK/wheels"
    "$PY" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" -d "$WORK/wheels" -r "$HERE/requirements-kit.txt"
    cp "$HERE/requirements-kit.txt" "$WORK/wheels.done"
}

# Site-packages as they travel: without what a dense model on one GPU never reads.
site() {
    made "$WORK/wheels.done" site && return
    say "site-packages"
    rm -rf "$WORK/site"
    "$PY" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$WORK/site" "$WORK"/wheels/*.whl
    (
        cd "$WORK/site"
        rm -rf bin sglang/multimodal_gen sglang/srt/rust_extensions/*.so \
            sglang/srt/mem_cache/rust_tree_core/*.so sglang/kernels/ops/lora/moe/trtllm_lora_temp/data \
            jedi/third_party/typeshed jedi/third_party/django-stubs \
            flashinfer/moe_ep/kernel_src flashinfer/experimental/b12x
        # FlashInfer: the sources of the kernels that may still have to be compiled there, and their headers.
        find flashinfer/data/csrc -mindepth 1 -maxdepth 1 -type d ! -name fused_rmsnorm_silu -exec rm -rf {} +
        find flashinfer -path flashinfer/data -prune -o -type f ! -name '*.py' -size +40k -print0 |
            xargs -0 rm -f
        find . -name '*.so' -size +100k -exec strip --strip-unneeded {} + 2>/dev/null || true
    )
    cp "$WORK/wheels.done" "$WORK/site.done"
}

core() {
    say "this project's core for Python 3.12"
    rm -rf "$WORK/source" "$WORK/core"
    mkdir -p "$WORK/source"
    (cd "$ROOT" && cp -r CMakeLists.txt pyproject.toml README.md LICENSE csrc sglang_flexkv "$WORK/source/")
    # Its cmake and ninja, not the system's. With what the unit tests put under the core.
    PATH="$VENV/bin:$PATH" "$PY" -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps \
        --no-index -C cmake.define.FLEXKV_TESTING=ON -w "$WORK/core" "$WORK/source"
}

jit() {
    say "SGLang's run-time compiled kernels for sm_90a"
    find_toolkit
    PYTHONPATH=$HERE/overlay:$WORK/site "$PY" "$HERE/build_sglang_jit.py" "$WORK/jit"
}

flashinfer() {
    say "FlashInfer's kernels for sm_90a"
    find_toolkit
    PYTHONPATH=$WORK/site "$PY" "$HERE/build_flashinfer.py" "$WORK/aot" ||
        say "some are missing, see above: the GPU machine compiles them, or does without"
}

models() {
    [[ -f $WORK/models/big-gqa/config.json ]] && return
    say "models"
    # For its tokenizer alone: weights do not travel, they are made on the device.
    "$PY" "$ROOT/scripts/make_models.py" tiny-gqa --out "$WORK/tokenizer"
    "$PY" "$HERE/make_gpu_models.py" "$WORK/models" "$WORK/tokenizer/tiny-gqa"
}

# Several archives, so that they are unpacked side by side. `layer` is what changes with the project.
pack() {
    say "packing"
    local python layer=$WORK/layer archives=$WORK/archives xz=(nice xz -6 -T0) wheel header mib
    python=$(find_python)
    rm -rf "$KIT" "$layer"
    mkdir -p "$KIT" "$layer/flashinfer/data/aot" "$layer/prebuilt_jit" "$layer/include" "$layer/stubs"
    for wheel in "$WORK"/core/*.whl; do "$python" -m zipfile -e "$wheel" "$layer"; done
    cp -r "$HERE"/overlay/. "$layer/"
    [[ -d $WORK/aot ]] && cp -r "$WORK"/aot/. "$layer/flashinfer/data/aot/"
    [[ -d $WORK/jit ]] && cp -r "$WORK"/jit/. "$layer/prebuilt_jit/"
    for header in /usr/include/xxhash.h /usr/include/xxh3.h "$WORK"/extras/curand/*.h; do
        [[ -f $header ]] && cp "$header" "$layer/include/"
    done
    [[ -f $WORK/extras/libcuda.so ]] && cp "$WORK/extras/libcuda.so" "$layer/stubs/"
    cp -r "$WORK/models" "$layer/models"
    find "$layer" -name __pycache__ -prune -exec rm -rf {} +
    if ! cmp -s "$WORK/site.done" "$archives/done"; then
        rm -rf "$archives"
        mkdir -p "$archives"
        tar cf - -C "$WORK/site" sglang | "${xz[@]}" >"$archives/sglang.tar.xz"
        tar cf - -C "$WORK/site" flashinfer | "${xz[@]}" >"$archives/flashinfer.tar.xz"
        tar cf - -C "$WORK/site" --exclude=./sglang --exclude=./flashinfer . |
            "${xz[@]}" >"$archives/packages.tar.xz"
        cp "$WORK/site.done" "$archives/done"
    fi
    cp "$archives"/*.tar.xz "$KIT/"
    tar cf - -C "$layer" . | "${xz[@]}" >"$KIT/layer.tar.xz"
    cp "$HERE"/{run.sh,real_sglang.py,kernels.py,build_flashinfer.py,show_failures.py} "$KIT/"
    du -ch "$KIT"/* | sed 's/^/    /'
    mib=$(($(du -sk --apparent-size "$KIT" | cut -f 1) / 1024 + 1))
    ((mib <= MAX_MIB)) || die "$KIT has $mib MiB, more than MAX_MIB=$MAX_MIB." \
        "What travels is in scripts/gpu/requirements-kit.txt, what is left out in the stage 'site'."
}

wanted=("$@")
(($#)) || wanted=("${STAGES[@]}")
for stage in "${wanted[@]}"; do
    [[ " ${STAGES[*]} " == *" $stage "* ]] ||
        die "there is no stage '$stage'." "There are: ${STAGES[*]}"
done
for stage in "${wanted[@]}"; do "$stage"; done
say "done: $KIT"
