#!/usr/bin/env bash
# Verifies the project on a machine with an NVIDIA GPU and no network, in one call of less than nine minutes.
#
#     bash .gpu/kit/run.sh [STAGE ...]       in the project's folder; `make gpu-kit` makes .gpu/kit elsewhere
#
# STAGEs, in this order (default: all): sanity unpack core probe bytes built speed overlap kernels gqa mla sanitizer
# serving demo tests (`make test` and `make demo`, on this machine's Python and torch).
# Each has a time limit of its own, and none stops the others. What comes back:
#
#     $OUT/stage.log      everything that was printed, stage by stage
#     $OUT/results.json   exit status and seconds of every stage, and the JSON each of them wrote
#     $OUT/servers.log    beginnings and ends of the servers' logs
#     $OUT/serving.log, $OUT/tests.log    test by test
#
#     TOTAL    seconds for everything (default 530)
#     SITE     where the packages are unpacked, on a disk (default /tmp/flexkv-kit); kept for a second call
#     PY       the interpreter, with torch (default python3)
set -uo pipefail

ROOT=$PWD
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
OUT=${OUT:-$ROOT/build/gpu-out}
SITE=${SITE:-/tmp/flexkv-kit}
TOTAL=${TOTAL:-530}
PY=${PY:-python3}
readonly STAGES="sanity unpack core probe bytes built speed overlap kernels gqa mla sanitizer serving demo tests"
mkdir -p "$OUT" "$SITE/json" "$SITE/logs"

# The SSD tier wants a disk, not memory.
SCRATCH=$SITE/ssd
for parent in "$SITE" "$ROOT/build" /var/tmp "$HOME"; do
    mkdir -p "$parent/ssd" 2>/dev/null || continue
    case $(stat -f -c %T "$parent/ssd") in tmpfs | ramfs) ;; *) SCRATCH=$parent/ssd && break ;; esac
done

# nvcc on the path can be a wrapper that lies elsewhere than its toolkit.
nvcc=$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
for home in "${CUDA_HOME:-}" "$(dirname "$(dirname "$nvcc")")" /usr/local/cuda /usr/local/cuda-13.0; do
    [[ -x $home/bin/nvcc && -f $home/include/cuda_runtime.h ]] && export CUDA_HOME=$home && break
done
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
export PATH=$CUDA_HOME/bin:$PATH
export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export FLASHINFER_WORKSPACE_BASE=$SITE/flashinfer-cache SGLANG_JIT_CACHE_DIR=$SITE/jit-cache
export TRITON_CACHE_DIR=$SITE/triton-cache CMAKE_INCLUDE_PATH=$SITE/include CPLUS_INCLUDE_PATH=$SITE/include
export LIBRARY_PATH=$SITE/stubs${LIBRARY_PATH:+:$LIBRARY_PATH} # a libcuda.so to link against, not to run with
export MAX_JOBS=${MAX_JOBS:-$(nproc)} COLUMNS=150

say() { echo "===== $*" | tee -a "$OUT/stage.log"; }

# stage NAME LIMIT RESERVE: at most LIMIT seconds, and RESERVE must be left for what comes after it.
stage() {
    local name=$1 limit=$2 reserve=$3 begin=$SECONDS may status
    [[ -z $WANTED || " $WANTED " == *" $name "* ]] || return 0
    # Whoever asks for single stages wants these.
    [[ -z $WANTED ]] || reserve=0
    may=$((TOTAL - SECONDS - reserve))
    ((may < limit)) && limit=$may
    if ((limit < 5)); then
        say "$name: left out, no time"
        echo "$name -1 0" >>"$SITE/json/stages.txt"
        return 0
    fi
    say "$name (at most $limit s, $((TOTAL - SECONDS)) s left)"
    # `timeout` runs programs, not functions: it calls this script again.
    LIMIT=$limit timeout -k 5 "$limit" bash "${BASH_SOURCE[0]}" --run "$name" 2>&1 | tee -a "$OUT/stage.log"
    status=${PIPESTATUS[0]}
    say "$name: status $status after $((SECONDS - begin)) s"
    echo "$name $status $((SECONDS - begin))" >>"$SITE/json/stages.txt"
    collect # after every stage, so that a call that is cut off leaves what there was
}

