#!/usr/bin/env bash
# How the weights in this folder were made:  bash weight/compact/recipe.sh PICTURES FOLDER
# (Theirs were rounded to fp16 between most runs, and a tenth of the pictures was kept to judge by.)
# Started again with the same FOLDER it goes on from where it was.  PYTHON may be set.
set -euo pipefail
[ $# = 2 ] || { echo "usage: bash weight/compact/recipe.sh PICTURES FOLDER" >&2; exit 2; }
pictures=$(realpath "$1") folder=$(realpath -m "$2") python=$(realpath -s "$(command -v "${PYTHON:-python}")")
cd "$(dirname "$0")/../.."
run=R_0.05to0.60_T_3_B_32/pretrained
export OMP_NUM_THREADS=1

train() {  # PROCESSES NAME OPTIONS: the run called NAME
    "$python" -m torch.distributed.run --standalone --nproc_per_node "$1" train.py --cs_ratio 0.05-0.6 \
        --train_dir "$pictures" --testset_name Samples --clip 1 --ema 0.998 --invertible none --iters_per_epoch 500 \
        --learning_rate 3e-4 --cache_dir "$folder/cache" --model_dir "$folder/$2" --log_dir "$folder/$2/log" "${@:3}"
}

train 1 first --base_model compact --patch_size 64 --batch_size 2 --epoch 8 --warm_up 80
train 2 second --base_model "$folder/first/$run" --patch_size 96 --batch_size 1 --epoch 5 --lr_schedule cosine
train 2 third --base_model "$folder/second/$run" --patch_size 96 --batch_size 2 --epoch 6 --lr_schedule cosine
train 2 fourth --base_model "$folder/third/$run" --patch_size 96 --batch_size 4 --epoch 6 --lr_schedule cosine \
    --iters_per_epoch 250 --learning_rate 4e-4
train 2 fifth --base_model "$folder/fourth/$run" --patch_size 128 --batch_size 3 --epoch 5 --lr_schedule cosine \
    --iters_per_epoch 250 --learning_rate 4e-4 --max_iters 1125
train 2 sixth --base_model "$folder/fifth/$run" --patch_size 128 --batch_size 3 --epoch 5 --lr_schedule cosine \
    --iters_per_epoch 250 --learning_rate 4e-4
train 2 seventh --base_model "$folder/sixth/$run" --patch_size 128 --batch_size 3 --epoch 3 --lr_schedule cosine \
    --iters_per_epoch 250 --seed 2027 --ema 0.996
train 1 eighth --base_model "$folder/seventh/$run" --patch_size 128 --batch_size 6 --loss log_mse --lr_schedule constant \
    --warm_up 30 --epoch 100 --iters_per_epoch 100 --max_iters 438 --seed 2031 --ema 0.995
train 1 release --decay_from "$folder/eighth/R_0.05to0.60_T_3_B_32" --patch_size 128 --batch_size 6 --loss log_mse \
    --epoch 2 --iters_per_epoch 85 --seed 2031 --ema 0.98
"$python" - "$folder/release/$run" "$folder/compact" <<'EOF'
import sys
from model import IDM
IDM.from_checkpoint(sys.argv[1]).half().save_pretrained(sys.argv[2])
EOF
