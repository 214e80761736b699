#!/usr/bin/env bash
# The whole story on real images: shards, standard then adversarial pre-training, question answering without and with the
# adversary, evaluation on the untouched test split. Through the deepspeed launcher, two ranks. Started again, it goes on
# where it stopped.
#
#     launch/quickstart.sh [FOLDER] [key=value ...]     # recipe keys for every run, such as engine.ds_config=zero2
set -euo pipefail
out=${1:-quickstart}
shift || true
python=${PYTHON:-python3}
ranks=${RANKS:-2}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 # one thread a rank: ranks that share cores must not fight for them
fi

train() {
    echo "== villa-ds train $*"
    deepspeed --log_level warning --num_accelerators "$ranks" --module villa_ds train "$@" engine.name=deepspeed
}

mkdir -p "$out"
[ -e "$out/shards" ] || "$python" -m villa_ds shards demo "$out/shards"

train demo-pretrain data.root="$out/shards" output="$out/pretrain" "$@"
train demo-vqa data.root="$out/shards" initialize="$out/pretrain" output="$out/vqa-standard" phases.0.adversary=null "$@"
train demo-vqa data.root="$out/shards" initialize="$out/pretrain" output="$out/vqa-villa" "$@"
for run in vqa-standard vqa-villa; do
    "$python" -m villa_ds evaluate demo-vqa checkpoint="$out/$run" \
        data.root="$out/shards" data.validation.easy_vqa=vqa/test "$@"
done

echo
echo "Held-out results: pre-training on validation images, question answering on the test split"
"$python" -m villa_ds compare "$out"/{pretrain,vqa-standard,vqa-villa}
echo
echo "Curves: tensorboard --logdir $out     (or $out/*/metrics.jsonl, one JSON object per optimizer step)"
