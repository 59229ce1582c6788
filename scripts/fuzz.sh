#!/usr/bin/env bash
# Fuzz the code that reads what others may have written (csrc/testing/fuzz). Exit status 1: there is a finding.
#
#     scripts/fuzz.sh TARGET [SECONDS]                      libFuzzer, needs clang; 600 seconds
#     scripts/fuzz.sh TARGET --smoke [SECONDS] [OPTION ...] g++ and a driver of our own; 5 seconds
#     scripts/fuzz.sh TARGET --smoke INPUT ...              run saved inputs again
#
# TARGET is ssd_files (the SSD tier's files) or remote_values (values from a remote store, and the code that some are
# compressed with). Binaries, corpus and findings are kept in build/fuzz. The corpus grows from run to run.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
die() {
    echo "fuzz.sh: $*" >&2
    exit 2
}

# What a target links: what reads, and what is under it.
case ${1:-} in
ssd_files) SOURCES=(ssd/{ssd_image,ssd_format,disk,io_engine}) ;;
remote_values) SOURCES=(remote/{huffman,compression,remote_value}) ;;
*) die "usage: scripts/fuzz.sh ssd_files|remote_values [--smoke] [SECONDS]" ;;
esac
SOURCES+=("testing/fuzz/fuzz_$1" base/checksum)
readonly ROOT TARGET=$1 BUILD=$ROOT/build/fuzz/$1 CSRC=$ROOT/csrc SOURCES
shift

# A finding must end the run. Memory is a matter of the invariants: see Load.
readonly FLAGS=(-std=c++20 -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -Wall -Wextra -Wshadow
    "-I$CSRC")
readonly MEMORY_MB=256

# build BINARY MAIN COMPILER FLAG...: compiles what is older than any source, and links.
build() {
    local binary=$1 main=$2 compiler=$3 name object
    shift 3
    local sources=("${SOURCES[@]}") objects=()
    [[ -z $main ]] || sources+=("$main")
    [[ $(uname -m) != x86_64 ]] || sources+=(base/checksum_avx2)
    if [[ -x $BUILD/$binary && -z $(find "$CSRC" "${BASH_SOURCE[0]}" -name '*.?pp' -newer "$BUILD/$binary" -print \
        -o -name fuzz.sh -newer "$BUILD/$binary" -print) ]]; then
        return
    fi
    mkdir -p "$BUILD/$binary.o"
    local running=()
    for name in "${sources[@]}"; do
        object=$BUILD/$binary.o/${name//\//_}.o
        objects+=("$object")
        local extra=()
        [[ $name != base/checksum_avx2 ]] || extra=(-mavx2)
        "$compiler" "${FLAGS[@]}" "$@" ${extra[@]+"${extra[@]}"} -c "$CSRC/$name.cpp" -o "$object" &
        running+=($!)
        if ((${#running[@]} >= $(nproc))); then
            wait "${running[0]}" || die "$name.cpp or one before it does not compile"
            running=("${running[@]:1}")
        fi
    done
    for name in ${running[@]+"${running[@]}"}; do
        wait "$name" || die "a source does not compile"
    done
    # Moved into place: a build that was interrupted leaves nothing that looks done.
    "$compiler" "${FLAGS[@]}" "$@" "${objects[@]}" -o "$BUILD/$binary.new" -pthread || die "it does not link"
    mv "$BUILD/$binary.new" "$BUILD/$binary"
}

find_clang() {
    command -v clang++ >/dev/null && return
    local sudo=()
    if ((EUID != 0)); then
        sudo -n true 2>/dev/null || die "clang++ is missing; on Debian and Ubuntu: apt-get install clang"
        sudo=(sudo -n)
    fi
    echo "fuzz.sh: installing clang" >&2
    ${sudo[@]+"${sudo[@]}"} apt-get install -y -q clang >"$BUILD/apt.log" 2>&1 ||
        die "clang cannot be installed: see $BUILD/apt.log"
}

mkdir -p "$BUILD/corpus" "$BUILD/findings"
# Two runs at once would build into the same directory; the fuzzing itself may go on side by side.
exec 9>"$BUILD/lock"
flock 9
# Of what is read, everything can be asked for; the machine must not be.
export ASAN_OPTIONS="max_allocation_size_mb=$MEMORY_MB:allocator_may_return_null=0:detect_leaks=${FUZZ_LEAKS:-1}"
# Aborts: the driver then saves the input, as it does when AddressSanitizer ends it.
export UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1

if [[ ${1:-} == --smoke ]]; then
    shift
    [[ ! ${1:-} =~ ^[0-9]+$ ]] || set -- --seconds "$@"
    build smoke testing/fuzz/driver g++ -fsanitize=address,undefined
    flock -u 9
    if "$BUILD/smoke" --crash "$BUILD/findings/smoke-$$" "$@" 9>&-; then
        exit 0
    else
        status=$?
    fi
    ((status != 2)) || exit 2
    echo "fuzz.sh: FINDING (status $status); to run it again: scripts/fuzz.sh $TARGET --smoke INPUT" >&2
    exit 1
fi

seconds=${1:-600}
[[ $seconds =~ ^[0-9]+$ ]] || die "usage: scripts/fuzz.sh $TARGET [--smoke] [SECONDS]"
find_clang
build seeds testing/fuzz/driver clang++ # of clang as well: who has it need not have g++
build libfuzzer "" clang++ -fsanitize=fuzzer,address,undefined
"$BUILD/seeds" --write-seeds "$BUILD/corpus"
flock -u 9
# Long enough for an input of each kind: two superblocks, a header, frames.
if "$BUILD/libfuzzer" -max_total_time="$seconds" -max_len=40960 -timeout=20 -rss_limit_mb=1024 \
    -malloc_limit_mb=$MEMORY_MB -print_final_stats=1 -artifact_prefix="$BUILD/findings/" "$BUILD/corpus" 9>&-; then
    echo "fuzz.sh: no findings in $seconds seconds"
else
    echo "fuzz.sh: FINDING; run it again: build/fuzz/$TARGET/libfuzzer build/fuzz/$TARGET/findings/..." >&2
    exit 1
fi
