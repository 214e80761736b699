#!/usr/bin/env bash
# What only a GPU can tell, in one command and under 8 minutes on one device: fused kernels, 16-bit training, NCCL, ZeRO,
# exact resume, speed. Nothing of it could be run where villa_ds was written; what it prints is to be kept and compared.
#
#     bash benchmarks/gpu_check.sh [OUT]        # in an environment with `pip install -e '.[demo,dev]'` and a CUDA torch
#
# Each part prints PASS or FAIL and goes on; the exit status counts the failures. Logs are in OUT (default: gpu_check).
set -u
out=${1:-gpu_check}
mkdir -p "$out"
failures=0
python -c "import torch; raise SystemExit(not torch.cuda.is_available())" || {
    echo "no CUDA device that torch can use: nothing to check"
    exit 2
}
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$((gpus > 1 ? 2 : 1))

part() { # name, seconds, command...
    local name=$1 limit=$2 started=$SECONDS
    shift 2
    if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
        echo "PASS $name ($((SECONDS - started)) s)"
    else
        echo "FAIL $name ($((SECONDS - started)) s): $out/$name.log"
        failures=$((failures + 1))
    fi
}

run() { # output, overrides...: 30 steps of the demo's pre-training, the last 15 adversarial
    local output=$1
    shift
    deepspeed --log_level warning --num_gpus "$ranks" --module villa_ds train demo-pretrain data.root="$out/shards" \
        output="$out/$output" phases.0.steps=15 phases.1.steps=15 optimizer.warmup_steps=5 data.workers=2 \
        engine.name=deepspeed "$@"
}

learns() { # the loss of the last steps is finite and below that of the first
    python - "$out/$1/metrics.jsonl" <<'PYTHON'
import json, math, statistics, sys

rows = [json.loads(line) for line in open(sys.argv[1]) if '"lr"' in line]
losses = [row.get("loss", row.get("perturbed_loss")) for row in rows]
assert len(rows) == 30, f"{len(rows)} steps"
assert all(map(math.isfinite, losses)), losses
by_task = {}
for row, loss in zip(rows, losses):
    by_task.setdefault(row["objective"], []).append(loss)
print({task: (values[0], values[-1]) for task, values in by_task.items()})
print("tokens/s, median:", statistics.median(row["tokens_per_s"] for row in rows[5:]))
PYTHON
}

trained() {
    run "$@" && learns "$1"
}

resumed() { # killed hard in the middle, started again: the same losses as without, to what atomics on a GPU allow
    run undisturbed engine.ds_config=zero1 checkpoints.every=5 || return 1
    run killed engine.ds_config=zero1 checkpoints.every=5 &
    local job=$!
    while [ "$(grep -c '"lr"' "$out/killed/metrics.jsonl" 2>/dev/null || echo 0)" -lt 12 ]; do
        kill -0 $job 2>/dev/null || break
        sleep 0.2
    done
    pkill -9 -P $job
    kill -9 $job
    wait $job
    run killed engine.ds_config=zero1 checkpoints.every=5 && python - "$out" <<'PYTHON'
import json, sys

def losses(run):
    return [row.get("loss") for row in map(json.loads, open(f"{sys.argv[1]}/{run}/metrics.jsonl")) if "lr" in row]

pairs = list(zip(losses("undisturbed"), losses("killed"), strict=True))
print("largest difference:", max(abs(a - b) for a, b in pairs))
assert all(abs(a - b) <= 1e-3 * max(1.0, abs(a)) for a, b in pairs)
PYTHON
}

part doctor 60 villa-ds doctor
part shards 120 villa-ds shards demo "$out/shards"
part float32 90 trained float32 engine.ds_config=zero1 engine.precision=float32
part bfloat16_zero2 90 trained bfloat16 engine.ds_config=zero2 engine.precision=bfloat16
part float16_zero1 90 trained float16 engine.ds_config=zero1 engine.precision=float16
part bfloat16_zero3 90 trained zero3 engine.ds_config=zero3 engine.precision=bfloat16
part fused_adam 150 trained fused engine.ds_config=zero1 engine.precision=bfloat16 optimizer.name=fused_adam
part activation_checkpointing 90 trained recompute engine.ds_config=zero1 model.activation_checkpointing=true
part clean_graph_recomputed 90 trained clean engine.ds_config=zero1 phases.1.adversary.clean_graph=recompute
part compiled 240 trained compiled engine.ds_config=zero1 engine.precision=bfloat16 engine.compile=true
part resume 150 resumed
cat "$out/doctor.log"
grep -h "tokens/s, median\|largest difference" "$out"/*.log
echo "$failures failures"
exit "$failures"
