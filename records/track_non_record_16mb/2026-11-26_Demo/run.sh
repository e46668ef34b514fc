#!/bin/bash
# ./run.sh [SEED...] repeats the runs of this record (1 x cpu (2 threads)).
# DATA_PATH and TOKENIZER_PATH may be set before; relative ones are looked up here and in the folders above.
set -euo pipefail
cd "$(dirname "$0")"
export DATA_PATH="${DATA_PATH:-data/datasets/stdlib}"
export TOKENIZER_PATH="${TOKENIZER_PATH:-data/tokenizers/stdlib.model}"
export VOCAB_SIZE=2048
export TRAIN_SEQ_LEN=256
export TRAIN_ORDER=strided
export MAX_WALLCLOCK_SECONDS=175.0
export GPTQ_RESERVE_SECONDS=0.0
export TRAIN_BATCH_TOKENS=2048
export MICRO_BATCH_TOKENS=1024
export VAL_LOSS_EVERY=250
export NUM_LAYERS=3
export MODEL_DIM=128
export NUM_HEADS=4
export NUM_KV_HEADS=2
export MLP_MULT=3.0
export XSA_LAST_N=0
export NUM_LOOPS=0
export PARALLEL_START_LAYER=2
export QK_GAIN_INIT=2.0
export MUON_MOMENTUM=0.95
export MUON_MOMENTUM_WARMUP_STEPS=100
export EMA_DECAY=0.98
export WARMDOWN_FRAC=0.7
export EVAL_SEQ_LEN=256
export EVAL_MODE=sliding
export AUDIT=1
for seed in ${*:-42 314 999}; do
  SEED=$seed RUN_ID=seed$seed torchrun --standalone --nproc_per_node="${NPROC:-1}" train_gpt.py
done