collect() {
    "$PY" -S - "$SITE/json" "$OUT/results.json" <<'PYTHON'
import json, pathlib, sys
folder, target = map(pathlib.Path, sys.argv[1:])
result = {"stages": {}}
for line in (folder / "stages.txt").read_text().splitlines():
    name, status, seconds = line.split()
    result["stages"][name] = {"status": int(status), "seconds": int(seconds)}
for path in sorted(folder.glob("*.json")):
    try:
        result[path.stem] = json.loads(path.read_text())
    except ValueError as error:
        result[path.stem] = f"unreadable: {error}"
target.write_text(json.dumps(result, indent=1) + "\n")
PYTHON
    local log
    for log in "$SITE"/logs/*.log; do
        [[ -f $log ]] || continue
        echo "##### $log"
        head -c 60000 "$log"
        echo "##### ... the end of $log"
        tail -c 150000 "$log"
    done >"$OUT/servers.log"
}

# The stages.

sanity() {
    nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.current,pcie.link.width.current \
        --format=csv || true
    "$PY" -c 'import sys, torch; print(sys.version); print(torch.__version__, torch.cuda.get_device_name())'
    nvcc --version | tail -2
    g++ --version | head -1
    nproc
    free -g | head -2
    df -h "$SITE" "$SCRATCH" | cat
    echo "scratch: $SCRATCH on $(stat -f -c %T "$SCRATCH"); io_uring disabled: \
$(cat /proc/sys/kernel/io_uring_disabled 2>/dev/null || echo unknown); memlock: $(ulimit -l)"
    timeout 4 dd if=/dev/zero of="$SCRATCH/probe" bs=4M count=256 oflag=direct 2>&1 | tail -1
    timeout 4 dd if="$SCRATCH/probe" of=/dev/null bs=4M iflag=direct 2>&1 | tail -1
    rm -f "$SCRATCH/probe"
    ls /usr/include/xxhash.h "$(command -v xz)" "$(command -v compute-sanitizer)" 2>&1
    return 0
}

unpack() {
    local archive
    for archive in "$HERE"/*.tar.xz; do
        if command -v xz >/dev/null; then
            tar -xJf "$archive" -C "$SITE" &
        else
            "$PY" -S -m tarfile -e "$archive" "$SITE" &
        fi
    done
    wait
    du -sh "$SITE"
    # Every start of a server would compile them again where the folder is new.
    timeout 25 "$PY" -S -m compileall -q -j "$(nproc)" "$SITE/sglang" "$SITE/flashinfer" "$SITE/sglang_flexkv" \
        "$SITE"/{fastapi,starlette,pydantic,openai,xgrammar,IPython,datasets,tvm_ffi,uvicorn} >/dev/null 2>&1
    # Kernels that were not carried: beside the next stages, which load the CPUs little.
    rm -f "$SITE/build.done"
    setsid nohup nice bash "${BASH_SOURCE[0]}" --run build_missing >"$SITE/logs/build.log" 2>&1 </dev/null &
    return 0
}

# FlashInfer compiles a kernel that is missing at its first use, while a server starts: better now.
build_missing() {
    "$PY" -P "$HERE/build_flashinfer.py" "$SITE/flashinfer/data/aot" prefill-fa2-128 cascade prefill-fa3-128 mla-fa3
    touch "$SITE/build.done"
}

built() {
    until [[ -f $SITE/build.done ]]; do sleep 0.5; done
    cut -c 1-400 "$SITE/logs/build.log"
    ls "$SITE/flashinfer/data/aot"
}

core() {
    # -P: the project's own folder has no compiled core, and must not be found first.
    if ! "$PY" -P -c 'from sglang_flexkv import _core; print(_core.__file__)'; then
        echo "the core of the kit does not load; building it here"
        rm -rf "$SITE/source" "$SITE/wheel"
        mkdir -p "$SITE/source"
        cp -r CMakeLists.txt pyproject.toml README.md LICENSE csrc sglang_flexkv "$SITE/source/"
        "$PY" -m pip wheel -q --no-build-isolation --no-deps --no-index -w "$SITE/wheel" "$SITE/source" &&
            "$PY" -m pip install -q --no-deps --no-index --upgrade --target "$SITE" "$SITE"/wheel/*.whl
    fi
    "$PY" -P -c 'import sglang_flexkv._core as core, torch, flashinfer
print("core", core.__file__)
print("flashinfer", flashinfer.__version__)
import sglang
print("sglang", sglang.__version__, sglang.__file__)
import importlib.metadata as metadata
print([e for e in metadata.entry_points(group="sglang.srt.plugins")])'
}

verify() { # NAME STEP...: steps of benchmarks/verify_gpu.py
    local name=$1
    shift
    "$PY" benchmarks/verify_gpu.py "$@" --total $((LIMIT - 4)) --json "$SITE/json/$name.json"
}

probe() { "$PY" benchmarks/probe_gpu.py --total $((LIMIT - 4)) --json "$SITE/json/probe.json"; }
bytes() { verify bytes bytes one-copy; }
speed() { verify speed queueing slowdown bandwidth; } # pinning 32 GiB last
sanitizer() { verify sanitizer sanitizer; }
overlap() {
    "$PY" benchmarks/bench_overlap.py --device cuda --rounds 3 --dir "$SCRATCH" --json "$SITE/json/overlap.json"
}
kernels() { "$PY" "$HERE/kernels.py" --json "$SITE/json/kernels.json"; }
servers() { # NAME OPTION...: real SGLang with the model of this name
    local name=$1
    shift
    cd "$SITE" || return
    "$PY" "$HERE/real_sglang.py" --root "$ROOT" --model "$SITE/models/big-$name" --json "$SITE/json/$name.json" \
        --logs "$SITE/logs" --scratch "$SCRATCH" --deadline $((LIMIT - 8)) "$@"
}
gqa() { servers gqa --sizes 8192,32768; }
mla() { servers mla --sizes 8192 --repeats 1; }
run_tests() { # NAME PROCESSES PYTEST-ARGUMENT...
    local name=$1 processes=$2
    shift 2
    cd "$ROOT" || return
    # Whatever a test starts must not take the project's own folder, which has no compiled core, for the package.
    PYTHONSAFEPATH=1 PYTHONPATH=$HERE:$PYTHONPATH "$PY" -m pytest "$@" -v -n "$processes" --tb=short \
        -p no:cacheprovider -p no:benchmark -p show_failures --timeout $((LIMIT - 10)) >"$OUT/$name.log" 2>&1
    local status=$?
    tail -c 20000 "$OUT/$name.log"
    return "$status"
}
# small_models NAME...: the tests' and the demo's, and how their servers are started: attention for their heads of 64
# does not travel, but Triton's.
small_models() {
    cd "$ROOT" || return
    "$PY" -P scripts/make_models.py "$@" || return
    export PYTHONSAFEPATH=1 TMPDIR=$SITE/tmp
    export SERVER_FLAGS='{"attention-backend": "triton", "sampling-backend": "pytorch", "disable-cuda-graph": true}'
    mkdir -p "$TMPDIR"
}
# Of the tests with servers those that say most of a GPU, as each start takes half a minute: windows, states, and what
# is written back when it leaves the device.
serving() {
    small_models tiny-mha tiny-swa tiny-gdn || return
    run_tests serving 4 --dist worksteal tests/servers/test_{states,pools,end_to_end}.py -k "states or swa or tiny-mha"
    local status=$?
    grep -rhoE "flexkv kit: compiling \S+" "$TMPDIR" | sort | uniq -c
    return "$status"
}
demo() { small_models small-gqa && "$PY" -P demo/demo.py; }
# Without what wants SGLang's tree in Rust, all of its sources or the servers of stores, and what Triton's interpreter
# cannot do with that machine's numpy.
tests() {
    local benchmarks=tests/unit/test_benchmarks.py
    run_tests tests "$(nproc)" --dist loadfile tests/unit --ignore-glob "*remote*" \
        --ignore tests/unit/test_lower_tiers.py --ignore tests/unit/test_sglang_variables.py \
        --deselect $benchmarks::test_what_the_scheduler_spends_is_compared_with_stock \
        --deselect $benchmarks::test_remote_stores_bring_every_byte \
        --deselect $benchmarks::test_faults_of_a_store_change_no_answer \
        --deselect tests/unit/test_gpu_checks.py::test_copies_of_the_probe
}

if [[ ${1:-} == --run ]]; then
    # Without FlashInfer's third generation of kernels the second one: compiling at a server's start takes too long.
    compgen -G "$SITE/flashinfer/data/aot/batch_prefill*_128_*_sm90" >/dev/null || export FLEXKV_KIT_FA2=1
    "$2"
    exit
fi
for name in "$@"; do
    [[ " $STAGES " == *" $name "* ]] || { echo "run.sh: there is no stage '$name'; there are: $STAGES" >&2 && exit 2; }
done
WANTED=$*
rm -f "$SITE"/json/* "$SITE"/logs/*.log
: >"$OUT/stage.log"
: >"$SITE/json/stages.txt"
stage sanity 15 480
stage unpack 45 440
stage core 90 400
stage probe 90 330
stage bytes 30 310
stage built 60 290
stage speed 80 240
stage overlap 60 215
stage kernels 30 190
stage gqa 190 0
stage mla 120 0
stage sanitizer 60 0
stage serving 240 0
stage demo 90 0
stage tests 150 0
collect
echo "done after $SECONDS s; results in $OUT"
cat "$SITE/json/stages.txt"
