#!/usr/bin/env bash
# How the weights in this folder were made:  bash weight/compact/recipe.sh PICTURES FOLDER
# (A tenth of the pictures was kept to judge by.)  Started again with the same FOLDER it goes on from where it was.
# PYTHON may be set.
set -euo pipefail
[ $# = 2 ] || { echo "usage: bash weight/compact/recipe.sh PICTURES FOLDER" >&2; exit 2; }
pictures=$(realpath "$1") folder=$(realpath -m "$2") python=$(realpath -s "$(command -v "${PYTHON:-python}")")
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1

"$python" train.py --base_model compact --width 48 --shuffle 2 --attention none --cs_ratio 0.05-0.6 \
    --train_dir "$pictures" --cache_dir "$folder/cache" --model_dir "$folder" --log_dir "$folder/log" \
    --testset_name Samples --patch_size 64 --batch_size 4 --iters_per_epoch 500 --epoch 100 --max_iters 15000 \
    --learning_rate 8e-4 --lr_schedule constant --warm_up 100 --loss log_mse --clip 1 --ema 0.998 \
    --invertible none --precision bf16 --seed 2041
"$python" - "$folder/R_0.05to0.60_T_3_B_32/pretrained" "$folder/compact" <<'EOF'
import sys
from model import IDM
IDM.from_checkpoint(sys.argv[1]).half().save_pretrained(sys.argv[2])
EOF
