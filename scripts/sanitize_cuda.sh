#!/usr/bin/env bash
# Runs tests/cpp/decode_driver.cpp, which compares the CUDA kernels with the CPU code, under what watches memory and
# races.
#   bash scripts/sanitize_cuda.sh [PYTHON [PART...]]
# Parts: gpu (default), the four tools of compute-sanitizer on a GPU; emulated, the compiler's sanitizers on this CPU.
# A line per tool at the end: passed, failed, or not available and why. Exit code 0: all passed; 1: one failed; 3: none
# failed, but one could not run, which is never a pass.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-python3}
parts=${*:2}
generator=$(command -v ninja > /dev/null && echo Ninja)
summary=()
PATH=$PATH:/usr/local/cuda/bin  # where the toolkit lies if nobody has said so
failed=0 missing=0

report() { # TOOL STATE [DETAIL]
    summary+=("$(printf '%-28s %s' "$1" "$2${3:+ ($3)}")")
    case $2 in
        failed) failed=1 ;;
        "not available") missing=1 ;;
    esac
}

build() { # FOLDER TARGET OPTION...
    local folder=$1 target=$2
    mkdir -p "$folder"
    {
        cmake -S . -B "$folder" ${generator:+-G "$generator"} -DSAFECODE_TESTS=ON "${@:3}" \
            -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v "$python")" &&
            cmake --build "$folder" --target "$target" --parallel
    } > "$folder/log" 2>&1 || { tail -n 20 "$folder/log" && false; }
}

emulated() { # SANITIZERS
    local folder=build/sanitized_${1%%,*}
    if build "$folder" emulated_driver -DSAFECODE_SANITIZE="$1" && "$folder/tests/cpp/emulated_driver"; then
        report "emulated, $1" passed
    else
        report "emulated, $1" failed
    fi
}

on_gpu() { # TOOL
    local log=build/compute_sanitizer_$1.log code
    compute-sanitizer --tool "$1" --error-exitcode 99 build/cuda_driver/tests/cpp/cuda_driver > "$log" 2>&1
    code=$?
    if [ $code -eq 0 ] && grep -q 'runs agree with the CPU code' "$log"; then
        report "GPU, $1" passed
    elif grep -qi 'device not supported' "$log"; then
        report "GPU, $1" "not available" "compute-sanitizer refuses the device"
    else
        tail -n 40 "$log"
        report "GPU, $1" failed "exit code $code, $log"
    fi
}

gpu() {
    local reason='' capability tool
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d .)
    if [ -z "$capability" ]; then
        reason="no GPU here"
    elif ! command -v compute-sanitizer > /dev/null; then
        reason="compute-sanitizer is not in PATH"
    elif ! command -v nvcc > /dev/null; then
        reason="nvcc is not in PATH"
    elif ! build build/cuda_driver cuda_driver "-DSAFECODE_CUDA_ARCHITECTURES=${capability/#90/90a}-real" \
        -DCMAKE_CUDA_FLAGS=-lineinfo; then
        report "GPU, build" failed
        reason="the driver could not be built"
    fi
    for tool in memcheck racecheck initcheck synccheck; do
        if [ -n "$reason" ]; then report "GPU, $tool" "not available" "$reason"; else on_gpu $tool; fi
    done
}

for part in ${parts:-gpu}; do
    case $part in
        gpu) gpu ;;
        emulated)
            emulated address,undefined
            emulated thread
            ;;
        *)
            echo "sanitize_cuda.sh: there is no part '$part'; legal: gpu, emulated" >&2
            exit 2
            ;;
    esac
done

printf '\n'
printf '%s\n' "${summary[@]}"
if [ $failed = 1 ]; then exit 1; fi
if [ $missing = 1 ]; then exit 3; fi
