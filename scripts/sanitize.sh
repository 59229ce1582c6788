#!/usr/bin/env bash
# The core under sanitizers: AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer.
# Exit status 0: clean. 1: a finding, which is printed. 2: it could not be built.
#
#     scripts/sanitize.sh              the C++ tests, then Python's tests of index, transfer engine and remote tier
#     scripts/sanitize.sh --quick      the C++ tests, a few seconds each
#     scripts/sanitize.sh --self-test  plants faults and demands that each of them is a finding
#
# Builds are kept in build/sanitize-address and build/sanitize-thread.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT PYTHON=${PYTHON:-$ROOT/.venv/bin/python} ENGINE=tests/unit/test_transfer_engine.py
# Of the engine's tests, one measures memory, which a sanitizer has its own ideas about (it ignores mlock).
readonly MEMORY=test_the_host_pool_takes_what_was_asked_and_is_faulted_in_behind_the_scenes
readonly SHARED=test_random_graphs_with_faults_cancels_and_delays_end_every_op_exactly_once
status=0

# CPython frees little at its exit: leaks are looked for in the C++ tests only.
export ASAN_OPTIONS=detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1

# build SANITIZER TARGET...
build() {
    local sanitizer=$1
    shift
    mkdir -p "$ROOT/build/sanitize-$sanitizer"
    # Two at once would write the same objects.
    flock "$ROOT/build/sanitize-$sanitizer/lock" make -s -C "$ROOT/csrc/testing" -j "$(nproc)" \
        SANITIZER="$sanitizer" PYTHON="$PYTHON" "$@" || {
        echo "sanitize.sh: it does not build" >&2
        exit 2
    }
}

# check WHAT COMMAND...: runs it, and shows its output if it fails.
check() {
    local what=$1 start=$SECONDS output
    shift
    if output=$("$@" 2>&1); then
        echo "clean    $what ($((SECONDS - start)) s)"
    else
        printf '%s\n' "$output" >&2
        echo "FINDING  $what" | tee /dev/stderr
        status=1
    fi
}

control_plane() {
    local sanitizer=$1
    shift
    "$ROOT/build/sanitize-$sanitizer/test_control_plane" "$@"
}

# with_core SANITIZER PYTEST-ARGUMENT...: Python's tests with this build of the core.
with_core() {
    local sanitizer=$1
    local -A libraries=([address]="libasan.so libubsan.so" [thread]=libtsan.so)
    local library preload=()
    shift
    for library in ${libraries[$sanitizer]}; do
        preload+=("$(g++ -print-file-name="$library")")
    done
    # The CUDA driver's stand-in is built with the same sanitizer: it orders what the core's threads do. Pytest must not
    # keep what the sanitizer writes: the process ends with it.
    (cd "$ROOT" && env LD_PRELOAD="${preload[*]}" ASAN_OPTIONS="$ASAN_OPTIONS:detect_leaks=0" \
        FAKE_CUDA_FLAGS="-O1 -g1 -fsanitize=$sanitizer" "$PYTHON" \
        csrc/testing/pytest_with_core.py "build/sanitize-$sanitizer" -q --capture=sys -p no:cacheprovider "$@")
}

self_test() {
    local pair
    for pair in address:check address:overflow address:undefined thread:race; do
        if control_plane "${pair%:*}" --plant "${pair#*:}" >/dev/null 2>&1; then
            echo "MISSED   ${pair#*:}" | tee /dev/stderr
            status=1
        else
            echo "noticed  ${pair#*:}"
        fi
    done
}

case ${1:-} in
"")
    for sanitizer in address thread; do
        build "$sanitizer" control_plane module
        check "$sanitizer: control plane" control_plane "$sanitizer" --seconds 35
        check "$sanitizer: index" with_core "$sanitizer" tests/unit/test_prefix_index.py \
            tests/unit/test_index_model.py -k "not script"
        check "$sanitizer: transfer engine" with_core "$sanitizer" "$ENGINE" -k "not $MEMORY and not $SHARED"
        TSAN_OPTIONS=$TSAN_OPTIONS:report_thread_leaks=0:suppressions=$ROOT/csrc/testing/python_threads.supp \
            check "$sanitizer: remote tier" with_core "$sanitizer" tests/unit/test_remote_tier.py \
            tests/unit/test_remote_values.py
        check "$sanitizer: CUDA path" with_core "$sanitizer" tests/unit/test_cuda_path.py tests/unit/test_cuda_groups.py
    done
    TSAN_OPTIONS+=":suppressions=$ROOT/csrc/testing/shared_slots.supp"
    for sanitizer in address thread; do
        check "$sanitizer: random graphs" with_core "$sanitizer" "$ENGINE" -k "$SHARED"
    done
    ;;
--quick)
    for sanitizer in address thread; do
        build "$sanitizer" control_plane
        check "$sanitizer: control plane" control_plane "$sanitizer" --seconds 3
    done
    ;;
--self-test)
    build address control_plane
    build thread control_plane
    self_test
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
exit "$status"
