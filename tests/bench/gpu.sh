#!/bin/sh
# What BENCHMARKS.md says of a GPU, measured in one go: figures (JSON) and what each bench printed (txt), into FOLDER.
#
#     tests/bench/gpu.sh FOLDER [PART ...]
#
# Parts, in this order by default: tests decode kernels http bfloat16 int8 precision reuse prefill peer context.
# Each has a limit of its own (seconds), so that one that hangs takes nobody else's time. The books for precision are
# looked for in $TEXT. PYTHON is the interpreter, by default python3; WORKERS (14) run the tests.
set -u
folder=$1
shift
[ $# -gt 0 ] || set -- tests decode kernels http bfloat16 int8 precision reuse prefill peer context
python=${PYTHON:-python3}
recipe=tests/fixtures/recipes/gla-1.3B-100B
export PYTHONUNBUFFERED=1
mkdir -p "$folder"

run() { # NAME SECONDS MODULE [ARGUMENT ...]: a bench, its figures in NAME.json
    name=$1 seconds=$2 module=$3
    shift 3
    timeout "$seconds" "$python" -m "tests.bench.$module" "$@" --json "$folder/$name.json" >"$folder/$name.txt" 2>&1
    echo "$name: exit $?, $(($(date +%s) - begun)) s"
}

engine() { # NAME SECONDS [ARGUMENT ...]: tests.bench.engine on the 1.3B shape
    name=$1 seconds=$2
    shift 2
    run "$name" "$seconds" engine --model $recipe --load-format dummy "$@"
}

for part in "$@"; do
    begun=$(date +%s)
    case $part in
    tests)
        timeout 200 "$python" -m pytest -m gpu -n "${WORKERS:-14}" -q --ignore tests/e2e >"$folder/tests.txt" 2>&1
        echo "tests: exit $?, $(($(date +%s) - begun)) s: $(tail -n 1 "$folder/tests.txt")"
        # A server wants the device for itself.
        timeout 120 "$python" -m pytest -m gpu -q tests/e2e >"$folder/servers.txt" 2>&1
        echo "servers: exit $?, $(($(date +%s) - begun)) s: $(tail -n 1 "$folder/servers.txt")"
        ;;
    decode) engine decode 150 --ops decode,mixed,gaps --steps 64 ;;
    prefill) engine prefill 90 --ops prefill,profile --batch 1,32,256 --lengths 512,2048,8192,32768 ;;
    bfloat16 | int8) engine "$part" 120 --state-dtype "$part" --ops decode,mixed --steps 64 --batch 1,32,256,1024 ;;
    kernels) run kernels 200 kernels ;;
    http) run http 200 http --checkpoint $recipe --streams 256 --tokens 512 ;;
    reuse) run reuse 90 reuse --model $recipe --load-format dummy ;;
    precision) run precision 90 precision --text "$TEXT" --tokens 1024 ;;
    context) engine context 90 --ops context ;;
    peer) run peer 150 fla_model --model $recipe ;;
    *)
        echo "no such part: $part" >&2
        exit 2
        ;;
    esac
done
