#!/usr/bin/env bash
# How the weights in this folder were made:  bash weight/compact/recipe.sh PICTURES FOLDER
# A tenth of the pictures was kept to judge by; the GPU saw 672 of the other 1,134.
# Started again with the same FOLDER it goes on from where it was.  PYTHON may be set.
set -euo pipefail
[ $# = 2 ] || { echo "usage: bash weight/compact/recipe.sh PICTURES FOLDER" >&2; exit 2; }
pictures=$(realpath "$1") folder=$(realpath -m "$2") python=$(realpath -s "$(command -v "${PYTHON:-python}")")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
run=R_0.05to0.60_T_3_B_32

common=(--cs_ratio 0.05-0.6 --train_dir "$pictures" --cache_dir "$folder/cache" --loss log_mse --clip 1
        --invertible none --precision bf16)

store() {  # weights FROM a run TO a folder, in fp16
    "$python" - "$1" "$2" <<'EOF'
import sys
from model import IDM
IDM.from_checkpoint(sys.argv[1]).half().save_pretrained(sys.argv[2])
EOF
}

# From nothing, on one core
"$python" train.py --base_model compact --width 48 --shuffle 2 --attention none "${common[@]}" \
    --model_dir "$folder/1" --log_dir "$folder/1/log" --testset_name Samples --patch_size 64 --batch_size 4 \
    --iters_per_epoch 500 --epoch 100 --max_iters 15000 --learning_rate 8e-4 --lr_schedule constant --warm_up 100 \
    --ema 0.998 --seed 2041
store "$folder/1/$run/pretrained" "$folder/start"

# Larger batches and crops, on a GPU, and a decay
"$python" train.py --base_model "$folder/start" "${common[@]}" --model_dir "$folder/2" --log_dir "$folder/2/log" \
    --testset_name none --patch_size 96 --batch_size 48 --iters_per_epoch 500 --epoch 100 --max_iters 991 \
    --learning_rate 1e-3 --lr_schedule constant --warm_up 100 --ema 0.998 --seed 3041 --num_workers 8
"$python" train.py --decay_from "$folder/2/$run" "${common[@]}" --model_dir "$folder/3" --log_dir "$folder/3/log" \
    --testset_name none --patch_size 96 --batch_size 48 --iters_per_epoch 554 --epoch 1 \
    --learning_rate 1e-3 --ema 0.99 --seed 3041 --num_workers 8
store "$folder/3/$run/pretrained" "$folder/gpu"

# On one core again, and a decay
"$python" train.py --base_model "$folder/gpu" "${common[@]}" --model_dir "$folder/4" --log_dir "$folder/4/log" \
    --testset_name Samples --patch_size 96 --batch_size 8 --accumulate 2 --iters_per_epoch 50 --epoch 100 \
    --max_iters 1369 --learning_rate 7e-4 --lr_schedule constant --warm_up 50 --ema 0.995 --seed 5043 --num_workers 0
"$python" train.py --decay_from "$folder/4/$run" "${common[@]}" --model_dir "$folder/5" --log_dir "$folder/5/log" \
    --testset_name Samples --patch_size 96 --batch_size 8 --accumulate 2 --iters_per_epoch 240 --epoch 1 \
    --learning_rate 7e-4 --ema 0.98 --seed 5043 --num_workers 0
store "$folder/5/$run/pretrained" "$folder/compact"
