#!/bin/bash
# ./run.sh [SEED...] repeats the runs of this record (1 x NVIDIA H100 80GB HBM3).
# DATA_PATH and TOKENIZER_PATH may be set before; relative ones are looked up here and in the folders above.
set -euo pipefail
cd "$(dirname "$0")"
export DATA_PATH="${DATA_PATH:-data/datasets/fineweb10B_sp8192_caseops}"
export TOKENIZER_PATH="${TOKENIZER_PATH:-data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model}"
export TRAIN_SEQ_SCHEDULE=1024@0.4,2048@1
export ITERATIONS=100000
export MAX_WALLCLOCK_SECONDS=240.0
export GPTQ_RESERVE_SECONDS=0.5
export TRAIN_BATCH_TOKENS=196608
export BATCH_SCHEDULE=0.5@0.65,1@1
export VAL_BATCH_TOKENS=131072
export TRAIN_LOG_EVERY=25
export ENABLE_LOOPING_AT=0.5
export MUON_MOMENTUM_WARMUP_STEPS=300
export AUDIT=1
export TTT_CHUNK_SIZE=32
export PHASED_TTT_PREFIX_DOCS=500
export GLOBAL_TTT_LR=0.03
for seed in ${*:-42}; do
  SEED=$seed RUN_ID=seed$seed torchrun --standalone --nproc_per_node="${NPROC:-1}" train_gpt.py
done
