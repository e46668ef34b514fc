"""Trains the best language model that fits in 16,000,000 bytes, writes it as one artifact, and scores that artifact.

    token shards -> train (Muon + Adam, EMA) -> quantize -> compress -> artifact on disk
                                                                            |
    bits per byte of the validation text  <-  model rebuilt from those bytes

    torchrun --standalone --nproc_per_node=8 train_gpt.py     eight GPUs (any number that divides the batch)
    python train_gpt.py                                       one GPU
    set -a; . presets/laptop.env; set +a; python train_gpt.py a laptop's CPU
    EVAL_ONLY=logs/run.artifact python train_gpt.py           score an artifact
    PREFLIGHT=1 python train_gpt.py                           check data, disk, memory and size, then stop
    python train_gpt.py --help                                all settings; each is an environment variable

The sections read like the pipeline, and each uses only names from sections above it:
config, runtime, data, kernels, model, optim, schedules, train, quantize, compress, evaluate, test-time training, main.

Shapes: T tokens of a packed micro-batch, D model width, H query heads, K key/value heads, E head width, F MLP width,
V vocabulary, L layers. A batch is one row of T tokens that holds many documents: a segment is a piece of one document,
at most TRAIN_SEQ_LEN tokens long, and attention never leaves a segment.
"""
import contextlib, difflib, fnmatch, functools, hashlib, io, json, lzma, math, os, re, signal, struct, sys, time
import gc, importlib.metadata, importlib.util, inspect, shutil, types, warnings, zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast, get_args, get_type_hints

# torch takes seconds to import: until main decides otherwise, Ctrl-C just ends the process
if __name__ == "__main__": signal.signal(signal.SIGINT, signal.SIG_DFL)

import brotli, constriction, sentencepiece, torch, zstandard
import numpy as np, torch.distributed as dist, torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

# pyright: reportInvalidTypeForm=false
TRITON = "triton", "triton.language", "triton.language.extra.cuda.libdevice"
try: triton, tl, libdevice = map(cast(Any, importlib.import_module), TRITON)
except ImportError: triton = tl = libdevice = cast(Any, None)
constexpr = tl and tl.constexpr
VERSION, MIN_TORCH = "0.1.0", (2, 11)
SIZE_LIMIT_BYTES = 16_000_000  # decimal; artifact plus packed code
LIMIT_SECONDS = 600  # of training with calibration, and of reloading with evaluation
BOS = 1  # begin of document, the same id in every published tokenizer
EMPTY: Mapping[Any, Any] = {}  # a default that nobody changes


class UserError(ValueError):
    """A mistake of the user or a fault of the machine, printed without a traceback: what, its value, the remedy."""


def require(holds: object, complaint: str) -> None:
    """UserError with this complaint where something does not hold."""
    if not holds: raise UserError(complaint)


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def refusing(kinds: type[Exception] | tuple[type[Exception], ...], text: str):
    """Turns errors of these kinds into UserErrors with this text, in which {} is what the error says."""
    try:
        yield
    except kinds as error:
        raise UserError(text.replace("{}", f"{getattr(error, 'strerror', None) or first_line(error):.200}")) from None


# ====================================================================================================================
# 1. config: environment variables -> one frozen Config. Every setting is a field; its variable is the name in capitals.
#    Nothing else reads the environment, but World.start for the variables that torchrun sets.
# ====================================================================================================================


# Kinds of numbers besides plain ones, which are finite and at least 0: (type, whether it holds, the complaint if not)
Count = Annotated[int, lambda value: value > 0, "must be above 0"]
Positive = Annotated[float, lambda value: value > 0, "must be above 0"]
Fraction = Annotated[float, lambda value: value <= 1, "is a fraction, at most 1"]
Decay = Annotated[float, lambda value: value < 1, "must be below 1"]


@dataclass(frozen=True)
class Config:
    """All settings. The comment of a field is its help; fractions are of the training progress in [0, 1]."""

    # --- run
    run_id: str = ""  # name of the run's files in LOG_DIR; empty = date and time
    seed: int = 1337  # of the initial weights
    log_dir: str = "logs"  # folder of logs, checkpoints and artifacts
    artifact_path: str = ""  # empty = LOG_DIR/RUN_ID.artifact
    resume: str = ""  # checkpoint to continue from
    preflight: bool = False  # check everything, project seconds and bytes, stop before training
    checkpoint_every_seconds: float = 0.0  # seconds between checkpoints in training; 0 = only at its end and on signals
    device: Literal["auto", "cuda", "cpu"] = "auto"  # what computes
    compile: Literal["auto", "0", "1"] = "auto"  # torch.compile: auto = on CUDA
    cuda_graphs: bool = True  # a compiled micro-batch is replayed as one CUDA graph; 0 = kernel by kernel
    attention: Literal["auto", "fa3", "fa4", "varlen", "sdpa"] = "auto"  # auto = the first that is there
    fused_kernels: bool = True  # kernels of Triton and quack in training, where they are faster; 0 = what torch makes
    fp8_matmul: bool = False  # blocks multiply in 8-bit floats, forward, in training
    deterministic: bool = False  # equal runs give equal numbers on a GPU too, at some cost in speed
    allow_oversize: bool = False  # a submission above 16,000,000 bytes is no error
    # --- data
    data_dir: str = "./data"  # holds datasets/ and tokenizers/
    data_path: str = ""  # folder of fineweb_{train,val}_*.bin; empty = DATA_DIR/datasets/fineweb10B_spVOCAB_SIZE
    tokenizer_path: str = ""  # SentencePiece model; empty = DATA_DIR/tokenizers/fineweb_VOCAB_SIZE_bpe.model
    vocab_size: Count = 8192  # pieces; must equal the tokenizer's
    train_seq_len: Count = 2048  # tokens of the longest attention segment in training
    document_mask: bool = True  # segments begin at document starts; 0 = plain rows of TRAIN_SEQ_LEN tokens
    train_seq_schedule: str = ""  # longest segment over time, as 1024@0.1,2048@0.7,3072@1; empty = TRAIN_SEQ_LEN
    train_order: Literal["sequential", "strided", "shuffled"] = "sequential"  # else rows of TRAIN_SEQ_LEN from all over
    max_leaked_documents: int = 0  # validation documents that may occur in the training shards
    # --- training length
    iterations: Count = 20000  # optimizer steps at most
    max_wallclock_seconds: float = 600.0  # of training and calibration; 0 = run ITERATIONS
    gptq_reserve_seconds: float = 8.0  # kept back from the wallclock for calibration on training data
    force_stop_step: int = 0  # stop after this step, schedules unchanged; 0 = off
    warmup_steps: int = 3  # throw-away steps per graph that compile before the clock starts
    train_batch_tokens: Count = 786432  # tokens per optimizer step over all ranks
    batch_schedule: str = ""  # share of TRAIN_BATCH_TOKENS over time, as 0.5@0.1,1@1; learning rates go with its root
    micro_batch_tokens: Count = 98304  # tokens per forward pass and rank; not set, 1/8 of a batch it does not divide
    val_batch_tokens: Count = 524288  # tokens per scoring batch over all ranks; halved where memory runs out
    val_docs: int = 0  # only the first documents are scored, which is not an official score; 0 = all
    val_loss_every: int = 0  # steps between validations in training, outside the clock; 0 = only at the end
    train_log_every: int = 0  # steps between progress lines; 0 = about 20 lines
    # --- model
    num_layers: Count = 11  # physical layers
    model_dim: Count = 512  # D
    num_heads: Count = 8  # H, query heads
    num_kv_heads: Count = 4  # K, key/value heads; query head h reads h // (H / K)
    mlp_mult: Positive = 4.0  # F = D x this
    mlp_hidden: int = 0  # F; 0 = by MLP_MULT
    mlp_activation: Literal["leaky2", "swiglu"] = "leaky2"  # leaky_relu(x)^2, or two up projections of width F
    leaky_relu_slope: Fraction = 0.5  # of leaky2; 0 = ReLU^2
    projection_norm: bool = False  # RMS norm before the output and the down projection
    tie_embeddings: bool = True  # the embedding is also the head
    embed_dim: int = 0  # width of embedding and head, with projections to D and back; 0 = D
    vocab_bias: bool = False  # learned bias of each token's logit
    logit_softcap: Positive = 30.0  # logits = cap x tanh(logits / cap)
    softcap_type: Literal["tanh", "poly5", "two_sided"] = "two_sided"  # learned caps above and below 0
    rope_base: Positive = 10000.0  # of the rotation frequencies
    rope_dims: int = 16  # channels per head that rotate; 0 = no positions
    rope_scaling: Literal["none", "ntk", "yarn"] = "none"  # for longer contexts than TRAIN_SEQ_LEN
    rope_stretch: float = 0.0  # of rope_scaling, in training too; 0 = EVAL_SEQ_LEN / TRAIN_SEQ_LEN in evaluation only
    value_residual: bool = False  # values are blended with the first layer's, in layers behind the loops
    ln_scale: bool = True  # block inputs are scaled by 1 / sqrt(layer + 1)
    xsa_last_n: int = 11  # layers, from the end, with exclusive self attention; 0 = off, more than there are = all
    skip_gates_enabled: bool = True  # U-Net skips are gated blends; 0 = weighted sums
    num_loops: int = 2  # extra passes over layers LOOP_START..LOOP_END; 0 = no depth recurrence
    loop_start: int = 3  # first looped layer
    loop_end: int = 5  # last looped layer
    depth_lora_rank: int = 0  # adapters of queries and values for each visit of a looped layer; 0 = off
    parallel_start_layer: int = 8  # from here attention and MLP run on two lanes; 0 = off
    gptj_block: bool = False  # other layers' attention and MLP read the same input
    attn_gate: Literal["sparse", "dense", "output"] = "sparse"  # per head; reads GATE_WINDOW channels, dense all
    sparse_attn_gate_scale: float = 0.5  # sparse: sigmoid(scale x W x); 0 = no such gate
    gate_window: Count = 12  # channels that the head gate and the smear gate read
    smear_gate: Literal["off", "input", "static", "mean"] = "input"  # blends in the token before; mean = all before
    bigram_hash_buckets: int = 0  # rows of a table of hashed token pairs, added to the embedding; 0 = off
    bigram_hash_dim: Count = 128  # its width
    bigram_hash: Literal["92821", "36313", "1000003", "31"] = "92821"  # the hash, by its multiplier
    # --- model, what matters in training alone
    tied_embed_init_std: float = 0.005  # of the embedding
    embed_init: Literal["normal", "overtone"] = "normal"  # overtone: singular values fall with the root of their index
    matrix_init: Literal["orthogonal", "uniform"] = "orthogonal"  # uniform: within 1 / sqrt(columns)
    resid_mix_init: Literal["identity", "phase"] = "identity"  # phase: early layers read x0, late ones the stream
    z_loss: float = 0.0  # weight of logsumexp(logits)^2 in training
    qk_gain_init: float = 5.0  # start of the learned gain on normalized queries
    enable_looping_at: Fraction = 0.35  # fraction at which looping starts
    # --- optimizer
    matrix_lr: float = 0.026  # Muon
    tied_embed_lr: float = 0.03  # Adam, embedding
    embed_lr: float = 0.6  # the same where TIE_EMBEDDINGS=0
    head_lr: float = 0.008  # Adam, head, where TIE_EMBEDDINGS=0
    scalar_lr: float = 0.02  # Adam, everything small
    muon_momentum: Fraction = 0.97  # after the warm-up
    muon_momentum_warmup_start: Fraction = 0.92  # at step 0
    muon_momentum_warmup_steps: int = 1500  # steps; 0 = constant
    muon_backend_steps: Count = 5  # Newton-Schulz steps
    muon_coefficients: Literal["polar", "quintic"] = "polar"  # of Newton-Schulz: Polar Express or quintic
    muon_row_normalize: bool = True  # rows of the update get unit norm before Newton-Schulz (MuonEq-R)
    normuon_beta2: Decay = 0.0  # rows of the orthogonal update are divided by their running size (NorMuon); 0 = off
    muon_wd: float = 0.095  # decoupled weight decay, times the learning rate
    muon_wd_after: bool = False  # decay after the update instead of before it
    wd_taper_start_frac: Fraction = 0.0  # fraction from which MUON_WD falls linearly; 0 = off
    wd_taper_final_mult: float = 0.5  # to this share of it
    embed_wd: float = 0.085  # the same for the embedding
    adam_wd: float = 0.02  # the same for everything small
    beta1: Decay = 0.9  # Adam
    beta2: Decay = 0.99  # Adam
    adam_eps: Positive = 1e-8  # Adam
    grad_clip_norm: float = 0.3  # global norm of the reduced gradient; 0 = off
    ema_decay: Decay = 0.9965  # per step, of the averaged weights that are shipped; 0 = ship the last weights
    swa_start_frac: Fraction = 0.0  # below this learning rate multiplier snapshots are averaged and shipped; 0 = off
    swa_every: Count = 50  # steps between snapshots (of the EMA where EMA_DECAY is on)
    warmdown_frac: Fraction = 0.85  # fraction at the end over which the learning rates fall
    warmdown_iters: int = 0  # the same in steps; 0 = by WARMDOWN_FRAC
    min_lr: Fraction = 0.1  # floor of the learning rate multiplier
    qat_start: Fraction = 0.0  # fraction from which matrices are trained through the quantizer; 0 = off
    late_qat_threshold: Fraction = 0.0  # the same by the learning rate multiplier: from below this; 0 = off
    qat_embedding: bool = False  # the embedding too
    qat_noise: bool = False  # looped layers get noise of the quantizer's step instead
    # --- artifact
    matrix_quantizer: Literal["tcq", "gptq", "rtn", "fp16"] = "tcq"  # banks: tcq = GPTQ over a trellis
    embed_quantizer: Literal["tcq", "gptq", "rtn", "fp16"] = "tcq"  # of embedding and head
    quant_overrides: str = ""  # for some matrices, as k_proj:-[12]=fp16,*:[3-7]=tcq/5,up_proj:loop=gptq/7/13
    quant_sensitivity: Fraction = 0.5  # how far steps follow what a row's errors cost, instead of its size
    gptq_calibration_batches: Count = 16  # micro-batches of training text for calibration, over all ranks
    target_bytes: int = 15990000  # of artifact and code: all steps grow or shrink to it; 0 = steps as MATRIX_BITS says
    matrix_bits: int = 6  # per weight of the banks, where its step is made of them; 2 = ternary, 1 = binary (rtn)
    embed_bits: int = 7  # the same for the embedding
    attn_clip_sigmas: Positive = 13.0  # a row's last level is at this many standard deviations
    mlp_clip_sigmas: Positive = 11.5  # the same for the MLP
    embed_clip_sigmas: Positive = 14.0  # the same for the embedding
    compressor: Literal["rans", "brotli", "zstd", "lzma", "zlib"] = "rans"  # of the codes: rans = order-0 coder
    # --- evaluation
    eval_seq_len: Count = 2048  # tokens of the longest context
    eval_stride: Count = 64  # tokens between sliding windows
    eval_temperature: float = 1.0  # divides logits; 0 = what suits training text no step saw; artifacts keep it
    eval_mode: Literal["packed", "sliding", "adapted"] = "adapted"  # the score; packed: each token once, cheap
    eval_only: str = ""  # artifact to score; nothing is trained
    eval_budget_seconds: Positive = 590.0  # of evaluation: adaptation stops where more would be needed, scoring never
    ngram_order: int = 16  # n-gram smoothing: what followed the same tokens before, up to n - 1, gets a share; 0 = off
    audit: bool = False  # behind the score: a sample is scored again with a token changed, for what that may not change
    # --- test-time training, where EVAL_MODE=adapted
    ttt_strategy: Literal["documents", "stream"] = "documents"  # adapters for each document, or all weights in a row
    ttt_order: Literal["stream", "length"] = "stream"  # of the documents: the text's own, or longest first
    ttt_batch_size: Count = 64  # documents side by side
    ttt_chunk_size: Count = 24  # tokens that are scored before the adapters learn from them
    ttt_chunk_schedule: str = ""  # the same for documents up to some length, as 8@256,24@2000
    ttt_back_tokens: int = 48  # before a chunk: they go through the model again, so that adapters learn from them too
    ttt_targets: str = "q,k,v,out,mlp,head"  # what has adapters
    ttt_lora_rank: Count = 80  # of the adapters
    ttt_lora_alpha: Positive = 144.0  # adapters are scaled by this / TTT_LORA_RANK
    ttt_lora_lr: float = 1e-4  # of the adapters' optimizer
    ttt_optimizer: Literal["adamw", "sgd"] = "adamw"  # of adapters, and of the weights where TTT_STRATEGY=stream
    ttt_weight_decay: float = 0.5  # of adamw
    ttt_beta1: Decay = 0.0  # of adamw
    ttt_beta2: Decay = 0.99  # of adamw
    ttt_warm_start_a: bool = False  # the inner matrices of adapters go on to the next documents in their place
    phased_ttt_num_phases: int = 3  # times that all weights learn from the scored prefix; 0 = never
    phased_ttt_prefix_docs: int = 2500  # documents of the prefix
    global_ttt_lr: float = 0.001  # of the weights
    global_ttt_momentum: Decay = 0.9  # of sgd
    global_ttt_epochs: int = 1  # over each chunk
    global_ttt_chunk_tokens: int = 32768  # of a step over all ranks, at least; 0 = a document (stream)
    global_ttt_grad_clip: float = 1.0  # global norm; 0 = off
    ttt_freeze_blocks: int = 0  # first layers whose weights stay as they are
    ttt_unsafe_multi_epoch: int = 0  # epochs over the text before it is scored: shows what is not legal (PR #532)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> tuple["Config", list[str]]:
        """Environment -> (Config, notes for the log). UserError names the variable, the value and the remedy."""
        values, origin, notes = {}, {}, []
        for variable in sorted(environ.keys() - NAMES): refuse_near_miss(variable)
        for variable in sorted(filter(NAMES.__contains__, environ), key=ALIASES.__contains__):
            name, value = resolve(variable, (text := environ[variable]).strip())
            # nan, which is not equal to itself, is in (nan,)
            require(values.get(name, value) in (value,), f"{variable}={text} contradicts {origin.get(name)}: set one")
            if name: values[name], origin[name] = value, f"{variable}={text}"
            else: notes.append(f"{variable}={text} {value or 'has no effect of its own here'}")
        batch = values.get("train_batch_tokens", 0)
        if "micro_batch_tokens" not in values and batch % cls.micro_batch_tokens:  # 8 a step, as in published scripts
            values["micro_batch_tokens"] = batch // 8 or 1
        return cls(**values), notes

    def __post_init__(self):
        shown = {f.name: f"{f.name.upper()}={getattr(self, f.name)}" for f in fields(self)}
        for condition, complaint in self.checks(): require(condition, complaint.format_map(shown))

    def checks(self) -> Iterator[tuple[object, str]]:
        """Yields (holds, complaint) for every rule; {field} in a complaint is shown as FIELD=value."""
        for f in fields(self):
            value, kind, known = getattr(self, f.name), KINDS[f.name], CHOICES.get(f.name, ())
            yield kind not in (int, float) or 0 <= value < (2 ** 63 if kind is int else math.inf), \
                f"{{{f.name}}}: must be a finite number, at least 0"
            if rule := getattr(f.type, "__metadata__", None): yield rule[0](value), f"{{{f.name}}}: {rule[1]}"
            yield not known or value in known, f"{{{f.name}}}: must be one of {', '.join(known)}"
        yield from self.rules()

    def rules(self) -> Iterator[tuple[object, str]]:
        """The same for those between settings."""
        for pair in ("model_dim num_heads", "num_heads num_kv_heads", "train_batch_tokens micro_batch_tokens"):
            whole, part = pair.split()
            yield getattr(self, whole) % getattr(self, part) == 0, f"{{{whole}}} is not divisible by {{{part}}}"
        yield self.model_dim >= max(self.gate_window, 2), "{model_dim}: must be at least 2 and {gate_window}"
        yield self.mlp_hidden > 0 or float(self.mlp_mult * self.model_dim).is_integer(), \
            "{mlp_mult} x {model_dim} is no whole width: change one of them"
        yield self.rope_dims in range(0, self.head_dim + 1, 2), f"{{rope_dims}}: must be even, at most {self.head_dim}"
        yield not 0 < self.rope_stretch < 1, "{rope_stretch}: must be 0, or at least 1"
        yield self.gate_window <= (self.embed_dim or self.model_dim), "{gate_window}: at most {model_dim}, {embed_dim}"
        yield not self.parallel_start_layer or self.num_layers // 2 <= self.parallel_start_layer < self.num_layers, \
            "{parallel_start_layer}: lanes are for the second half of {num_layers}; 0 = off"
        if self.num_loops:
            yield self.loop_start <= self.loop_end < self.num_layers, "{loop_start} {loop_end}: no part of {num_layers}"
            yield not 0 < self.parallel_start_layer <= self.loop_end, \
                "{loop_end}: must be below {parallel_start_layer}, joined lanes do not part; NUM_LOOPS=0 = no loops"
        yield self.num_loops or not self.depth_lora_rank, "{depth_lora_rank} {num_loops}: adapters need looped layers"
        yield not self.value_residual or self.num_loops == 0 or self.loop_end + 1 < self.num_layers, \
            "VALUE_RESIDUAL=1 {loop_end}: no layer behind the loops takes the first layer's values"
        floor = self.min_lr if self.warmdown_frac or self.warmdown_iters else 1.0
        for name in ("swa_start_frac", "late_qat_threshold"):
            yield not 0 < getattr(self, name) <= floor, f"{{{name}}}: never reached: {{min_lr}} {{warmdown_frac}}"
        yield not (self.qat_start and self.late_qat_threshold), "{qat_start} {late_qat_threshold}: set one of them"
        for name, full in (("train_seq_schedule", self.train_seq_len), ("batch_schedule", 1)):
            values, ends = zip(*parse_schedule(getattr(self, name), name.upper()) or [(full, 1)])
            yield list(ends) == sorted(set(ends)) and ends[-1] == 1 and min(values) > 0 and max(values) == full \
                and (full == 1 or all(float(value).is_integer() for value in values)), \
                f"{{{name}}}: needs values above 0, the largest {full}, at rising fractions up to 1 (tokens: whole)"
        yield self.vocab_size <= 65536, "{vocab_size}: shards hold 16-bit tokens, at most 65536"
        yield self.train_order == "sequential" or self.micro_batch_tokens % self.train_seq_len == 0, \
            "{micro_batch_tokens} is no whole number of rows of {train_seq_len}, as {train_order} needs: change one"
        yield self.eval_stride <= self.eval_seq_len, "{eval_stride}: must be at most {eval_seq_len}"
        yield 0.5 <= (self.eval_temperature or 1) <= 2, "{eval_temperature}: must be 0.5 to 2, or 0 = fitted"
        yield not 0 < self.max_wallclock_seconds <= self.gptq_reserve_seconds, \
            "{gptq_reserve_seconds}: leaves nothing of {max_wallclock_seconds}"
        for bits, quantizer in (("matrix_bits", "matrix_quantizer"), ("embed_bits", "embed_quantizer")):
            yield 1 + (getattr(self, quantizer) in ("gptq", "tcq")) <= getattr(self, bits) <= 8, \
                f"{{{bits}}} {{{quantizer}}}: must be 2 to 8, or 1 with rtn"
        targets = self.ttt_targets.split(",")
        yield len({*targets} & {*TTT_TARGETS}) == len(targets), f"{{ttt_targets}}: some of {TTT_TARGETS}, each once"
        yield all(chunk.is_integer() and chunk >= 1 <= longest for chunk, longest in parse_schedule(
            self.ttt_chunk_schedule, "TTT_CHUNK_SCHEDULE")), "{ttt_chunk_schedule}: needs whole tokens, as 8@256"
        yield (self.eval_mode, self.ttt_strategy, self.smear_gate) != ("adapted", "documents", "mean"), \
            "{eval_mode} {smear_gate}: chunks know no mean of all before; EVAL_MODE=sliding or TTT_STRATEGY=stream"
        yield self.ttt_freeze_blocks <= self.num_layers, "{ttt_freeze_blocks}: there are {num_layers}"
        yield self.ttt_strategy == "stream" or self.global_ttt_chunk_tokens > 0 == self.ttt_unsafe_multi_epoch, \
            "{global_ttt_chunk_tokens} {ttt_unsafe_multi_epoch}: 0 and more than 0 are for TTT_STRATEGY=stream"
        yield not self.ngram_order or (self.ngram_order > 3 and self.ttt_order == "stream"), \
            "{ngram_order} {ttt_order}: needs 4 or more, and its counts run in the order of the text; 0 = off"
        yield self.target_bytes <= 16_000_000 or self.allow_oversize, "{target_bytes}: the limit is 16,000,000"
        most = len(NEWTON_SCHULZ[self.muon_coefficients])
        yield self.muon_backend_steps <= most, f"{{muon_backend_steps}}: at most {most}, {{muon_coefficients}}"

    def overrides(self) -> dict[str, Any]:
        """{variable: value} of the settings that differ from the defaults."""
        return {f.name.upper(): getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    def accumulation_steps(self, world_size: int, share: float = 1.0) -> int:
        """Micro-batches per rank in a step of a share of the batch. UserError where they do not divide it evenly."""
        count = share * self.train_batch_tokens / (world_size * self.micro_batch_tokens)
        require(count >= 1 and count.is_integer(), f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} (times {share:g}) is "
                f"no multiple of {world_size} processes x MICRO_BATCH_TOKENS={self.micro_batch_tokens}: change one")
        return int(count)

    head_dim = property(lambda self: self.model_dim // self.num_heads)
    seq_lens = property(lambda self: {self.train_seq_len, *map(int, dict(parse_schedule(self.train_seq_schedule)))})
    mlp_dim = property(lambda self: self.mlp_hidden or int(self.mlp_mult * self.model_dim))
    embedding_lr = property(lambda self: self.tied_embed_lr if self.tie_embeddings else self.embed_lr)
    small_group = property(lambda self: max(self.ttt_batch_size // 8, 1))  # of long documents, side by side


# Newton-Schulz coefficients (a, b, c) per step: x <- a x + (b A + c A^2) x with A = x x^T.
NEWTON_SCHULZ = {"quintic": ((3.4445, -4.7750, 2.0315),) * 10,  # Keller Jordan's Muon
    # Polar Express (arXiv:2505.16932) as in PR #1787: the optimal odd polynomial for each step; all a, all b, all c
    "polar": (*zip(
        (8.156554524902461, 4.042929935166739, 3.8916678022926607, 3.285753657755655, 2.3465413258596377),
        (-22.48329292557795, -2.808917465908714, -2.772484153217685, -2.3681294933425376, -1.7097828382687081),
        (15.878769915207462, 0.5000178451051316, 0.5060648178503393, 0.46449024233003106, 0.42323551169305323)),)}
TTT_TARGETS = ("q", "k", "v", "out", "mlp", "head")
CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Config).items() if get_args(hint)}
KINDS: dict[str, type] = {f.name: type(f.default) for f in fields(Config)}  # bool, int, float or str
FAMILY_WORDS = {"TTT", "EMA", "SWA", "GPTQ", "LQER", "MUON", "LOOP", "LOOPS", "LOOPING", "ROPE", "XSA", "QAT", "SMEAR",
                "SMEARGATE", "LORA", "WARMDOWN", "BIGRAM", "SOFTCAP", "DOC", "PREQUANT", "INT4", "BITNET", "VAL"}


def parse_value(variable: str, text: str, kind: Any) -> Any:
    """'1' -> True, 1, 1.0 or '1'. UserError names the variable."""
    text, wanted = text.strip(), {bool: "0 or 1", int: "a whole number", float: "a number"}.get(kind)
    with refusing((ValueError, KeyError), f"{variable}={text}: must be {wanted}"):
        return {"0": False, "1": True, "false": False, "true": True}[text.lower()] if kind is bool else kind(text)


def parse_schedule(text: str, variable: str = "") -> list[tuple[float, float]]:
    """'1024@0.1,2048@1' -> [(1024.0, 0.1), (2048.0, 1.0)]: each value holds until that fraction of the training."""
    with refusing(ValueError, f"{variable}={text}: must look like 1024@0.1,2048@1"):
        return [(float(value), float(until)) for value, until in (part.split("@") for part in text.split(",") if text)]


def accepted(table: str, note: str | None = None) -> dict[str, Any]:
    """'A=0 B=1,x' -> the rows of ALIASES for variables without a field and the values that pass; the note says why."""
    return {name: dict.fromkeys(values.split(","), ("", note)) for name, values in re.findall("(\\w+)=(\\S*)", table)}


# Other published names -> ours, or {value: (our field, its value), or None where we do so anyway, or ("", what the log
# says of it)}; other values are refused.
ALIASES: dict[str, str | dict[str, tuple[str, Any] | None]] = {
    "MUON_WEIGHT_DECAY": "muon_wd", "ADAM_WEIGHT_DECAY": "adam_wd", "EMBED_WEIGHT_DECAY": "embed_wd",
    "SIZE_TARGET": "target_bytes", "BIGRAM_DIM": "bigram_hash_dim", "TTT_EVAL_SEQ_LEN": "eval_seq_len",
    "VAL_BATCH_SIZE": "val_batch_tokens", "TIED_EMBEDDING_LR": "tied_embed_lr", "EMBEDDING_BITS": "embed_bits",
    "SKIP_GATE_ENABLED": "skip_gates_enabled", "BIGRAM_VOCAB_SIZE": "bigram_hash_buckets", "TOKEN_ORDER": "ngram_order",
    **{f"TTT_{name}": f"global_ttt_{name.lower()}" for name in ("LR", "EPOCHS", "MOMENTUM", "GRAD_CLIP")},
    "SMEAR_GATE_ENABLED": {"0": ("smear_gate", "off"), "1": ("smear_gate", "input")},
    "USE_SMEARGATE": {"0": ("smear_gate", "off"), "1": ("smear_gate", "static")},
    "SPARSE_ATTN_GATE_ENABLED": {"0": ("sparse_attn_gate_scale", 0.0), "1": ("attn_gate", "sparse")},
    **{name: {"0": None, "1": ("attn_gate", "dense")} for name in ("GATED_ATTN_ENABLED", "GATED_ATTENTION")},
    "ATTN_OUT_GATE_ENABLED": {"0": None, "1": ("attn_gate", "output")}, "TTT_MLP_LORA": {"1": None},
    "NGRAM_TILT_ENABLED": {"0": ("ngram_order", 0), "1": ("ngram_order", 16)},
    "LATE_QAT": {"0": ("late_qat_threshold", 0.0), "1": None}, "SWA_ENABLED": {"0": ("swa_start_frac", 0.0), "1": None},
    "EMA_ENABLED": {"0": ("ema_decay", 0.0), "1": None}, "TTT_ENABLED": {"0": None, "1": ("eval_mode", "adapted")},
    "PHASED_TTT_ENABLED": {"0": ("phased_ttt_num_phases", 0), "1": ("eval_mode", "adapted")}, "TTT_O_LORA": {"1": None},
    "TTT_K_LORA": {"0": ("ttt_targets", "q,v,out,mlp,head"), "1": None}, "TTT_CHUNK_TOKENS": "global_ttt_chunk_tokens",
    "TTT_MASK": {"no_qv": ("ttt_targets", "k,out,mlp,head"), "": None},
    "COMPRESSOR": {"pergroup": ("", "means rans"), **{name: ("compressor", name) for name in CHOICES["compressor"]}},
    **accepted("LQER_ENABLED=0,1 LQER_ASYM_ENABLED=0,1 LQER_RANK=2,4,6 LQER_TOP_K=1,3,4 LQER_FACTOR_BITS=4 "
               "LQER_ASYM_GROUP=32,64 AWQ_LITE_ENABLED=0,1", "is not needed: tcq leaves less error at the same size"),
    **accepted("SMEAR_GATE_BOS_FIX=0,1", "changes nothing here: no token is ever smeared into another document"),
    **accepted("ASYM_LOGIT_RESCALE=0,1", "changes nothing, as published; SOFTCAP_TYPE=two_sided trains its caps"),
    **accepted("TOKEN_THRESHOLD=0.8,0.800 TOKEN_BOOST=2.625", "is not needed: shares follow from counts"),
    **accepted("GATED_ATTN_QUANT_GATE=0,1", "changes nothing here: gates are kept in float16"),
    **accepted("CASEOPS_ENABLED=0,1", "chooses no data here: DATA_PATH and TOKENIZER_PATH do"),
    **accepted("PARALLEL_FINAL_LANE=mean SPARSE_ATTN_GATE_INIT_STD=0,0.0 FUSED_CE_ENABLED=0,1 QAT_ENABLED=0 "
               "ROPE_YARN=0 OPTROT_ENABLED=0 MUON_HUBER_WD=0 TTT_UPDATE_EVERY=1 TTT_GRAD_STEPS=1 AGREE_ADD_BOOST=0.0 "
               "GLOBAL_TTT_OPTIMIZER=sgd MATRIX_CLIP_SIGMAS=12.85 QK_GAIN_INIT_SCHEDULE= TTT_LORA_EMA_DECAY=0.0 "
               "NGRAM_HINT_PRECOMPUTE_OUTSIDE=0 WITHIN_TAU=99.0 WITHIN_BOOST=0.0 WORD_TAU=99.0 WORD_BOOST=0.0")}
NAMES = {name.upper(): name for name in KINDS} | ALIASES


def resolve(variable: str, text: str) -> tuple[str, Any]:
    """A variable of NAMES -> (our field or "" for no effect, value). UserError for a value that it cannot have."""
    meaning = NAMES[variable]
    if isinstance(meaning, str): return meaning, parse_value(variable, text, KINDS[meaning])
    require(text.lower() in meaning, f"{variable}={text}: is not supported here; drop it or set {' or '.join(meaning)}")
    return meaning[text.lower()] or ("", None)


def refuse_near_miss(variable: str) -> None:
    """UserError for a variable that looks meant for us but is none of NAMES; others pass."""
    close = difflib.get_close_matches(variable, NAMES, 1, 0.87)
    if variable == "COMPILER" or not (close or FAMILY_WORDS & set(variable.split("_"))): return
    guess = close or difflib.get_close_matches(variable, NAMES, 1, 0.5)
    hint = f"did you mean {guess[0]}?" if guess else "no setting has this name."
    raise UserError(f"{variable}: unknown setting; {hint} See --help; unset it if it is not meant for this program")


def help_text() -> str:
    """The title and one line per setting, made from the comments of Config."""
    comments = dict(re.findall(r"^    (\w+): .+? = .+?  # (.*)$", Path(__file__).read_text("latin1"), re.MULTILINE))
    lines = (f"  {f.name.upper()}={f.default}".ljust(38) + comments.get(f.name, "") for f in fields(Config))
    return "\n".join([(__doc__ or "").strip(), "", "Settings (environment variables) and their defaults:", *lines])


# ====================================================================================================================
# 2. runtime: World = which process this is, its device, and the few values that processes agree on; the log; signals.
#    In: Config and torchrun's variables. Out: a World and a Log. The only place that knows torch.distributed's setup.
# ====================================================================================================================


@dataclass
class World:
    """Process `rank` of `size` on `device`. Sums and agreements travel over gloo on the CPU, tensors over NCCL."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # of activations: bfloat16 where the device computes in it, else float32

    @classmethod
    def start(cls, config: Config, environ: Mapping[str, str]) -> "World":
        """Joins torchrun's process group, if any. UserError for a device that is missing or cannot do it."""
        given = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | dict(environ)
        rank, size, local = (parse_value(name, given[name], int) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        require(size == 1 or "RANK" in environ, f"WORLD_SIZE={size} without RANK: start with torchrun, or unset it")
        device = choose_device(config, local)
        if on_gpu := device.type == "cuda": torch.cuda.set_device(device)
        half = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
        config.accumulation_steps(size)
        if "RANK" in environ and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        torch.set_float32_matmul_precision("high")
        # what equal runs need, here or in the audit: cuBLAS and inductor read their variables later
        torch.use_deterministic_algorithms(config.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": f"{config.deterministic:d}"}
        return cls(rank, size, device, torch.bfloat16 if half else torch.float32)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64."""
        buffer = torch.tensor(values, dtype=torch.float64)
        if self.size > 1: dist.all_reduce(buffer)
        return buffer.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        values = [value] * self.size
        if self.size > 1: dist.all_gather_object(values, value)
        return values

    def synchronize(self) -> None:
        """Waits for this rank's device."""
        if self.device.type == "cuda": torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Largest allocation so far: of the GPU, else of the process."""
        if self.device.type == "cuda": return torch.cuda.max_memory_allocated()
        import resource  # ru_maxrss is in bytes on macOS, in KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def describe(self) -> str:
        if self.device.type == "cpu": return f"cpu ({torch.get_num_threads()} threads)"
        return f"{torch.cuda.get_device_name()} (compute capability {torch.cuda.get_device_capability()})"


def choose_device(config: Config, local: int) -> torch.device:
    """auto -> cuda, else cpu. UserError where the asked device is missing or cannot serve this process."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()): return torch.device("cpu")
    require(torch.cuda.is_available(), "DEVICE=cuda: torch finds no CUDA device; check the driver or use DEVICE=cpu")
    require(local < (n := torch.cuda.device_count()), f"{local + 1} or more ranks, {n} GPUs: lower --nproc_per_node")
    return torch.device("cuda", local)


class Log:
    """One event per line, to the terminal and the run's file; rank 0 only. Other ranks' lines vanish."""

    def __init__(self, world: World, config: Config):
        self.path, self.file = Path(config.log_dir) / f"{config.run_id}.txt", None
        if world.rank == 0:
            with naming_path(self.path, "LOG_DIR"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "a", buffering=1)  # noqa: SIM115 - open as long as the program runs

    def __call__(self, text: str, to_terminal: bool = True) -> None:
        if self.file:
            with naming_path(self.path, "LOG_DIR"): self.file.write(text + "\n")
            if to_terminal: print(text, flush=True)

    def progress(self, text: str) -> None:
        """Overwrites one line of the terminal, if there is one; empty text clears it."""
        if self.file and sys.stderr.isatty(): print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def naming_path(path: Path, variable: str) -> contextlib.AbstractContextManager[None]:
    """Turns OSError into a UserError that names the file and the variable that moves it elsewhere.

    RuntimeError too: torch.save's writer turns a full disk into that.
    """
    return refusing((OSError, RuntimeError), f"{path}: {{}}; free the space or the permission, or set {variable}")


def write_atomic(path: Path, write: Callable[[Any], Any], variable: str) -> None:
    """Calls write(file) on a temporary name, renames: `path` is old or new, never half. UserError for a full disk."""
    temporary = path.with_name(f".{path.name}.part")
    with naming_path(path, variable), contextlib.ExitStack() as stack:
        path.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(temporary.unlink, missing_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


class StopRequest:
    """SIGINT and SIGTERM. While `deferred` (in training) the first one only sets `received`; else it ends the program.

    A launcher passes a Ctrl-C on that the terminal has sent to us already: repeats within two seconds count once.
    """

    def __init__(self):
        self.deferred, self.received, self.received_at, self.ending = False, False, 0.0, False

    def handle(self, number: int, frame: Any) -> None:
        if self.deferred and not self.received: self.received, self.received_at = True, time.monotonic()
        elif not self.received or time.monotonic() - self.received_at > 2:
            self.ending = True
            raise KeyboardInterrupt


# ====================================================================================================================
# 3. data: shard files -> one circular training stream and the validation tokens with their byte counts.
#    Micro-slice m is tokens [m T, m T + T] of all shards in a row (or the m-th set of rows from all over them), for any
#    number of ranks, its longest segments first: a batch is a function of the step alone, so every world size sees the
#    same data and resuming needs no state. No shard's tail is dropped; orders of rows leave out the last part of a row,
#    once for all shards.
# ====================================================================================================================

SHARD_MAGIC, SHARD_HEADER_INTS = 20240520, 256
SPACE = "\u2581"  # in the pieces of a SentencePiece model
PREPARE_HINT = "python data/prepare.py SOURCE... makes shards from any text"


def resolve_path(text: str) -> Path:
    """A path as given, or, when absent, below a parent folder of this file: copies in records/*/* find data/ too."""
    places = [Path(text), *(parent / text for parent in Path(__file__).resolve().parents)]
    return next((place for place in places if place.exists()), places[0])


def read_shard(path: Path) -> np.ndarray:
    """Shard file -> its tokens (n,) uint16, memory-mapped. UserError for a file that is none, or not a whole one."""
    with refusing(OSError, f"{path}: {{}}; make it readable"):
        size, header = path.stat().st_size, np.fromfile(path, "<i4", SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != 1:
        raise UserError(f"{path}: no token shard (its header does not start with {SHARD_MAGIC}, 1); {PREPARE_HINT}")
    require(size == (expected := 4 * SHARD_HEADER_INTS + 2 * int(header[2])),
            f"{path}: {size} bytes, its header promises {expected}: truncated or altered; make it again")
    require(header[2], f"{path}: holds no tokens; remove it or make it again")
    return np.memmap(path, "<u2", "r", offset=4 * SHARD_HEADER_INTS)


class TokenStream:
    """Shards in a row, read as if they were one array that repeats for ever."""

    def __init__(self, paths: Sequence[Path]):
        self.shards = [read_shard(path) for path in paths]
        self.offsets = np.cumsum([0, *map(len, self.shards)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def slice(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count), start modulo the length -> (count,) uint16."""
        parts, start = [], start % len(self)
        while count > 0:
            shard = int(np.searchsorted(self.offsets, start, "right")) - 1
            parts.append(part := self.shards[shard][start - self.offsets[shard]:][:count])
            count, start = count - len(part), (start + len(part)) % len(self)
        return np.concatenate(parts)


class Segments(NamedTuple):
    """Where attention may look: token t sees tokens boundaries[s] <= u <= t of its own segment s."""

    boundaries: Tensor  # (S + 1,) int32: segment starts, then T; repeated T = empty segments that keep the shape fixed
    positions: Tensor  # (T,) int32: index of each token in its segment
    max_length: int  # no segment is longer


class Batch(NamedTuple):
    ids: Tensor  # (1, T) int64
    targets: Tensor  # (1, T) or (1, T, C) int64
    segments: Segments


def cut_segments(ids: np.ndarray, seq_len: int, document_mask: bool) -> np.ndarray:
    """Segment starts in ids (T,): 0, every BOS (if document_mask), and every seq_len tokens after those."""
    starts = np.union1d([0], np.flatnonzero(ids == BOS)) if document_mask else np.zeros(1, np.int64)
    counts = -(-np.diff(starts, append=len(ids)) // seq_len)  # pieces of each document
    return np.repeat(starts - (np.cumsum(counts) - counts) * seq_len, counts) + np.arange(counts.sum()) * seq_len


def longest_first(starts: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment starts (S,) in `total` tokens -> those of the same segments in order of length, where each token was.

    Attention's kernels end evenly when the longest come first; nothing else depends on the order.
    """
    lengths = np.diff(starts, append=total)
    order = np.argsort(-lengths, kind="stable")
    moved = np.cumsum(lengths[order]) - lengths[order]
    return moved, np.arange(total) + np.repeat(starts[order] - moved, lengths[order])


def make_segments(starts: np.ndarray, total: int, seq_len: int, num_segments: int) -> Segments:
    """starts (S,) of segments in `total` tokens -> Segments; padded to num_segments unless that is 0.

    Padded segments promise max_length = seq_len whatever the lengths, so that compiled graphs see one shape.
    """
    lengths = np.diff(starts, append=total)
    assert len(starts) <= (num_segments or len(starts)) and lengths.max() <= seq_len, (len(starts), lengths.max())
    boundaries = np.pad(starts, (0, max(num_segments - len(starts), 0) + 1), constant_values=total).astype(np.int32)
    positions = np.arange(total, dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    longest = seq_len if num_segments else int(lengths.max())
    return Segments(torch.from_numpy(boundaries), torch.from_numpy(positions), longest)


def make_batch(inputs: np.ndarray, targets: np.ndarray, segments: Segments) -> Batch:
    """inputs (T,), targets (T,) or (T, C) -> Batch; contiguous, since another layout would be another graph."""
    ids, labels = (torch.from_numpy(np.ascontiguousarray(x, np.int64))[None] for x in (inputs, targets))
    return Batch(ids, labels, segments)


def window_batch(config: Config, window: np.ndarray, seq_len: int, num_segments: int = 0) -> Batch:
    """T + 1 tokens in a row -> a batch of their segments and next tokens."""
    starts = cut_segments(window[:-1], seq_len, config.document_mask)
    return make_batch(window[:-1], window[1:], make_segments(starts, len(window) - 1, seq_len, num_segments))


def map_tensors(change: Callable[..., Any], batch: Batch, *others: Batch) -> Batch:
    """The batch with change(tensor, the others' ...) for each of its tensors."""
    return tree_map(lambda part, *rest: change(part, *rest) if isinstance(part, Tensor) else part, batch, *others)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies the tensors of a batch (pinned ones without waiting)."""
    return map_tensors(lambda x: x.to(device, non_blocking=True), batch)


def coprime_stride(rows: int) -> int:
    """A step through `rows` rows, about 0.618 of them long, that meets every row once before it meets one twice."""
    return next(stride for stride in range(max(round(rows * 0.6180339887), 1), rows + 2) if math.gcd(stride, rows) == 1)


@functools.lru_cache(2)
def shuffled_rows(rows: int, seed: int, epoch: int) -> np.ndarray:
    """-> (rows,): every row once, in an order of this seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


class TrainLoader:
    """micro(i, ...) = micro-batch i of this rank, prepared by a thread while the device works."""

    def __init__(self, config: Config, world: World, stream: TokenStream, num_segments: Mapping[int, int] = EMPTY):
        self.config, self.world, self.stream, self.num_segments = config, world, stream, num_segments
        self.worker, self.pending = ThreadPoolExecutor(1), dict[tuple[int, int], Any]()
        self.num_rows = max(len(stream) // config.train_seq_len, 1)
        self.stride = coprime_stride(self.num_rows)

    def build(self, index: int, seq_len: int) -> Batch:
        config, tokens = self.config, self.config.micro_batch_tokens
        row = tokens if config.train_order == "sequential" else config.train_seq_len
        first = (index * self.world.size + self.world.rank) * tokens // row
        rows = range(first, first + tokens // row)
        if config.train_order != "sequential": rows = [self.row(*divmod(i, self.num_rows)) for i in rows]
        windows = np.stack([self.stream.slice(i * row, row + 1) for i in rows])
        starts = np.concatenate([i * row + cut_segments(window[:-1], seq_len, config.document_mask)
                                 for i, window in enumerate(windows)])
        starts, places = longest_first(starts, tokens)
        segments = make_segments(starts, tokens, seq_len, self.num_segments.get(seq_len, 0))
        batch = make_batch(windows[:, :-1].reshape(-1)[places], windows[:, 1:].reshape(-1)[places], segments)
        return map_tensors(Tensor.pin_memory, batch) if self.world.device.type == "cuda" else batch

    def row(self, epoch: int, place: int) -> int:
        """Which row of TRAIN_SEQ_LEN tokens is next: by a stride, or in a new random order each epoch."""
        if self.config.train_order == "strided": return place * self.stride % self.num_rows
        return int(shuffled_rows(self.num_rows, self.config.seed, epoch)[place])

    def micro(self, index: int, seq_len: int) -> Batch:
        """Micro-batch `index` of this rank, with segments of up to seq_len tokens."""
        upcoming = [(index + ahead, seq_len) for ahead in range(3)]
        self.pending = {key: self.pending.get(key) or self.worker.submit(self.build, *key) for key in upcoming}
        return to_device(self.pending.pop(upcoming[0]).result(), self.world.device)

    def close(self) -> None:
        self.worker.shutdown(cancel_futures=True)


@dataclass
class Dataset:
    """Everything a run reads, checked."""

    train: TokenStream
    val_tokens: np.ndarray  # (n,) uint16
    val_bytes: np.ndarray  # (n - 1,) int64: bytes of text that target i = val_tokens[i + 1] stands for
    tokenizer_sha256: str  # "" without a tokenizer file
    fingerprint: str  # sha256 over validation tokens, their bytes and all training shards
    leaked_documents: int  # validation documents found in the training shards
    max_segments: dict[int, int]  # longest segment, of those in TRAIN_SEQ_SCHEDULE -> most segments of a micro-batch


def find_shards(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Folder -> (training, validation, validation byte sidecar) shards by name. UserError where one kind is missing."""
    train, val, sidecar = (sorted(folder.glob(f"fineweb_{kind}*.bin")) for kind in ("train", "val_[!b]", "val*_bytes"))
    for paths, kind in ((train, "train"), (val, "val")):
        require(paths, f"DATA_PATH={folder}: no fineweb_{kind}_*.bin in it; {PREPARE_HINT}")
    if sidecar and len(sidecar) != len(val):
        raise UserError(f"{folder}: {len(val)} validation shards, {len(sidecar)} byte sidecars: fetch what is missing")
    return train, val, sidecar


def document_bounds(ids: np.ndarray) -> np.ndarray:
    """ids (n,) -> (documents + 1,) starts of the documents, then n; what precedes the first BOS is one too."""
    return np.union1d(np.flatnonzero(ids == BOS), [0, len(ids)])


def document_keys(ids: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """A cheap 64-bit key per document, from its length and the sum of its tokens: equal documents have equal keys."""
    return np.add.reduceat(ids, bounds[:-1], dtype=np.uint64) << np.uint64(32) | np.diff(bounds).astype(np.uint64)


def digest(data: np.ndarray) -> bytes:
    """-> 16 bytes that tell arrays apart."""
    return hashlib.blake2b(np.ascontiguousarray(data).data, digest_size=16).digest()


class ShardScan(NamedTuple):
    """What one reading of a training shard tells."""

    sha256: str
    max_token: int
    max_segments: dict[int, int]  # longest segment -> most segments of a window that starts in this shard
    leaked: set[bytes]  # digests of documents that are also in validation


def scan_shard(stream: TokenStream, shard: int, keys: np.ndarray, digests: set[bytes], window_tokens: int,
               seq_lens: Iterable[int]) -> ShardScan:
    """Reads a shard once. Documents are looked up whole: one that continues in the next shard belongs to this one."""
    ids, end = np.array(stream.shards[shard]), int(stream.offsets[shard + 1])
    blocks = (range(first, min(first + (1 << 16), len(stream))) for first in range(end, len(stream), 1 << 16))
    found = (block[i] for block in blocks for i in np.flatnonzero(stream.slice(block[0], len(block)) == BOS))
    tail = next(found, len(stream)) - end  # the last document ends at the next BOS
    whole = np.concatenate((ids, stream.slice(end, tail))) if tail else ids
    bounds = document_bounds(whole)
    if shard and len(bounds) > 2 and whole[0] != BOS: bounds = bounds[1:]  # the head belongs to the previous shard
    candidates = np.flatnonzero(np.isin(document_keys(whole, bounds), keys))
    leaked = digests & {digest(whole[bounds[i]:bounds[i + 1]]) for i in candidates}
    starts = np.union1d(np.flatnonzero(np.concatenate((ids, stream.slice(end, window_tokens))) == BOS), 0)
    stops = starts[:np.searchsorted(starts, len(ids))] + window_tokens  # of windows that start with a document
    last, most = np.searchsorted(starts, stops) - 1, {}
    for length in seq_lens:
        before = np.cumsum([0, *-(-np.diff(starts) // length)])
        counts = before[last] - before[:len(last)] - (starts[last] - stops) // length
        most[length] = int(counts.max()) + 1  # starting x tokens earlier adds ceil(x / length), takes floor of it off
    return ShardScan(hashlib.sha256(ids.data).hexdigest(), int(ids.max()), most, leaked)


def open_dataset(config: Config, world: World) -> Dataset:
    """Finds, reads and checks training shards, validation shards, sidecar and tokenizer. UserError for any fault."""
    folder = resolve_path(config.data_path or f"{config.data_dir}/datasets/fineweb10B_sp{config.vocab_size}")
    require(folder.is_dir(), f"DATA_PATH={folder}: no such folder; {PREPARE_HINT}")
    train_paths, val_paths, sidecar_paths = find_shards(folder)
    train, val = TokenStream(train_paths), TokenStream(val_paths)
    val_tokens = val.slice(0, len(val))
    require(len(val_tokens) > 1, f"{val_paths[0]}: holds no target to score; {PREPARE_HINT}")
    check_tokens(int(val_tokens.max()), config, val_paths[0])
    tokenizer, sha256 = load_tokenizer(config, bool(sidecar_paths))
    val_bytes = read_sidecar(val, sidecar_paths, tokenizer) if sidecar_paths else table_bytes(val_tokens, tokenizer)
    bounds = document_bounds(val_tokens)[:(config.val_docs or len(val_tokens)) + 1]
    val_tokens, val_bytes = val_tokens[:bounds[-1] + 1], val_bytes[:bounds[-1]]
    keys = np.unique(document_keys(val_tokens, bounds))
    digests = {digest(val_tokens[a:b]) for a, b in zip(bounds[:-1], bounds[1:]) if b - a > 1}  # empty: all equal
    rows = 1 if config.train_order == "sequential" else config.micro_batch_tokens // config.train_seq_len
    window = config.micro_batch_tokens // rows
    by_rank = world.gather([scan_shard(train, i, keys, digests, window, config.seq_lens)
                            for i in range(world.rank, len(train.shards), world.size)])
    scans = [by_rank[i % world.size][i // world.size] for i in range(len(train.shards))]
    for scan, path in zip(scans, train_paths): check_tokens(scan.max_token, config, path)
    leaked = len(set().union(*(scan.leaked for scan in scans)))
    culprit = next((path for scan, path in zip(scans, train_paths) if scan.leaked), None)
    require(leaked <= config.max_leaked_documents, f"{culprit}: {leaked} of {len(digests)} validation documents occur "
            f"in training shards, first in this one; remove them, or accept them with MAX_LEAKED_DOCUMENTS={leaked}")
    parts = [hashlib.sha256(x.data).hexdigest() for x in (val_tokens, val_bytes)] + [scan.sha256 for scan in scans]
    fingerprint = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    most = {length: rows * (max(scan.max_segments[length] for scan in scans) if config.document_mask else
                            -(-window // length)) for length in config.seq_lens}
    return Dataset(train, val_tokens, val_bytes, sha256, fingerprint, leaked, most)


def check_tokens(top: int, config: Config, path: Path) -> None:
    require(top < (n := config.vocab_size), f"{path}: holds token {top}, outside VOCAB_SIZE={n}: set the shards' own")


def load_tokenizer(config: Config, optional: bool) -> tuple[Any, str]:
    """-> (SentencePiece processor or None, sha256 of the file). UserError for a missing or unsuitable model."""
    path = resolve_path(config.tokenizer_path or f"{config.data_dir}/tokenizers/fineweb_{config.vocab_size}_bpe.model")
    if optional and not config.tokenizer_path and not path.is_file(): return None, ""
    require(path.is_file(), f"TOKENIZER_PATH={path}: no such file, but it counts the bytes of the text; {PREPARE_HINT}")
    model = path.read_bytes()
    with refusing(RuntimeError, f"TOKENIZER_PATH={path}: not a SentencePiece model"):
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    require((size := tokenizer.vocab_size()) == config.vocab_size, f"TOKENIZER_PATH={path}: has {size} pieces, "
            f"VOCAB_SIZE={config.vocab_size}: set the one that made the shards")
    require((bos := tokenizer.bos_id()) in (BOS, -1), f"TOKENIZER_PATH={path}: its BOS is {bos}, shards use {BOS}")
    return tokenizer, hashlib.sha256(model).hexdigest()


def byte_table(tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SentencePiece model -> per id: bytes without the first space (int64), has that space, is no text (both bool)."""
    ids = range(tokenizer.vocab_size())
    silent = np.array([tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i) for i in ids])
    byte = np.array([tokenizer.is_byte(i) for i in ids])
    space = np.array([tokenizer.id_to_piece(i).startswith(SPACE) for i in ids]) & ~silent & ~byte
    size = np.array([len(tokenizer.id_to_piece(i).replace(SPACE, " ").encode()) for i in ids], np.int64)
    return np.where(silent, 0, np.where(byte, 1, size - space)), space, silent


def table_bytes(tokens: np.ndarray, tokenizer: Any) -> np.ndarray:
    """Validation tokens (n,) -> bytes of each target (n - 1,) int64, checked against decoded documents.

    A tokenizer that puts a space before every text drops it again when it decodes: then a leading space after BOS is
    no byte of the text. UserError where table and decoder disagree, or many documents encode to other tokens.
    """
    count, space, silent = byte_table(tokenizer)
    drops_space = any(not tokenizer.decode([int(i)]).startswith(" ") for i in np.flatnonzero(space & (count > 0))[:1])
    previous, target = tokens[:-1], tokens[1:]
    val_bytes, bounds = count[target] + (space[target] & ~(silent[previous] & drops_space)), document_bounds(tokens)
    documents, strange = len(bounds) - 1, 0  # strange: this tokenizer would have cut them differently
    sample = sorted({*range(min(8, documents)), *range(0, documents, max(documents // 24, 1))})
    for i in sample:
        ids, by_table = tokens[bounds[i] + 1:bounds[i + 1]].tolist(), val_bytes[bounds[i]:bounds[i + 1] - 1].sum()
        text = tokenizer.decode(ids)
        strange += tokenizer.encode(text) != ids
        require(by_table == len(text.encode()), f"validation document {i}: {by_table} bytes by the piece table, "
                f"{len(text.encode())} decoded: TOKENIZER_PATH does not fit these shards")
    require(10 * strange <= len(sample), f"TOKENIZER_PATH: encodes {strange} of {len(sample)} decoded validation "
            "documents to other tokens than the shards hold: set the tokenizer that made them")
    return val_bytes


def read_sidecar(val: TokenStream, paths: Sequence[Path], tokenizer: Any) -> np.ndarray:
    """Byte sidecar -> bytes of each validation target (n - 1,) int64.

    UserError where lengths differ, BOS has bytes, or, with the tokenizer, where pieces of ASCII letters do not count
    these and their space. CaseOps changes case and spaces only; but a normalizing tokenizer also makes a few ASCII
    letters of others, one piece in a thousand, and one space of many, in up to half of the pieces with a space.
    """
    for shard, path in zip(val.shards, paths):
        require((n := len(read_shard(path))) == len(shard), f"{path}: {n} counts, {len(shard)} tokens: make it again")
    counts, tokens = TokenStream(paths).slice(0, len(val)).astype(np.int64), val.slice(0, len(val))
    require(not counts[tokens == BOS].any(), f"{paths[0]}: counts bytes for BOS; it is not the sidecar of these shards")
    if tokenizer is not None:
        pieces = [tokenizer.id_to_piece(i).replace(SPACE, " ") for i in range(tokenizer.vocab_size())]
        length = np.array([len(p) if p.isascii() and p.strip().isalpha() else 0 for p in pieces], np.int64)[tokens]
        space, wrong = np.array([p[:1] == " " for p in pieces])[tokens], (length > 0) & (counts != length)
        place = int(wrong.argmax())
        require(1000 * (wrong & ~space).sum() <= len(length) and 2 * (wrong & space).sum() <= (length[space] > 0).sum(),
                f"{paths[0]}: counts {counts[place]} bytes for token {place} = {pieces[tokens[place]]!r}; it, or "
                "TOKENIZER_PATH, does not belong to these shards")
    return counts[1:]


# ====================================================================================================================
# 4. kernels: what training computes in its own way where the GPU can: products that end in what follows them (quack),
#    fused Triton kernels, products of 8-bit floats. Each does what plain torch does in section 5, which serves
#    everywhere else, in scoring too.
# ====================================================================================================================


Linear = Callable[[Tensor, Tensor], Tensor]  # x (T, K), weight (N, K) -> (T, N)
HEAD_ROWS, MIXED_ROWS = 2, 1  # tokens, and warps, of a program of kernels that work on heads, and of mix_norm


class Kernels(NamedTuple):
    """How the blocks multiply in training."""

    linear: Linear = F.linear
    head: Linear = F.linear
    look_up: Linear = F.embedding  # ids (T,), weight (V, D) -> (T, D)
    linear_add: Callable[..., Tensor] | None = None  # a product, and what it is added to
    leaky2: Callable[..., Tensor] | None = None  # the whole MLP
    rotate_heads: Callable[..., tuple[Tensor, ...]] | None = None  # norm, rotation, gain of heads
    exclude: Callable[..., Tensor] | None = None  # exclusive self attention, times a gate
    mix_norm: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] | None = None  # blend of streams, and its norm
    cross_entropy: Callable[..., Tensor] | None = None  # the head, its softcap and the nats
    note: str = ""  # for the log

    @property
    def names(self) -> str:
        """For the log: torch or fp8, and what is fused."""
        fused = [name for name in self._fields[3:-1] if getattr(self, name)]
        return "+".join(["torch" if self.linear is F.linear else "fp8", *fused]) + self.note


PLAIN = Kernels()


class Fp8Linear(torch.autograd.Function):
    """A product of e4m3 operands with float32 accumulation; its gradients multiply in the activations' dtype.

    Weights are scaled to their largest entry. Activations are not: behind a norm they fit, and a reduction over them
    would cost a pass over memory; what exceeds 448 is clamped.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        one, scale = torch.ones((), device=x.device), weight.abs().amax().float().clamp_min(1e-12) / 448
        a, b = x.clamp(-448, 448).to(torch.float8_e4m3fn), (weight / scale).to(torch.float8_e4m3fn)
        return torch._scaled_mm(a, b.t(), one, scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@functools.cache
def load_product() -> Callable[..., Tensor]:
    """-> product(a (M, K), b (K, N), end, **operands) -> (M, N): a b, ended in a way that costs no pass of its own.

    Ends: "plain"; "add", res (M, N), if that is not None, on top, in float32; "leaky2", leaky_relu(a b, slope)^2 with
    the sign of what was squared in the last bit, since the gradient needs no more of it; "leaky2_slope", a b times that
    activation's slope, from what "leaky2" gave, post (M, N). slope is at most 1. Products of quack, which flash-attn-4
    brings, on Hopper.
    """
    from cutlass import Float32, Int32, cute  # pyright: ignore[reportMissingImports]
    from cutlass._mlir.extras import types  # pyright: ignore[reportMissingImports]
    from cutlass._mlir_helpers import arith  # pyright: ignore[reportMissingImports]
    from quack.epilogue.frontend import gemm_epilogue  # pyright: ignore[reportMissingImports]
    from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]

    def bits(x): return Int32(arith.bitcast(x.ir_value(), types.i32()))
    def value(x): return Float32(arith.bitcast(x.ir_value(), types.f32()))
    def plain(acc): return {"D": acc}
    def add(acc, res): return {"D": acc + res}

    def leaky2(acc, slope):
        sign, z = bits(acc) >> 15 & 1 << 16, cute.arch.fmax(acc, acc * slope)  # 1 << 16: the last bit of a bfloat16
        return {"D": value(bits(z * z) + ((1 << 16) - sign) & -2 << 16 | sign)}  # the nearest number with that bit

    def leaky2_slope(acc, post, slope):
        root = value(bits(cute.math.sqrt(post, approx=True, ftz=True)) | bits(post) << 15)  # with the sign
        return {"D": (acc + acc) * cute.arch.fmax(root, root * slope)}

    ends = {name: gemm_epilogue()(end) for name, end in {
        "plain": plain, "add": add, "leaky2": leaky2, "leaky2_slope": leaky2_slope}.items()}
    wide, narrow = ({"config": GemmConfig(*tile, is_dynamic_persistent=False, cluster_m=m, cluster_n=3 - m)}
                    for tile, m in (((128, 192), 2), ((192, 128), 1)))  # the fastest of eleven tiles, on an H200

    def product(a: Tensor, b: Tensor, end: str = "plain", **operands: Any) -> Tensor:
        if operands.get("res", a) is None: end, operands = "plain", {}
        return ends[end](a, b, **operands, **(wide if b.size(1) > 1024 and end != "leaky2_slope" else narrow))["D"]

    x = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")  # quack is young: another version may not do
    require(product(x, x, "add", res=x)[0, 0] == 17, "quack: a product is wrong")
    return product


def differentiable(name: str, signature: str, forward: Any, backward: Any, finish: Callable, kept: int = 0) -> Any:
    """A torch operator that compiles, from (function, function that makes empty outputs) of both directions; backward
    may be None, where finish is all there is to do.

    signature has a letter for each input, for each output, and for what backward gives: T is a tensor, ? one or None, i
    and f are numbers, behind the tensors. backward takes the input tensors and the last `kept` outputs, the gradient of
    each output, None where nobody differentiates it, and the numbers. The inputs' gradients are finish(tensors that
    were kept, the outputs' gradients, what backward gave or None).
    """
    kinds, operators = {"T": "Tensor", "?": "Tensor?", "i": "int", "f": "float"}, []
    inputs, outputs, *found = signature.split()
    tensors, numbers = inputs.rstrip("if"), inputs.lstrip("T?")
    behind = tensors + "T" * kept + "?" * len(outputs) + numbers
    for suffix, taken, given, (function, empty) in (("", inputs, outputs, forward), (
            "_backward", behind, "".join(found), backward))[:1 + len(found)]:
        schema = ", ".join(f"{kinds[letter]} x{i}" for i, letter in enumerate(taken))
        schema = f"({schema}) -> ({', '.join(kinds[letter] for letter in given)})"
        operator: Any = torch.library.custom_op(f"train_gpt::{name}{suffix}", function, mutates_args=(), schema=schema)
        operator.register_fake(empty)
        operators.append(operator)

    def remember(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:len(tensors)], *(output[-kept:] if kept else ()))
        ctx.numbers = inputs[len(tensors):]
        ctx.set_materialize_grads(False)  # outputs that nobody differentiates would get zeros

    def gradient(ctx: Any, *grads: Tensor | None):
        given = [None if grad is None else grad.contiguous() for grad in grads]
        return finish(ctx.saved_tensors, given, backward and operators[1](*ctx.saved_tensors, *given, *ctx.numbers))

    operators[0].register_autograd(gradient, setup_context=remember)
    return operators[0]


def written(launch: Callable[..., None], empty: Callable[..., Any]) -> tuple[Any, Any]:
    """-> (a function of tensors, then numbers, that has launch(*numbers, *tensors, *outputs) write outputs, empty)"""
    def function(*inputs: Any) -> Any:
        outputs, numbers = empty(*inputs), [x for x in inputs if isinstance(x, int | float)]
        tensors = inputs[:len(inputs) - len(numbers)]
        launch(*numbers, *tensors, *((outputs,) if isinstance(outputs, Tensor) else outputs))
        return outputs
    return function, empty


def jitted(kernel: Callable[..., None]) -> Any:
    """-> the Triton kernel. ImportError where there is no Triton that these kernels know."""
    for name in TRITON if triton is None else (): importlib.import_module(name)
    return cast(Any, triton).jit(kernel)


@functools.cache
def load_linear_add() -> Callable[..., Tensor]:
    """(x (T, K), weight (N, K), base (T, N) or None) -> base + x weight^T in bfloat16, rounded once, on Hopper."""
    product = load_product()
    forward = lambda x, w, base: product(x, w.T, "add", res=base), lambda x, w, _: x.new_empty(len(x), len(w))
    return differentiable("linear_add", "TT? T T", forward, (lambda x, w, _, g: product(g, w), lambda x, *_: (
        torch.empty_like(x))), lambda kept, g, dx: (dx, g[0].T @ kept[0], None if kept[2] is None else g[0]))


@functools.cache
def load_leaky2() -> Callable[..., Tensor]:
    """(n (T, D), up (F, D), down (D, F), base (T, D) or None, slope) -> base + leaky_relu(n up^T, slope)^2 down^T.

    In bfloat16, on Hopper. No (T, F) tensor is read or written for the activation alone, and the backward pass keeps
    one instead of two.
    """
    product = load_product()

    def forward(n: Tensor, up: Tensor, down: Tensor, base: Tensor | None, slope: float) -> tuple[Tensor, Tensor]:
        post = product(n, up.T, "leaky2", slope=slope)
        return product(post, down.T, "add", res=base), post

    def finish(kept: Sequence[Tensor], grads: Sequence[Tensor], found: Sequence[Tensor]):
        # kept: n, up, down, base, post; found: the gradients of n and of what leaky2 squares
        return found[0], found[1].T @ kept[0], grads[0].T @ kept[4], None if kept[3] is None else grads[0], None

    def backward(n: Tensor, up: Tensor, down: Tensor, base: Any, post: Tensor, grad: Tensor, _: Any, slope: float):
        dpre = product(grad, down, "leaky2_slope", post=post, slope=slope)
        return product(dpre, up), dpre

    def empty(n: Tensor, up: Tensor, *_: Any): return torch.empty_like(n), n.new_empty(len(n), len(up))
    operator = differentiable("leaky2", "TTT?f TT TT", (forward, empty), (backward, empty), finish, kept=1)
    return lambda *inputs: operator(*inputs)[0]


# Triton kernels. Without their last arguments they go forward; with them backward, where they read the gradients of
# what they wrote before (some may have none), and write those of what they read, and sums, a row for each program.
def rotate_heads_kernel(T, ROWS: constexpr, H: constexpr, K: constexpr, E: constexpr, R: constexpr, RP: constexpr,
                        HEADS: constexpr, qkv, gain, cos, sin, q, k, v, keys, values, dqkv=None, dgain=None):
    row, head = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None], tl.arange(0, HEADS)[None, :, None]
    col, is_q = tl.arange(0, E)[None, None, :] + 0 * head, (row < T) & (head < H)
    is_k, is_v = (row < T) & (head >= H) & (head < H + K), (row < T) & (head >= H + K) & (head < H + 2 * K)
    at, at_q, live = (row * (H + 2 * K) + head) * E, (row * H + head) * E, is_q | is_k | is_v
    shared, j = tl.where(is_v, head - H - K, head - H), tl.arange(0, RP)[None, None, :]  # which of the K heads
    at_k, value = (row * K + shared) * E, tl.load(qkv + at + col, live, 0.0).to(tl.float32)
    rstd = tl.where(is_v, 1.0, tl.rsqrt(tl.sum(value * value, 2, keep_dims=True) / E + 1.1920929e-07))
    factor = rstd * tl.load(gain + head, head < H, 1.0)
    if dqkv is None:
        tl.store(q + at_q + col, value * factor, is_q & (col >= 2 * R))
        tl.store(k + at_k + col, value * factor, is_k & (col >= 2 * R))
        tl.store(v + at_k + col, value, is_v)
        for half in tl.static_range(2):  # of what rotates
            angle, turns = row * R + j, (is_q | is_k) & (j < R)
            c, s = tl.load(cos + angle, turns, 0.0), tl.load(sin + angle, turns, 0.0) * (1 - 2 * half)
            own, other = qkv + at + half * R + j, qkv + at + (1 - half) * R + j
            value = (tl.load(own, turns, 0.0) * c + tl.load(other, turns, 0.0) * s) * factor
            tl.store(q + at_q + half * R + j, value, turns & is_q)
            tl.store(k + at_k + half * R + j, value, turns & is_k)
    else:
        turns, pair = (is_q | is_k) & (col < 2 * R), tl.where(col < R, col + R, col - R)
        angle = row * R + tl.where(col < R, col, col - R)
        c, s = tl.load(cos + angle, turns, 1.0), tl.load(sin + angle, turns, 0.0) * tl.where(col < R, 1.0, -1.0)
        grad = tl.load(q + at_q + col, is_q, 0.0).to(tl.float32)
        other = tl.load(q + at_q + pair, turns & is_q, 0.0).to(tl.float32)
        if v is not None: grad += tl.load(v + at_k + col, is_v, 0.0)
        if k is not None:
            grad += tl.load(k + at_k + col, is_k, 0.0)
            other += tl.load(k + at_k + pair, turns & is_k, 0.0)
        for g in tl.static_range(0 if keys is None else H // K):
            place = (row * H + shared * (H // K) + g) * E
            grad += tl.load(keys + place + col, is_k, 0.0)
            grad += tl.load(values + place + col, is_v, 0.0)
            other += tl.load(keys + place + pair, turns & is_k, 0.0)
        grad = grad * c - other * s  # turned back
        inner = tl.where(is_v, 0.0, tl.sum(value * grad, 2, keep_dims=True) * rstd)
        tl.store(dqkv + at + col, (grad - value * (inner * rstd / E)) * factor, live)
        tl.store(dgain + tl.program_id(0) * H + head, tl.sum(inner, 0, keep_dims=True), head < H)


@functools.cache
def load_rotate_heads() -> Callable[..., tuple[Tensor, ...]]:
    """(qkv (T, (H + 2 K) E), gain (H,), cos, sin (T, 1, R), E) -> q (T, H, E), k, v (T, K, E), and two of (T, H, E)
    without memory; E is a power of 2.

    The RMS norm of each head, its first 2 R channels rotated, q times gain. The last two take gradients of k and v for
    each query head that reads them, which are added up here: faster than in attention. Each direction reads and writes
    every tensor once; the backward pass makes the norms again.
    """
    kernel = jitted(rotate_heads_kernel)

    def launch(width: int, qkv: Tensor, gain: Tensor, cos: Tensor, *rest: Any) -> None:
        tokens, heads, total, pairs = len(qkv), len(gain), qkv.size(1) // width, cos.size(-1)
        sizes = heads, (total - heads) // 2, width, pairs, *(1 << max(n - 1, 0).bit_length() for n in (pairs, total))
        kernel[(-(-tokens // HEAD_ROWS),)](tokens, HEAD_ROWS, *sizes, qkv, gain, cos, *rest, num_warps=HEAD_ROWS)

    def outputs(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, width: int) -> tuple[Tensor, ...]:
        tokens, heads, kv = len(qkv), len(gain), (qkv.size(1) // width - len(gain)) // 2
        shared = [qkv.new_empty(tokens + heads // kv, kv, width)[:tokens] for _ in "kv"]  # H heads fit behind each row
        q = qkv.new_empty(tokens, heads, width)
        return q, *shared, *(qkv.new_empty(()).expand_as(q) for _ in "kv")

    def gradients(qkv: Tensor, gain: Tensor, *_: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(qkv), qkv.new_empty(-(-len(qkv) // HEAD_ROWS), len(gain), dtype=torch.float32)

    return differentiable("rotate_heads", "TTTTi TTTTT TT", written(launch, outputs), written(launch, gradients), lambda
                          kept, _, found: (found[0], found[1].sum(0).to(kept[1].dtype), None, None, None))


def exclude_kernel(T, H: constexpr, K: constexpr, E: constexpr, ROWS: constexpr, KP: constexpr, y, v, opened, out,
                   dy=None, dv=None, dopened=None):
    row, kv = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None], tl.arange(0, KP)[None, :, None]
    col, live, down = tl.arange(0, E)[None, None, :], (row < T) & (kv < K), tl.zeros((ROWS, KP, E), tl.float32)
    own = tl.load(v + (row * K + kv) * E + col, live, 0.0).to(tl.float32)
    size = tl.maximum(tl.sum(own * own, 2, keep_dims=True), 1e-24)
    for g in tl.static_range(H // K):
        head = row * H + kv * (H // K) + g
        x, gate = tl.load(y + head * E + col, live, 0.0).to(tl.float32), tl.load(opened + head, live, 0.0)
        share = tl.sum(x * own, 2, keep_dims=True) / size
        rest = x - share * own
        if dy is None: tl.store(out + head * E + col, gate * rest, live)
        else:
            grad = tl.load(out + head * E + col, live, 0.0).to(tl.float32)
            tl.store(dopened + head, tl.sum(grad * rest, 2, keep_dims=True), live)
            grad *= gate
            back = tl.sum(grad * own, 2, keep_dims=True) / size
            tl.store(dy + head * E + col, grad - back * own, live)
            down -= share * grad + back * (rest - share * own)
    if dy is not None: tl.store(dv + (row * K + kv) * E + col, down, live)


@functools.cache
def load_exclude() -> Callable[..., Tensor]:
    """(y (T, H, E), v (T, K, E), opened (T, H) float32) -> exclusive(y, v) times opened, (T, H E); E is a power of 2.

    Each direction reads and writes every tensor once.
    """
    kernel = jitted(exclude_kernel)

    def launch(y: Tensor, v: Tensor, *rest: Tensor | None) -> None:
        sizes = *y.shape[:2], v.size(1), y.size(2), HEAD_ROWS, 1 << (v.size(1) - 1).bit_length()
        kernel[(-(-len(y) // HEAD_ROWS),)](*sizes, y, v, *rest, num_warps=HEAD_ROWS)
    forward = written(launch, lambda y, *_: y.new_empty(len(y), y.size(1) * y.size(2)))
    backward = written(launch, lambda y, v, opened, _: tuple(map(torch.empty_like, (y, v, opened))))
    return differentiable("exclude", "TTT T TTT", forward, backward, lambda kept, _, found: found)


def cross_entropy_kernel(V: constexpr, BV: constexpr, LEARNED: constexpr, logits, targets, caps, nats, dcaps):
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    logits, target, above, below = logits + row * V, tl.load(targets + row), tl.load(caps), tl.load(caps + LEARNED)
    near, known = tl.load(logits + target, target >= 0, 0.0).to(tl.float32), tl.where(target >= 0, 1.0, 0.0)
    x, inner, outer = tl.load(logits + col, col < V, 0.0).to(tl.float32), 2.8853901 / above, 2.8853901 * above
    if LEARNED:  # two caps; 2.8853901 = 2 / ln 2
        inner, outer = tl.where(x >= 0, inner, 2.8853901 / below), tl.where(x >= 0, outer, 2.8853901 * below)
    x, cap = x * inner, tl.where(near >= 0, above, below)
    half = 0.5 - libdevice.fast_dividef(1.0, 1 + tl.exp2(x))  # of the tanh, here and below
    near_half = 0.5 - libdevice.fast_dividef(1.0, 1 + tl.exp2(near * (2.8853901 / cap)))
    share = tl.exp2(half * outer)
    if V < BV: share = tl.where(col < V, share, 0.0)
    total, slope, near_slope = tl.sum(share, 0), 0.25 - half * half, 0.25 - near_half * near_half
    tl.debug_barrier()  # the target's logit is read before its place is written
    tl.store(nats + row, known * (tl.log(total) - 2 * cap * near_half))
    grad, near_grad = share * (4 * known / total), tl.exp2(2.8853901 * cap * near_half) * (4 * known / total) - 4
    tl.store(logits + col, grad * slope, col < V)
    tl.debug_barrier()  # and then once more
    tl.store(logits + target, near_grad * near_slope, target >= 0)
    if LEARNED:
        grad *= half - x * slope * 0.69314718
        near = known * (4 * near * near_slope / cap - 2 * near_half)
        up = 0.5 * tl.sum(tl.where(half >= 0, grad, 0.0), 0)
        tl.store(dcaps + 2 * row, up + tl.where(near_half >= 0, near, 0.0))
        tl.store(dcaps + 2 * row + 1, 0.5 * tl.sum(grad, 0) - up + tl.where(near_half >= 0, 0.0, near))


@functools.cache
def load_cross_entropy() -> Callable[..., Tensor]:
    """(x (T, D), head (V, D), targets (T,), caps (2,), learned) -> nats (T,) of the targets, from logits x head^T with
    a cap x tanh(logit / cap) above and, where they are learned, another below 0. A target of -1 has 0 nats; caps are at
    most 54.

    The forward pass reads the logits once and leaves their gradients in their place.
    """
    kernel, product = jitted(cross_entropy_kernel), torch.mm
    with contextlib.suppress(Exception): product = load_product()  # faster, where it is there

    def sums(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), 2, dtype=torch.float32)

    def forward(x: Tensor, head: Tensor, targets: Tensor, caps: Tensor, learned: int) -> tuple[Tensor, ...]:
        (nats, dcaps), size, even = sums(x), 1 << (len(head) - 1).bit_length(), (x.size(1) | len(head)) % 8 == 0
        logits, warps = (product if even else torch.mm)(x, head.T), min(max(size // 1024, 1), 32)
        kernel[(len(x),)](len(head), size, learned, logits, targets, caps, nats, dcaps, num_warps=warps,
                          maxnreg=min(max((1024 if learned else 640) // warps, 64), 255))  # so that two or three fit
        return nats, dcaps, logits

    def finish(kept: Sequence[Tensor], grads: Sequence[Tensor], _: None):
        (x, head), (dcaps, dlogits), by = kept[:2], kept[4:], grads[0][:, None]
        return ((dlogits @ head) * by).to(x.dtype), dlogits.T @ (x * by).to(x.dtype), None, grads[0] @ dcaps, None

    operator = differentiable("cross_entropy", "TTTTi TTT", (forward, lambda x, head, *_: (*sums(x), x.new_empty(
        len(x), len(head)))), None, finish, kept=2)
    x = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
    operator(x, x, torch.zeros(16, dtype=torch.long, device="cuda"), x[0, :2].float(), 1)  # another Triton may not do
    return lambda *inputs: operator(*inputs)[0]


def mix_norm_kernel(T, D: constexpr, W: constexpr, ROWS: constexpr, BD: constexpr, a, b, c, mix, scale, chain,
                    mixed, out, start, passed, da=None, db=None, dc=None, dmix=None):
    col, factor, zero = tl.arange(0, BD)[None, :], tl.load(scale), tl.zeros((ROWS, BD), tl.float32)
    inside, sum_a, sum_b, sum_c = col < D, zero, zero, zero
    wy, wz = tl.load(mix + D + col, inside, 0.0), tl.load(mix + 2 * D + col, inside, 0.0)
    for first in tl.range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at, live, opens = row * D + col, (row < T) & inside, (row < T) & (col < W)
        y, z = tl.load(b + at, live, 0.0).to(tl.float32), tl.load(c + at, live, 0.0).to(tl.float32)
        blend, x, wx = y * wy + z * wz, y, wy
        if a is not None:
            x, wx = tl.load(a + at, live, 0.0).to(tl.float32), tl.load(mix + col, inside, 0.0)
            blend += x * wx
        blend = blend.to(tl.bfloat16).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(blend * blend, 1, keep_dims=True) / D + 1.1920929e-07)
        if dmix is None:
            tl.store(mixed + at, blend, live)
            tl.store(out + at, blend * (rstd * factor), live)
            tl.store(start + row * W + col, blend * (rstd * factor), opens)
        else:
            grad = tl.load(out + at, live, 0.0).to(tl.float32)
            if start is not None: grad += tl.load(start + row * W + col, opens, 0.0)
            grad *= factor * rstd
            grad -= blend * (tl.sum(grad * blend, 1, keep_dims=True) / D * rstd * rstd)
            if mixed is not None: grad += tl.load(mixed + at, live, 0.0).to(tl.float32)
            tl.store(db + at, grad * wy, live)
            dz = grad * wz
            if passed is not None: dz += tl.load(passed + at, live, 0.0)
            tl.store(dc + at, dz, live)
            sum_b += grad * y
            sum_c += grad * z
            if a is not None:
                sum_a += grad * x
                tl.store(da + at, grad * wx, live)
    if dmix is not None:
        place = dmix + tl.program_id(0) * 3 * D + col
        tl.store(place, tl.sum(sum_a, 0, keep_dims=True), inside)
        tl.store(place + D, tl.sum(sum_b, 0, keep_dims=True), inside)
        tl.store(place + 2 * D, tl.sum(sum_c, 0, keep_dims=True), inside)


@functools.cache
def load_mix_norm() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(a or None, b, c (T, D), mix (3, D), scale (), chain (T, D), W) -> mix[0] a + mix[1] b + mix[2] c, its RMS norm
    times scale, and the first W channels of that, in bfloat16; the next visit's chain, (T, D) without memory.

    The sums over tokens for the gradient of mix are made where the streams' own gradients are: nothing is read twice.
    The gradient of c goes to the chain, and adds up along it: c has none. The first chain is c.
    """
    kernel = jitted(mix_norm_kernel)

    def launch(window: int, *arrays: Any) -> None:
        (rows, width), span = arrays[1].shape, 1 << (arrays[1].size(1) - 1).bit_length()
        # a program for each row of the last array
        kernel[(len(arrays[-1]),)](rows, width, window, MIXED_ROWS, span, *arrays, num_warps=MIXED_ROWS)

    def gradients(a: Tensor | None, b: Tensor, c: Tensor, *_: Any) -> tuple[Tensor, ...]:
        programs = min(-(-len(b) // MIXED_ROWS), 1056)  # 8 for each multiprocessor of a Hopper GPU
        da = torch.empty_like(b) if a is not None else b.new_empty(0)
        return da, torch.empty_like(b), torch.empty_like(c), b.new_empty(programs, 3, b.size(1), dtype=torch.float32)

    forward = written(launch, lambda a, b, c, mix, scale, chain, window: (
        *map(torch.empty_like, (b, b)), b.new_empty(len(b), window), b.new_empty(()).expand_as(c)))
    return differentiable("mix_norm", "?TTTTTi TTTT TTTT", forward, written(launch, gradients), lambda kept, _, found: (
        None if kept[0] is None else found[0], found[1], None, found[3].sum(0), None, found[2], None))


def choose_kernels(config: Config, device: torch.device) -> Kernels:
    """What this device and these settings allow. UserError where FP8_MATMUL=1 does not fit them."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    odd = [width for width in (config.model_dim, config.mlp_dim, config.num_kv_heads * config.head_dim) if width % 16]
    require(not config.fp8_matmul or (not odd and 10 * major + minor >= 89), f"FP8_MATMUL=1 DEVICE={config.device}: "
            f"needs fp8 (this is {device.type} {major}.{minor}), widths: multiples of 16, not {odd}; set FP8_MATMUL=0")
    kernels = Kernels(Fp8Linear.apply) if config.fp8_matmul else PLAIN
    heads, even = not config.head_dim & (config.head_dim - 1), not (odd or config.fp8_matmul)
    leaky2 = even and config.mlp_activation == "leaky2" and not config.projection_norm
    capped = config.logit_softcap <= 30 and config.softcap_type != "poly5" and not (config.vocab_bias or config.z_loss)
    loaders = {"linear_add": (load_linear_add, even), "leaky2": (load_leaky2, leaky2), "exclude": (load_exclude, heads),
               "rotate_heads": (load_rotate_heads, heads and not config.value_residual),
               "mix_norm": (load_mix_norm, True), "cross_entropy": (load_cross_entropy, capped)}
    for name, (load, fits) in loaders.items():
        try: kernels = kernels._replace(**{name: load()}) if fits and config.fused_kernels and major == 9 else kernels
        except Exception as error: kernels = kernels._replace(note=f" (no {name}: {first_line(error)})")
    return kernels


# ====================================================================================================================
# 5. model: one forward pass, model(ids, targets, segments) -> nats of every target, for training and scoring alike.
#    Depth recurrence, U-Net skips and lanes are data: a tuple of visits. Weights live in banks, one per role, stacked
#    over layers: float32 masters, cast to the activation dtype where they are used, so that gradients add in float32.
# ====================================================================================================================

RMS_EPS = 1.1920929e-07  # float32 machine epsilon, also for bfloat16 input: what the published models train with


def norm(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """RMS norm over the last dimension, times scale, no weight; computed in float32, returned in x's dtype."""
    return (F.rms_norm(x.float(), (x.size(-1),), eps=RMS_EPS) * scale).to(x.dtype)


def rotary_frequencies(config: Config, training: bool) -> Tensor:
    """-> (ROPE_DIMS / 2,) float32: ROPE_BASE^(-2j / ROPE_DIMS), slowed down where contexts are `stretch` times longer.

    ntk raises the base (NTK-aware scaling). yarn divides by up to `stretch`, slow channels most (arXiv:2309.00071, as
    in the ternary record: without a temperature).
    """
    dims, stretch = config.rope_dims, config.rope_stretch or 1.0
    if not training and not config.rope_stretch: stretch = max(config.eval_seq_len / config.train_seq_len, 1.0)
    exponent = torch.arange(0, dims, 2, dtype=torch.float32) / max(dims, 1)
    base = config.rope_base * (stretch ** (dims / max(dims - 2, 1)) if config.rope_scaling == "ntk" else 1.0)
    if config.rope_scaling != "yarn": return base ** -exponent
    return base ** -exponent / (1 + ((exponent - 0.25) / 0.75).clamp(0, 1) * (stretch - 1))


def rotary_angles(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """positions (T,), frequencies (R / 2,) -> cos, sin (T, 1, R / 2) float32 of their products.

    GPT looks them up in a table: in every kernel that rotates they would cost more than the memory traffic.
    """
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates channel pairs (j, j + R/2) of x (T, heads, E), R = 2 x cos.size(-1); other channels pass."""
    a, b, rest = x.tensor_split((cos.size(-1), 2 * cos.size(-1)), -1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), -1).to(x.dtype)


def exclusive(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self attention (XSA): y (T, H, E) less its part along the token's own value v (T, K, E); float32."""
    grouped = y.float().unflatten(1, (v.size(1), -1))
    own = v.float()[:, :, None].expand_as(grouped)  # both sums over the same shape become one kernel
    share = (grouped * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True).clamp_min(1e-24)
    return (grouped - share * own).flatten(1, 2)


def segment_mean(x: Tensor, positions: Tensor) -> Tensor:
    """x (T, D), positions (T,) in the segment -> mean over the segment up to each token, in float32."""
    total = x.cumsum(0, dtype=torch.float64)  # sums of float32 lose 3 digits in 98,304 tokens
    first = torch.arange(len(x), device=x.device) - positions
    return ((total - (total[first] - x[first])) / (positions + 1)[:, None]).float()  # without all earlier segments


def bigram_buckets(ids: Tensor, keep: Tensor, kind: str, buckets: int) -> Tensor:
    """ids (T,) -> (T,) rows of the BigramHash table: a hash of each token and the one before, where keep (T,) says so.

    The published hashes: 92821 (2026-03-19 record), 36313 (03-20 and later; its last row is for starts), 1000003
    (#363), 31 (#289).
    """
    previous = torch.where(keep, ids.roll(1), ids if kind == "1000003" else 0)
    if kind == "36313": return torch.where(keep, (36313 * ids ^ 27191 * previous) % max(buckets - 1, 1), buckets - 1)
    return (int(kind) * previous + ids) % buckets


def adapted(y: Tensor, x: Tensor, w: Mapping[str, Tensor], target: str) -> Tensor:
    """y (T, out) plus what the adapters of `target` in w make of x (T, in).

    TARGET_adapter_in, _out (R, in), (out, R) belong to the model, for each visit of a looped layer. TARGET_document_in,
    _out (docs, R, in), (docs, out, R) belong to the documents whose rows, of equal length, make up x.
    """
    for kind in ("adapter", "document"):
        if (inner := w.get(f"{target}_{kind}_in")) is not None:
            rows = x.view(len(inner) if inner.dim() > 2 else 1, -1, x.size(-1))
            y = y + (rows @ inner.mT @ w[f"{target}_{kind}_out"].mT).view_as(y)
    return y


ACTIVATIONS = {"leaky2": lambda x, slope: F.leaky_relu(x, slope).square(),
               "swiglu": lambda x, _: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]}


def poly5(u: Tensor) -> Tensor:
    """Fifth-order Taylor polynomial of tanh's kind, clamped (2026-03-24 ternary record)."""
    u = u.clamp(-2, 2)
    return (u * (1 - u.square() / 3 + u.square().square() / 15)).clamp(-1, 1)


# --- attention back ends: (q (T, H, E), k, v (T, K, E), segments, spread) -> (T, H, E), causal within segments; spread,
#     of rotate_heads, may take the gradients of k and v
Attention = Callable[..., Tensor]


def attention_sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *_: Any) -> Tensor:
    """torch's scaled_dot_product_attention on segments laid out as rows: any device, any dtype."""
    length, rows, positions = segments.max_length, segments.boundaries.numel() - 1, segments.positions
    place = None if rows * length == q.size(0) else ((positions == 0).cumsum(0) - 1) * length + positions
    if place is not None:  # not every segment is full
        q, k, v = (x.new_zeros(rows * length, *x.shape[1:]).index_copy(0, place, x) for x in (q, k, v))
    q, k, v = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    return y if place is None else y[place]


def load_varlen() -> Any:
    """torch.nn.attention.varlen: the FlashAttention-2 kernels that come with torch."""
    from torch.nn.attention.varlen import varlen_attn
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    return lambda q, k, v, s, *_: varlen_attn(  # any distance back, none ahead
        q, k, v, s.boundaries, s.boundaries, s.max_length, s.max_length, window_size=(-1, 0), **options)


def load_fa3() -> Attention:
    """FlashAttention-3 (Hopper), built from its repository."""
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    def attention(q: Tensor, k: Tensor, v: Tensor, s: Segments, *_: Any) -> Tensor:
        y = flash_attn_varlen_func(q, k, v, s.boundaries, s.boundaries, s.max_length, s.max_length, causal=True,
                                   deterministic=torch.are_deterministic_algorithms_enabled())
        return y[0] if isinstance(y, tuple) else y
    return attention


@functools.cache
def load_fa4() -> Attention:
    """FlashAttention-4 (the flash-attn-4 package), as a torch operator that compiles.

    Its own autograd function forgets the longest length in the backward pass, which makes that slow on Hopper. With
    spread, of rotate_heads, query heads that share keys and values do not add up their gradients: by a kernel derived
    from that of a known version; others add them up.
    """
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]
    warnings.filterwarnings("ignore", "Argument aux_data")  # harmless, but long
    run_forward, run_backward = interface._flash_attn_fwd, interface._flash_attn_bwd
    known = "4.0.0b36" in [found.version for found in importlib.metadata.distributions(name="flash-attn-4")]

    def forward(q: Tensor, k: Tensor, v: Tensor, _: Any, __: Any, boundaries: Tensor, longest: int):
        tile = (192, 96) if q.size(-1) == 64 else None  # 2 to 3 % faster than the default
        return tuple(run_forward(q, k, v, cu_seqlens_q=boundaries, cu_seqlens_k=boundaries, max_seqlen_q=longest,
                                 max_seqlen_k=longest, causal=True, return_lse=True, tile_mn=tile)[:2])

    @functools.cache
    def spreading(share: int) -> Any:
        """The backward pass for k and v with as many heads as q, of which it reads the first (H / share) only."""
        base = interface.FlashAttentionBackwardSm90

        def load(self: Any, *rest: Any) -> None:
            self.qhead_per_kvhead = share
            base.load(self, *rest[:-1], share)  # the last: what heads of q are divided by
            self.qhead_per_kvhead = 1
        names = {**vars(interface), "FlashAttentionBackwardSm90": type("Spreading", (base,), {"load": load})}
        found: Any = types.FunctionType(run_backward.__code__, names, None, run_backward.__defaults__)
        names["_flash_attn_bwd"], found.compile_cache = found, {}  # of its own
        return found

    def backward(q: Tensor, k: Tensor, v: Tensor, keys: Any, _: Any, boundaries: Tensor, *kept: Any):
        (y, lse, dy, _, longest), run = kept, run_backward if keys is None else spreading(q.size(1) // k.size(1))
        # rotate_heads leaves memory for that behind them
        if keys is not None: k, v = (x.as_strided(q.shape, x.stride()) for x in (k, v))
        return tuple(run(q, k, v, y, dy, lse, q.size(-1) ** -0.5, True, cu_seqlens_q=boundaries,
                         cu_seqlens_k=boundaries, max_seqlen_q=longest, max_seqlen_k=longest,
                         deterministic=torch.are_deterministic_algorithms_enabled())[:3])

    def empty(q, k, v, keys, *_): return tuple(map(torch.empty_like, (q, k, v) if keys is None else (q, q, q)))
    operator = differentiable("fa4", "TTT??Ti TT TTT", (forward, lambda q, *_: (torch.empty_like(q), q.new_empty(
        q.size(1), q.size(0), dtype=torch.float32))), (backward, empty), lambda kept, _, found: (found[0], *(
            found[1:] + (None, None) if kept[3] is None else (None, None) + found[1:]), None, None), kept=2)
    return lambda q, k, v, s, *spread: operator(
        q, k, v, *(spread if spread and known else (None, None)), s.boundaries, s.max_length)[0]


# name -> (loader, oldest major compute capability, 0 = any device); in order of preference
ATTENTIONS: dict[str, tuple[Callable[[], Attention], int]] = {
    "fa3": (load_fa3, 9), "fa4": (load_fa4, 9), "varlen": (load_varlen, 8), "sdpa": (lambda: attention_sdpa, 0)}


def choose_attention(wanted: str, device: torch.device) -> tuple[str, Attention]:
    """'auto' or a name -> (name, back end): the first that this machine has. UserError where a named one is absent."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    for name, (load, needed) in ATTENTIONS.items() if wanted == "auto" else [(wanted, ATTENTIONS[wanted])]:
        try:
            if capability < needed: raise ImportError(f"needs a GPU of compute capability {needed}.0")
            return name, load()
        except (ImportError, OSError, AttributeError) as error:
            require(wanted == "auto", f"ATTENTION={wanted}: {error}; install it or use ATTENTION=auto")
    raise AssertionError("sdpa is always there")


# --- the plan of a forward pass
class Visit(NamedTuple):
    """One application of a layer."""

    layer: int
    push: bool  # keep the output for a skip
    skip: int  # row of skip_weight that blends the newest kept output in before the block; -1 = none
    adapter: int  # row of the depth adapters; -1 = none
    parallel: bool  # a two-lane block


def layer_order(config: Config, looping: bool) -> list[int]:
    """Layers in the order of application, e.g. 0 1 2 (3 4 5) (3 4 5) (3 4 5) 6 ... 10."""
    layers = list(range(config.num_layers))
    if not (looping and config.num_loops): return layers
    first, last = config.loop_start, config.loop_end + 1
    return layers[:last] + layers[first:last] * config.num_loops + layers[last:]


def skip_keys(config: Config, looping: bool) -> list[tuple[int, int]]:
    """(layer, how many times the decoder saw it before) of each decoder application that takes a skip."""
    order = layer_order(config, looping)
    decoder = order[len(order) // 2:len(order) // 2 * 2]
    return [(layer, decoder[:j].count(layer)) for j, layer in enumerate(decoder)]


def skip_rows(config: Config) -> dict[tuple[int, int], int]:
    """Row of every skip. Rows belong to (layer, occurrence), so they keep their place when looping starts."""
    return {key: row for row, key in enumerate(dict.fromkeys(skip_keys(config, True) + skip_keys(config, False)))}


def visit_plan(config: Config, looping: bool) -> tuple[Visit, ...]:
    """The encoder half keeps its outputs; the decoder half takes them back, newest first (U-Net)."""
    order, rows, keys = layer_order(config, looping), skip_rows(config), skip_keys(config, looping)
    encoder, plan = len(order) // 2, []
    looped = range(config.loop_start, config.loop_end + 1) if config.num_loops and config.depth_lora_rank else range(0)
    for i, layer in enumerate(order):
        skip = rows[keys[i - encoder]] if encoder <= i < encoder + len(keys) else -1
        adapter = order[:i].count(layer) * len(looped) + layer - config.loop_start if layer in looped else -1
        plan.append(Visit(layer, i < encoder, skip, adapter, 0 < config.parallel_start_layer <= layer))
    return tuple(plan)


def param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; nothing exists that the plan does not use.

    A bank with fewer rows than layers belongs to the last layers.
    """
    layers, width, heads, mlp = config.num_layers, config.model_dim, config.num_heads, config.mlp_dim
    kv, rows, rank = config.num_kv_heads * config.head_dim, len(skip_rows(config)), config.depth_lora_rank
    lanes = layers - config.parallel_start_layer if config.parallel_start_layer else 0
    behind = layers - 1 - config.loop_end if config.num_loops else layers - 1  # the loops, or the first layer
    looped = (config.loop_end + 1 - config.loop_start) * (config.num_loops + 1) if config.num_loops else 0
    embed, window = config.embed_dim or width, width if config.attn_gate == "dense" else config.gate_window
    gated, smear = config.attn_gate != "sparse" or config.sparse_attn_gate_scale > 0, config.smear_gate
    hashed, pair, factored = bool(config.bigram_hash_buckets), config.bigram_hash_dim, bool(config.embed_dim)
    # a parameter of size 0 does not exist
    sizes = {"embedding": (config.vocab_size, embed), "head": (config.vocab_size * (not config.tie_embeddings), embed),
        "vocab_bias": (config.vocab_size * config.vocab_bias,), "embed_in": (factored, width, embed),
        "embed_out": (factored, embed, width), "bigram_table": (config.bigram_hash_buckets, pair),
        "bigram_scale": (hashed * (config.bigram_hash == "36313"),), "bigram_proj": (hashed, embed, pair),
        "q_proj": (layers, width, width), "k_proj": (layers, kv, width), "v_proj": (layers, kv, width),
        "out_proj": (layers, width, width), "down_proj": (layers, width, mlp),
        "up_proj": (layers, mlp * (2 if config.mlp_activation == "swiglu" else 1), width),
        "q_adapter_in": (looped, rank, width), "q_adapter_out": (looped, width, rank),
        "v_adapter_in": (looped, rank, width), "v_adapter_out": (looped, kv, rank), "q_gain": (layers, heads),
        "attn_scale": (layers, width), "mlp_scale": (layers, width), "resid_mix": (layers, 2, width),
        "skip_weight": (rows, width), "skip_gate": (rows * config.skip_gates_enabled, width),
        "attn_gate": (layers * gated, heads, window), "attn_gate_bias": (layers * (config.attn_gate == "dense"), heads),
        "value_mix": (behind * config.value_residual, 2), "lane_resid": (lanes, 2), "lane_mix": (lanes, 2, 2),
        "smear_gate": (smear == "input", config.gate_window), "smear_scale": (smear == "input",),
        "static_smear": (embed * (smear == "static"),), "mean_smear": (layers * (smear == "mean"), width),
        "softcap_scale": (2 * (config.softcap_type == "two_sided"),)}
    return {name: tuple(map(int, shape)) for name, shape in sizes.items() if math.prod(shape)}


Forward = Callable[..., Tensor]  # a GPT or its compiled form: (ids, targets, segments) -> nats
SKIP_ROLES, GLOBAL_ROLES = {"skip_weight", "skip_gate"}, {  # a row per skip; one for the whole model; else per layer
    "embedding", "head", "vocab_bias", "embed_in", "embed_out", "bigram_table", "bigram_proj", "bigram_scale",
    "smear_gate", "smear_scale", "static_smear", "softcap_scale"}
CONSTANTS = {"attn_scale": 1.0, "mlp_scale": 1.0, "skip_weight": 1.0, "lane_resid": 1.1, "lane_mix": 1.0,
             "value_mix": 0.5, "attn_gate_bias": 4.0, "static_smear": 3.0, "bigram_scale": 0.05}
SCALES = {"out_proj": "attn_scale", "down_proj": "mlp_scale", "out_document_out": "attn_scale",
          "mlp_document_out": "mlp_scale"}  # of the outputs of these matrices, a row each
MATRICES = {"q_proj", "k_proj", "v_proj", "up_proj", "embed_in", "embed_out", "q_adapter_in", "v_adapter_in"}
FakeQuantize = Callable[[str, int, Tensor], Tensor]  # (parameter, layer or -1, weights) -> as the artifact gives them


class GPT(nn.Module):
    """The model of PR #1855 (R0427) with learned caps, at the default settings. `looping` chooses between two plans."""

    ln_scale: Tensor  # (L,)
    embedding: nn.Parameter
    smear_scale: Tensor
    vocab_bias: Tensor
    softcap_scale: Tensor

    def __init__(self, config: Config, dtype: torch.dtype = torch.float32, attention: Attention = attention_sdpa,
                 kernels: Kernels = PLAIN):
        super().__init__()
        self.config, self.dtype, self.attention, self.kernels = config, dtype, attention, kernels
        self.plans = (visit_plan(config, False), visit_plan(config, True))
        self.looping, self.fused, self.temperature = False, False, 1.0
        self.fake_quantize: FakeQuantize | None = None  # in training; set by the trainer when QAT starts
        for name, shape in param_shapes(config).items(): self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        for training in (False, True):
            places = torch.arange(max(config.train_seq_len, config.eval_seq_len))
            for name, table in zip(("cos", "sin"), rotary_angles(places, rotary_frequencies(config, training))):
                self.register_buffer(f"{name}_{training}", table, persistent=False)
        depth = torch.arange(1, config.num_layers + 1, dtype=torch.float32)
        self.register_buffer("ln_scale", depth ** -0.5 if config.ln_scale else torch.ones_like(depth), persistent=False)

    # those of training, there and where `fused` says so; plain torch in other scoring
    active_kernels = property(lambda self: self.kernels if self.training or self.fused else PLAIN)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Orthogonal matrices, zero output projections, constants; drawn on the CPU, so the same on every device."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        constants = CONSTANTS | {"q_gain": config.qk_gain_init}
        for name, parameter in self.named_parameters():
            value = torch.full(parameter.shape, constants.get(name, 0.0))
            if name == "embedding":
                value.normal_(0.0, config.tied_embed_init_std, generator=generator)
                if config.embed_init == "overtone":  # (2026-03-19 record)
                    u, sigma, v = torch.linalg.svd(value, full_matrices=False)
                    value = u * (sigma[0] * torch.arange(1, len(sigma) + 1) ** -0.5) @ v
            elif name == "bigram_table": value.normal_(0.0, 0.01, generator=generator)
            elif name in MATRICES and (config.matrix_init == "uniform" or "adapter" in name):
                value.uniform_(-(value.size(-1) ** -0.5), value.size(-1) ** -0.5, generator=generator)
            elif name in MATRICES:
                for matrix in value: nn.init.orthogonal_(matrix, generator=generator)
            elif name == "resid_mix":
                depth = torch.arange(len(value)) / max(len(value) - 1, 1)
                share = (3 * (depth - 0.5)).sigmoid() if config.resid_mix_init == "phase" else torch.ones(len(value))
                value.copy_(torch.stack((share, 1 - share), 1)[:, :, None])
            parameter.copy_(value)

    def quantized(self, name: str, value: Tensor, layer: int = -1) -> Tensor:
        """A parameter, or what a layer has of it, through the fake quantizer while that is on."""
        return self.fake_quantize(name, layer, value) if self.fake_quantize and self.training else value

    def weight(self, name: str) -> Tensor:
        """A parameter of the whole model, in the activations' dtype."""
        return self.quantized(name, getattr(self, name)).to(self.dtype)

    def visit_weights(self, banks: Mapping[str, Sequence[Tensor]], visit: Visit) -> dict[str, Tensor]:
        """Parameters of a visit: of its layer, its skip and its adapter; only those that it has."""
        weights = {"ln_scale": self.ln_scale[visit.layer]}
        for name, bank in banks.items():
            row = visit.skip if name in SKIP_ROLES else visit.adapter if "adapter" in name else \
                visit.layer - (self.config.num_layers - len(bank))
            if row >= 0: weights[name] = self.quantized(name, bank[row], visit.layer)
        return weights

    def embed(self, ids: Tensor, segments: Segments) -> Tensor:
        """ids (1, T) -> (T, D), normalized: embedding, BigramHash, SmearGate.

        input (PR #1667): e_t + scale x sigmoid(W e_t[:12]) e_(t-1). static (2026-03-19 record): a blend with e_(t-1),
        a weight per channel. No token is smeared into the first of a segment, nor into BOS (the mask of PR #1855).
        """
        config, keep = self.config, (segments.positions != 0) & (ids[0] != BOS)
        x = self.kernels.look_up(ids[0], self.weight("embedding"))
        if config.bigram_hash_buckets:
            buckets = bigram_buckets(ids[0], segments.positions != 0, config.bigram_hash, config.bigram_hash_buckets)
            pairs = F.linear(F.embedding(buckets, self.weight("bigram_table")), self.weight("bigram_proj")[0])
            x = x + (pairs * self.weight("bigram_scale") if config.bigram_hash == "36313" else pairs)
        if config.smear_gate == "input":
            gate = F.linear(x[:, :config.gate_window], self.weight("smear_gate")).sigmoid() * self.smear_scale
            x = x + (gate * keep[:, None]).to(self.dtype) * x.roll(1, 0)
        if config.smear_gate == "static":
            x = torch.where(keep[:, None], torch.lerp(x.roll(1, 0), x, self.weight("static_smear").sigmoid()), x)
        return norm(F.linear(x, self.weight("embed_in")[0]) if config.embed_dim else x)

    def attend(self, w: Mapping[str, Tensor], n: Tensor, start: Tensor, angles: Sequence[Tensor], segments: Segments,
               exclude: bool, first_value: Tensor | None, base: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights w of a layer, its normalized input n (T, D) -> base plus attention's output (T, D), values (T, K, E).

        start = the first channels of n; exclude = XSA; first_value = the first layer's values, for the value residual
        (arXiv:2410.17897).
        """
        kernels, heads, spread = self.active_kernels, ((config := self.config).num_heads, config.num_kv_heads), ()
        qkv = self.project(n, torch.cat((w["q_proj"], w["k_proj"], w["v_proj"])))
        if any(name.endswith("_in") for name in w):
            parts = qkv.split([len(w[f"{x}_proj"]) for x in "qkv"], -1)
            qkv = torch.cat([adapted(part, n, w, target) for part, target in zip(parts, "qkv")], -1)
        if kernels.rotate_heads: q, k, v, *spread = kernels.rotate_heads(qkv, w["q_gain"], *angles, config.head_dim)
        else:
            qk, v = qkv.unflatten(-1, (-1, config.head_dim)).split([sum(heads), heads[1]], 1)
            q, k = rotary(norm(qk), *angles).split(heads, 1)
            q = q * w["q_gain"][:, None]
            if "value_mix" in w and first_value is not None: v = w["value_mix"][0] * first_value + w["value_mix"][1] * v
        y = self.attention(q, k, v, segments, *spread)
        if "attn_gate" in w:
            inner = config.sparse_attn_gate_scale if config.attn_gate == "sparse" else 1.0
            read, gate = n if config.attn_gate == "dense" else start, w["attn_gate"]  # start may be wider
            gate = F.linear(read, F.pad(gate, (0, read.size(1) - gate.size(1))), w.get("attn_gate_bias"))
            opened = (inner * gate.float()).sigmoid() * (2 if config.attn_gate == "output" else 1)
        else: opened = torch.ones_like(q[:, :, 0], dtype=torch.float32)
        if exclude and kernels.exclude: y = kernels.exclude(y, v, opened)
        else: y = ((exclusive(y, v) if exclude else y) * opened[:, :, None]).flatten(1).to(self.dtype)
        return adapted(self.project(norm(y) if config.projection_norm else y, w["out_proj"], base), n, w, "out"), v

    def project(self, x: Tensor, weight: Tensor, base: Tensor | None = None) -> Tensor:
        """x (T, K), weight (N, K), base (T, N) or None -> base + x weight^T."""
        if kernel := self.active_kernels.linear_add: return kernel(x, weight, base)
        out = self.active_kernels.linear(x, weight)
        return out if base is None else (base.float() + out).to(self.dtype)  # rounded once; no product takes base in

    def feed_forward(self, w: Mapping[str, Tensor], n: Tensor, base: Tensor | None) -> Tensor:
        """Weights w of a layer, its normalized input n (T, D) -> base plus the MLP's output (T, D)."""
        config, kernel = self.config, self.active_kernels.leaky2
        if kernel: out = kernel(n, w["up_proj"], w["down_proj"], base, config.leaky_relu_slope)
        else:
            hidden = ACTIVATIONS[config.mlp_activation](self.project(n, w["up_proj"]), config.leaky_relu_slope)
            out = self.project(norm(hidden) if config.projection_norm else hidden, w["down_proj"], base)
        return adapted(out, n, w, "mlp")

    def mix_norm(self, skipped: Any, x: Tensor, x0: Tensor, mix: Tensor, scale: Tensor, chain: Tensor) -> Any:
        """Streams (T, D), their weights mix (3, D) -> their blend, its norm, the norm's first channels, and the chain
        of x0's gradient (see load_mix_norm). A kernel gives 16 of those channels for 12: their products are faster."""
        window, kernel = self.config.gate_window, self.active_kernels.mix_norm
        if kernel: return kernel(skipped, x, x0, mix, scale, chain, min(-(-window // 16) * 16, x.size(1)))
        mixed = mix[1] * x + mix[2] * x0 if skipped is None else mix[0] * skipped + mix[1] * x + mix[2] * x0
        n = norm(mixed := mixed.to(self.dtype), scale)
        return mixed, n, n[:, :window], chain

    def block(self, w: dict[str, Tensor], lanes: Sequence[Tensor], skipped: Tensor | None, x0: Tensor, chain: Tensor,
              angles: tuple[Tensor, Tensor], segments: Segments, exclude: bool, parallel: bool,
              first_value: Tensor | None) -> tuple[Sequence[Tensor], Tensor | None, Tensor]:
        """Weights w of a visit and the lanes, (T, D) each -> the lanes behind it; its values (T, K, E) if any layer
        takes the first one's; the chain of x0's gradient.

        There is one lane until the first parallel block. Scales of outputs go into their matrices.
        """
        config, x, mlp_lane, scale, resid = self.config, lanes[0], lanes[-1], w["ln_scale"], w["resid_mix"]
        mix, w = torch.stack((0 * resid[0], *resid)), w | {m: w[s][:, None] * w[m] for m, s in SCALES.items() if m in w}
        if skipped is not None:
            skip, gate = w["skip_weight"], w["skip_gate"].sigmoid() if config.skip_gates_enabled else None
            blend = (skip, torch.ones_like(skip)) if gate is None else ((1 - gate) * skip, gate)
            if parallel or "mean_smear" in w: x, skipped = (blend[0] * skipped + blend[1] * x).to(self.dtype), None
            else: mix = torch.stack((resid[0] * blend[0], resid[0] * blend[1], resid[1]))
        w = {name: value.to(self.dtype) for name, value in w.items()}
        if "mean_smear" in w:
            x = torch.lerp(x, segment_mean(x, segments.positions).to(self.dtype), w["mean_smear"].tanh())
        mixed, attn_in, start, chain = self.mix_norm(skipped, x, x0, mix, scale, chain)
        base = None if parallel else mixed
        attn_out, v = self.attend(w, attn_in, start, angles, segments, exclude, first_value, base)
        v = v if config.value_residual else None
        if not parallel:
            return (self.feed_forward(w, attn_in if config.gptj_block else norm(attn_out, scale), attn_out),), v, chain
        # both sublayers read the old lanes; each lane keeps a share of itself and takes some of both outputs
        mlp_out = self.feed_forward(w, norm(mlp_lane, scale), None)
        stay, share = w["lane_resid"], w["lane_mix"]
        return (stay[0] * x + share[0, 0] * attn_out + share[1, 0] * mlp_out,
                stay[1] * mlp_lane + share[0, 1] * attn_out + share[1, 1] * mlp_out), v, chain

    def features(self, ids: Tensor, segments: Segments, adapters: Mapping[str, Any] = EMPTY) -> Tensor:
        """ids (1, T) -> what the head reads (T, EMBED_DIM)."""
        config = self.config
        banks = {name: p.unbind(0) for name, p in self.named_parameters() if name not in GLOBAL_ROLES}
        cos, sin = (getattr(self, f"{name}_{self.training}")[segments.positions] for name in ("cos", "sin"))
        x0 = chain = self.embed(ids, segments)
        lanes, kept, first_value = (x0,), [], None
        for place, visit in enumerate(self.plans[1 if self.looping else 0]):
            skipped, weights = kept.pop() if visit.skip >= 0 else None, self.visit_weights(banks, visit)
            weights |= {name: parts[place] for name, parts in adapters.items() if not name.startswith("head")}
            lanes, v, chain = self.block(weights, lanes, skipped, x0, chain, (cos, sin), segments, visit.layer >= (
                config.num_layers - config.xsa_last_n), visit.parallel, first_value)
            first_value = v if first_value is None else first_value
            if visit.push: kept.append(lanes[0])
        return self.merge(lanes[0], lanes[-1])

    def merge(self, x: Tensor, mlp_lane: Tensor) -> Tensor:
        """The two lanes (T, D) -> what the head reads (T, EMBED_DIM)."""
        features = norm((x + mlp_lane) * 0.5 if self.config.parallel_start_layer else x)
        return F.linear(features, self.weight("embed_out")[0]) if self.config.embed_dim else features

    def head_weight(self) -> Tensor:
        """-> (V, EMBED_DIM): the matrix that makes logits."""
        return self.weight("embedding" if self.config.tie_embeddings else "head")

    def caps(self) -> Tensor:
        """-> (2,): caps of logits above and below 0; two_sided: learned on a log scale, so that steps are shares."""
        cap, learned = self.config.logit_softcap, self.config.softcap_type == "two_sided"
        return cap * (self.softcap_scale.clamp(max=0.6).exp() if learned else self.ln_scale.new_ones(2))

    def logits(self, features: Tensor, adapters: Mapping[str, Tensor] = EMPTY) -> Tensor:
        """features (T, EMBED_DIM) -> softcapped logits (T, V) float32."""
        cap, kind = self.config.logit_softcap, self.config.softcap_type
        logits = adapted(self.active_kernels.head(features, self.head_weight()), features, adapters, "head").float()
        if self.config.vocab_bias: logits = logits + self.vocab_bias
        if kind == "two_sided": cap = torch.where(logits >= 0, *self.caps())
        squashed = poly5(logits / cap) if kind == "poly5" else 2 * (logits * (2 / cap)).sigmoid() - 1  # = tanh
        return (cap if self.training else cap / self.temperature) * squashed

    def forward(self, ids: Tensor, targets: Tensor, segments: Segments, adapters: Mapping[str, Tensor] = EMPTY,
                rows: Tensor | None = None) -> Tensor:
        """ids (1, T), targets (1, T) or (1, T, C) -> nats (T,) or (T, C) float32, from one pass over the logits.

        A target of -1 has 0 nats. In training the first column includes the z-loss. adapters: TARGET_document_in, _out
        (docs, visits, ...), see adapted; the head's have one visit. rows (N,): tokens whose targets these are; no
        others reach the head.
        """
        scale = self.config.ttt_lora_alpha / self.config.ttt_lora_rank
        parts = {k: (x * scale if k.endswith("out") else x).to(self.dtype).unbind(1) for k, x in adapters.items()}
        features = self.features(ids, segments, parts)
        return self.nats(features if rows is None else features[rows], targets[0],
                         {name: part for name, (part, *_) in parts.items() if name.startswith("head")})

    def nats(self, features: Tensor, targets: Tensor, adapters: Mapping[str, Tensor] = EMPTY) -> Tensor:
        """features (T, EMBED_DIM), targets (T,) or (T, C) -> nats, shaped like the targets."""
        ce = self.active_kernels.cross_entropy
        if ce and targets.dim() == 1 and not adapters and self.temperature == 1:
            return ce(features, self.head_weight(), targets, self.caps(), int(self.config.softcap_type == "two_sided"))
        logits, columns = self.logits(features, adapters), targets.view(len(targets), -1).unbind(1)
        columns = [F.cross_entropy(logits, column, reduction="none", ignore_index=-1) for column in columns]
        if self.config.z_loss and self.training:
            columns[0] = columns[0] + self.config.z_loss * logits.logsumexp(-1).square()
        return columns[0] if targets.dim() == 1 else torch.stack(columns, 1)


def compile_model(model: GPT, compiled: bool) -> Forward:
    """The same function, compiled if so asked: in parts, which makes few graphs, since all layers share them."""
    for name in ("embed", "block", "merge", "nats") if compiled else ():
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False, fullgraph=True))
    return model


# ====================================================================================================================
# 6. optim: which optimizer, learning rate, weight decay and quantizer each parameter has (PARAM_TABLE), and the step.
#    Banks are optimized by Muon, shared out over ranks: reduce-scatter, orthogonalize the own matrices, all-gather.
#    All else is small enough for AdamW on every rank; its gradients travel first, in one buffer with the loss.
# ====================================================================================================================


class Role(NamedTuple):
    """Names of Config fields, but for `optimizer`."""

    optimizer: str  # muon or adam
    lr: str
    weight_decay: str
    quantizer: str = ""  # "" = kept in float16
    bits: str = ""
    clip_sigmas: str = ""


ATTN = Role("muon", "matrix_lr", "muon_wd", "matrix_quantizer", "matrix_bits", "attn_clip_sigmas")
TABLE = Role("adam", "embedding_lr", "embed_wd", "embed_quantizer", "embed_bits", "embed_clip_sigmas")
PARAM_TABLE = {
    "embedding": TABLE, "head": TABLE._replace(lr="head_lr"),
    "bigram_table": TABLE._replace(quantizer="matrix_quantizer", bits="matrix_bits"),
    **dict.fromkeys(MATRICES - {"up_proj"} | {"out_proj", "bigram_proj", "q_adapter_out", "v_adapter_out"}, ATTN),
    **dict.fromkeys(("up_proj", "down_proj"), ATTN._replace(clip_sigmas="mlp_clip_sigmas")),
    **dict.fromkeys((*CONSTANTS, "q_gain", "resid_mix", "skip_gate", "attn_gate", "smear_gate", "smear_scale",
                     "mean_smear", "softcap_scale", "vocab_bias"), Role("adam", "scalar_lr", "adam_wd"))}


def orthogonalize(x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Newton-Schulz: wide matrices (n, rows, columns) -> about U V^T of their singular value decompositions."""
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon_update(grad: Tensor, state: Mapping[str, Tensor], momentum: Tensor, tall: Tensor, row_normalize: bool,
                beta2: float, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Muon with Nesterov momentum: gradients (n, rows, columns), rows <= columns -> updates in the gradients' dtype.

    Changes state. tall (n, 1, 1) bool marks matrices that are stored transposed: what is said of rows holds for the
    rows they have in the model, which are then the columns. MuonEq-R (PR #1394) and NeoMuon give the rows unit norm
    before the orthogonalization; NorMuon (arXiv:2510.05491 as in PR #532, beta2 > 0) divides them by the running root
    mean square of their entries after it, and restores the norm of the whole matrix.
    """
    update = grad.float() + state["momentum"].mul_(momentum).add_(grad) * momentum
    if row_normalize:
        update = update / torch.where(tall, update.norm(2, -2, True), update.norm(2, -1, True)).clamp_min(1e-7)
    update = orthogonalize(update.to(grad.dtype), coefficients)
    if beta2:
        square, before = update.float().square(), update.float().norm(dim=(-2, -1), keepdim=True)
        rows = state["row_square"].lerp_(square.mean(-1, keepdim=True), 1 - beta2)
        columns = state["column_square"].lerp_(square.mean(-2, keepdim=True), 1 - beta2)
        scaled = update.float() / (torch.where(tall, columns, rows).sqrt() + 1e-10)
        update = (scaled * (before / (scaled.norm(dim=(-2, -1), keepdim=True) + 1e-10))).to(grad.dtype)
    return update


class MuonGroup:
    """Banks whose matrices have one shape once the tall ones are transposed, as one stack shared out over ranks."""

    def __init__(self, config: Config, names: list[str], params: Mapping[str, Tensor], world: World):
        self.names, self.world, self.dtype = names, world, world.dtype  # of the communication
        self.params = [params[name].detach() for name in names]
        self.tall = [p.size(1) > p.size(2) for p in self.params]
        self.count = sum(len(p) for p in self.params)  # matrices
        self.share = -(-self.count // world.size)  # of them per rank; the last slots may be empty
        device, (rows, columns) = self.params[0].device, sorted(self.params[0].shape[1:])
        sizes = {"momentum": (rows, columns)}
        if config.normuon_beta2: sizes |= {"row_square": (rows, 1), "column_square": (1, columns)}
        self.state = {key: torch.zeros(self.share, *size, device=device) for key, size in sizes.items()}
        tall = [flag for p, flag in zip(self.params, self.tall) for _ in p] + [False] * world.size * self.share
        self.own_tall = torch.tensor(tall[world.rank * self.share:][:self.share], device=device)[:, None, None]

    def pack(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors shaped like the banks -> one stack (share x world size, rows, columns)."""
        stack = torch.cat([(x.mT if tall else x).to(dtype) for x, tall in zip(tensors, self.tall)])
        return F.pad(stack, (0, 0, 0, 0, 0, self.share * self.world.size - self.count))

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """The inverse of pack."""
        return [x.mT if tall else x for x, tall in zip(packed[:self.count].split([*map(len, self.params)]), self.tall)]

    def scatter(self, grads: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Starts averaging the gradients over ranks -> (own share, work to wait for or None)."""
        packed = self.pack(grads, self.dtype)
        if self.world.size == 1: return packed, None
        own = torch.empty_like(self.state["momentum"], dtype=self.dtype)
        reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # the newer name, if any
        return own, reduce_scatter(own, packed.div_(self.world.size), async_op=True)

    def gather(self, own: Tensor) -> tuple[Tensor, Any]:
        """Starts collecting every rank's share -> (stack, work to wait for or None)."""
        if self.world.size == 1: return own, None
        packed = own.new_empty(self.share * self.world.size, *own.shape[1:])
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        return packed, all_gather(packed, own.contiguous(), async_op=True)


class Optimizer:
    """State and communication of one optimizer step over all parameters."""

    def __init__(self, config: Config, world: World, params: Mapping[str, Tensor]):
        assert set(params) <= set(PARAM_TABLE), set(params) - set(PARAM_TABLE)
        self.config, self.world, self.params = config, world, dict(params)
        shapes, adam = dict[tuple[int, ...], list[str]](), dict[tuple[str, str], list[Tensor]]()
        for name, parameter in params.items():
            role = PARAM_TABLE[name]
            if role.optimizer == "muon": shapes.setdefault(tuple(sorted(parameter.shape[1:])), []).append(name)
            else: adam.setdefault((role.lr, role.weight_decay), []).append(parameter)
        order = sorted(shapes, key=math.prod, reverse=True)  # the most work first
        self.groups = [MuonGroup(config, shapes[shape], self.params, world) for shape in order]
        settings = [{"params": members, "weight_decay": getattr(config, decay), "base_lr": getattr(config, lr)}
                    for (lr, decay), members in adam.items()]
        self.adam = torch.optim.AdamW(settings, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
        self.adam_params = [p for members in adam.values() for p in members]
        # the momentum is a tensor, so that a new value compiles nothing
        self.muon_update, self.momentum = muon_update, torch.zeros((), device=world.device)

    def reset(self) -> None:
        """Forgets all momentum, as before the first step."""
        self.adam.state.clear()
        torch._foreach_zero_([value for group in self.groups for value in group.state.values()])

    @torch.no_grad()
    def step(self, loss: Tensor, lr_scale: float, momentum: float, decay_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Updates the parameters from their gradients, which it zeroes -> (loss averaged over ranks, their norm)."""
        small = [p.grad for p in self.adam_params if p.grad is not None]
        buffer = torch.cat([loss.reshape(1), *(grad.reshape(-1) for grad in small)]) if self.world.size > 1 else None
        started = [] if buffer is None else [dist.all_reduce(buffer, async_op=True)]
        grads = {name: p.grad for name, p in self.params.items() if p.grad is not None}
        own, works = zip(*(group.scatter([grads[name] for name in group.names]) for group in self.groups))
        for work in filter(None, (*started, *works)): work.wait()
        if buffer is not None:
            loss, *reduced = (buffer / self.world.size).split([1, *(grad.numel() for grad in small)])
            for grad, value in zip(small, reduced): grad.copy_(value.view_as(grad))
        norm = self.clip(own, small)
        for settings in self.adam.param_groups: settings["lr"] = settings["base_lr"] * lr_scale
        self.momentum.fill_(momentum)
        coefficients = NEWTON_SCHULZ[self.config.muon_coefficients][:self.config.muon_backend_steps]
        gathered = [group.gather(self.muon_update(
            grad, group.state, self.momentum, group.own_tall, self.config.muon_row_normalize,
            self.config.normuon_beta2, coefficients)) for group, grad in zip(self.groups, own)]
        self.adam.step()
        for group, (packed, work) in zip(self.groups, gathered):
            if work: work.wait()
            self.apply(group, packed, lr_scale, decay_scale)
        torch._foreach_zero_([p.grad for p in self.params.values() if p.grad is not None])
        return loss.reshape(()), norm

    def clip(self, own: tuple[Tensor, ...], small: list[Tensor]) -> Tensor:
        """Scales the reduced gradients down to grad_clip_norm -> their global norm before that."""
        shares = torch.stack(torch._foreach_norm(own, dtype=torch.float32)).square().sum()
        if self.world.size > 1: dist.all_reduce(shares)
        norm = (shares + torch.stack(torch._foreach_norm(small)).square().sum()).sqrt()
        if self.config.grad_clip_norm:
            factor = (self.config.grad_clip_norm / (norm + 1e-6)).clamp_max(1.0)
            torch._foreach_mul_(own, factor.to(own[0].dtype))
            torch._foreach_mul_(small, factor)
        return norm

    def apply(self, group: MuonGroup, packed: Tensor, lr_scale: float, decay_scale: float) -> None:
        """w <- w (1 - lr wd) - lr sqrt(max(1, rows / columns)) update, for every bank of a group."""
        for name, parameter, update in zip(group.names, group.params, group.unpack(packed)):
            role = PARAM_TABLE[name]
            lr = getattr(self.config, role.lr) * lr_scale
            decay = lr * getattr(self.config, role.weight_decay) * decay_scale
            if not self.config.muon_wd_after: parameter.mul_(1 - decay)
            parameter.add_(update, alpha=-lr * math.sqrt(max(1.0, parameter.size(1) / parameter.size(2))))
            if self.config.muon_wd_after: parameter.mul_(1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """Everything, whatever the number of ranks; all ranks must call it."""
        muon: dict[str, dict[str, Tensor]] = {}
        for group in self.groups:
            for key, own in group.state.items():
                packed, work = group.gather(own)
                if work: work.wait()
                muon.setdefault(key, {}).update(zip(group.names, (x.cpu() for x in group.unpack(packed))))
        return {"adam": self.adam.state_dict()["state"], "muon": muon}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes this rank's share of a state written by any number of ranks."""
        self.adam.load_state_dict({"state": state["adam"], "param_groups": self.adam.state_dict()["param_groups"]})
        for group in self.groups:
            for key, own in group.state.items():
                packed = group.pack([state["muon"][key][name] for name in group.names], torch.float32)
                own.copy_(packed[self.world.rank * group.share:][:group.share])


# ====================================================================================================================
# 7. schedules: pure functions of progress in [0, 1] (of the step for the momentum's warm-up).
# ====================================================================================================================


def training_progress(config: Config, step: int, elapsed_seconds: float) -> float:
    """Share of the training budget that is used: of the wallclock or of ITERATIONS, whichever is further."""
    return min(max(step / config.iterations, elapsed_seconds / training_budget_seconds(config)), 1.0)


def training_budget_seconds(config: Config) -> float:
    """Wallclock less the reserve for calibration; infinite where training ends by ITERATIONS."""
    return config.max_wallclock_seconds - config.gptq_reserve_seconds if config.max_wallclock_seconds else math.inf


def warmdown(config: Config, progress: float, step: int) -> float:
    """1, then towards 0 over the last WARMDOWN_FRAC, but not below MIN_LR.

    WARMDOWN_ITERS steps are turned into a fraction by the steps taken so far (the published time-based warmdown).
    """
    window = config.warmdown_frac
    if config.warmdown_iters: window = min(config.warmdown_iters * progress / step, 1.0) if step and progress else 0.0
    return max((1 - progress) / window, config.min_lr) if 1 - progress < window else 1.0


def lr_multiplier(config: Config, progress: float, step: int) -> float:
    """The warmdown times the root of the batch's share."""
    return warmdown(config, progress, step) * scheduled(config, "batch_schedule", progress, 1.0) ** 0.5


def decay_multiplier(config: Config, progress: float) -> float:
    """Of MUON_WD: 1, then linear to WD_TAPER_FINAL_MULT (2026-04-18 record)."""
    start = config.wd_taper_start_frac
    return 1 + (max(progress - start, 0.0) / (1 - start) if 0 < start < 1 else 0.0) * (config.wd_taper_final_mult - 1)


def scheduled(config: Config, name: str, progress: float, default: float) -> float:
    """Value of a schedule string at this progress."""
    return next((value for value, until in parse_schedule(getattr(config, name)) if progress <= until), default)


class Stage(NamedTuple):
    """What makes steps differ in their graph or their cost."""

    looping: bool
    quantizing: bool  # QAT is on
    seq_len: int
    batch_share: float


def stage_at(config: Config, progress: float, step: int) -> Stage:
    """The stage of a step that starts at this progress."""
    quantizing = 0 < config.qat_start <= progress or warmdown(config, progress, step) < config.late_qat_threshold
    seq_len = int(scheduled(config, "train_seq_schedule", progress, config.train_seq_len))
    share = scheduled(config, "batch_schedule", progress, 1.0)
    return Stage(bool(config.num_loops) and progress >= config.enable_looping_at, quantizing, seq_len, share)


def stages(config: Config) -> dict[Stage, float]:
    """Every stage that a run may pass -> its share of the progress, to a thousandth."""
    found = [stage_at(config, i / 1000, i * config.iterations // 1000) for i in range(1000)]
    ends = [end for text in (config.train_seq_schedule, config.batch_schedule) for _, end in parse_schedule(text)]
    others = [stage_at(config, end, int(end * config.iterations)) for end in ends]
    unsure = (False, True) if config.warmdown_iters and config.late_qat_threshold else ()  # the clock decides when
    others += [stage._replace(quantizing=on) for stage in found + others for on in unsure]
    return {stage: found.count(stage) / 1000 for stage in dict.fromkeys(found + others)}


def muon_momentum(config: Config, step: int) -> float:
    """Linear from MUON_MOMENTUM_WARMUP_START to MUON_MOMENTUM over the warm-up steps."""
    share = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps else 1.0
    return config.muon_momentum_warmup_start + share * (config.muon_momentum - config.muon_momentum_warmup_start)


# ====================================================================================================================
# 8. train: weights from data, inside the wallclock. In: Config, World, Dataset. Out: the last and the averaged weights.
#    The clock is rank 0's; each step all ranks agree on it and on stopping, so that none takes a step alone.
# ====================================================================================================================

# What the parameters and the function they compute depend on, stored in checkpoints and artifacts: settings of the
# data, and all of the model but for what matters in training alone.
MODEL_FIELDS = ["vocab_size", "train_seq_len", "document_mask",
                *list(KINDS)[list(KINDS).index("num_layers"):list(KINDS).index("tied_embed_init_std")]]
DIVERGED = "training diverged; lower MATRIX_LR, TIED_EMBED_LR or SCALAR_LR"
# Attributes of a Trainer that its checkpoints hold besides weights.
COUNTERS = ("step", "tokens", "elapsed_seconds", "step_seconds", "finished", "last_loss", "num_snapshots")


def model_fields(config: Config) -> dict[str, Any]:
    return {name: getattr(config, name) for name in MODEL_FIELDS}


class Interrupted(Exception):
    """Training was stopped by a signal after its checkpoint, the argument, was written."""


class Trainer:
    """Model, optimizer and averages, and the loop over steps."""

    def __init__(self, config: Config, world: World, log: Log, dataset: Dataset, attention: Attention, compiled: bool,
                 fake_quantize: FakeQuantize | None = None):
        self.config, self.world, self.log, self.compiled = config, world, log, compiled
        self.fake_quantize, self.fingerprint = fake_quantize, dataset.fingerprint
        self.model = GPT(config, world.dtype, attention, choose_kernels(config, world.device)).to(world.device)
        self.model.init_weights(config.seed)
        self.enter(stage_at(config, 0.0, 0))
        self.params = dict(self.model.named_parameters())
        self.optimizer = Optimizer(config, world, self.params)
        self.forward = compile_model(self.model, compiled)
        if compiled: self.optimizer.muon_update = torch.compile(muon_update, dynamic=False)
        for stage in stages(config): config.accumulation_steps(world.size, stage.batch_share)
        # one shape for every batch; empty segments cost a little of attention's time
        self.num_segments = {k: -(-most // 8) * 8 for k, most in dataset.max_segments.items()} if compiled else {}
        self.loader = TrainLoader(config, world, dataset.train, self.num_segments)
        self.averages = {name: p.detach().clone() for name, p in self.params.items()} if config.ema_decay else {}
        self.snapshots, self.num_snapshots = dict[str, Any](), 0  # their sum, by parameter (SWA)
        self.micro_weight = torch.ones((), device=world.device)  # of a micro-batch's loss; CUDA graphs read it in place
        # by stage, a micro-batch's forward and backward pass as one launch; where it reads; where it writes the loss
        self.graphs, self.graph_pool = dict[Stage, tuple[torch.cuda.CUDAGraph, Batch, Tensor]](), None
        self.step, self.tokens, self.finished = 0, 0, False  # tokens: used of the stream so far, by all ranks
        self.elapsed_seconds, self.step_seconds, self.saved_seconds = 0.0, 0.0, 0.0  # in all, for a step, when saved
        # the newest step: number, the schedules in words, loss on the CPU, the event after which it is valid (on CUDA)
        self.pending: tuple[int, str, Tensor, Any] | None = None
        self.last_loss, self.logged_twentieths = math.nan, 0
        self.num_params = sum(p.numel() for p in self.params.values())
        self.checkpoint_path, self.last_checkpoint = Path(config.log_dir) / f"{config.run_id}.checkpoint", config.resume

    # --- one step
    def train_step(self, micro_batches: Sequence[Batch], progress: float) -> Tensor:
        """Forward, backward, reduce, update, average -> loss (nats per token) averaged over all ranks."""
        config, step = self.config, self.step
        self.micro_weight.fill_(1 / len(micro_batches))
        total = sum(map(self.micro_step, micro_batches), torch.zeros((), device=self.world.device))
        loss, _ = self.optimizer.step(total, lr_multiplier(config, progress, step), muon_momentum(config, step),
                                      decay_multiplier(config, progress))
        if self.averages:  # corrected so that the initial weights have no share
            share = (1 - config.ema_decay) / (1 - config.ema_decay ** (step + 1))
            with torch.no_grad(): torch._foreach_lerp_([*self.averages.values()], [*self.params.values()], share)
        return loss

    def micro_step(self, batch: Batch) -> Tensor:
        """Forward and backward, gradients added up, by the stage's CUDA graph if it has one -> share of the loss."""
        if recorded := self.graphs.get(self.stage._replace(batch_share=1.0)):
            graph, inputs, loss = recorded
            map_tensors(Tensor.copy_, inputs, batch)
            graph.replay()
            return loss
        loss = self.forward(*batch).mean() * self.micro_weight
        loss.backward()
        return loss.detach()

    def capture(self, batch: Batch) -> None:
        """Records micro_step on batches of this shape as a CUDA graph of the present stage; it must have run before.

        All graphs share memory, and gradients stay where they are: the optimizer zeroes them in place.
        """
        key = self.stage._replace(batch_share=1.0)
        if not (self.config.cuda_graphs and self.compiled) or key in self.graphs: return
        graph, inputs = torch.cuda.CUDAGraph(), map_tensors(torch.clone, batch)
        with torch.cuda.graph(graph, self.graph_pool, capture_error_mode="thread_local"): loss = self.micro_step(inputs)
        self.graphs[key], self.graph_pool = (graph, inputs, loss), graph.pool()

    def enter(self, stage: Stage) -> None:
        """Switches the model to the graph of a stage."""
        self.stage, self.model.looping = stage, stage.looping
        self.model.fake_quantize = self.fake_quantize if stage.quantizing else None

    def take_snapshot(self) -> None:
        """Adds the averaged weights, or the present ones, to the sum (SWA)."""
        for name, value in (self.averages or self.params).items():
            self.snapshots[name] = value.detach() + self.snapshots.get(name, 0)
        self.num_snapshots += 1

    def warmup(self, steps: int) -> dict[Stage, float]:
        """Runs throw-away steps of every stage on made-up tokens, then resets everything. -> {stage: seconds a step}.

        Compiles every graph that training needs before the clock starts.
        """
        config, seconds = self.config, {}
        generator = np.random.default_rng(config.seed)
        window = generator.integers(min(4, config.vocab_size - 1), config.vocab_size, config.micro_batch_tokens + 1)
        for stage in stages(config):
            self.enter(stage)
            length, bound = stage.seq_len, self.num_segments.get(stage.seq_len, 0)
            documents = max(bound - -(-len(window) // length), 1)  # and no more segments than fit
            tokens = np.where(np.arange(len(window)) % -(-len(window) // documents), window, BOS)
            batch = to_device(window_batch(config, tokens, length, bound), self.world.device)
            for _ in range(steps):
                self.world.synchronize()
                start = time.perf_counter()
                self.train_step([batch] * config.accumulation_steps(self.world.size, stage.batch_share), 0.0)
                self.world.synchronize()
                seconds[stage] = time.perf_counter() - start
            self.capture(batch)
        self.enter(stage_at(config, 0.0, 0))
        self.model.init_weights(config.seed)
        self.optimizer.reset()
        for name, average in self.averages.items(): average.copy_(self.params[name].detach())
        return seconds

    # --- the loop
    def run(self, stop: StopRequest, validate: Callable[[], Any]) -> None:
        """Trains to the end of the budget, writes a last checkpoint. Interrupted after a signal, UserError for NaN."""
        config, stop.deferred = self.config, True
        budget, last_step = training_budget_seconds(config), config.force_stop_step or config.iterations
        in_flight = 1 if self.world.device.type == "cuda" else 0
        self.start, first = time.perf_counter() - self.elapsed_seconds, self.step
        while self.step < last_step:
            clock, stops = self.world.sum([(time.perf_counter() - self.start) * (self.world.rank == 0), stop.received])
            if self.step > first: self.step_seconds = clock - self.elapsed_seconds
            self.elapsed_seconds = clock
            if stops or clock + (1 + in_flight) * self.step_seconds > budget: break
            if config.checkpoint_every_seconds and clock - self.saved_seconds >= config.checkpoint_every_seconds:
                self.report()
                self.saved_seconds, first = clock, self.step + 1  # what writing takes is no step's time
                self.save()
            progress = training_progress(config, self.step, clock)
            loss = self.train_step(self.next_batches(progress), progress)
            self.step += 1
            if warmdown(config, progress, self.step) < config.swa_start_frac and self.step % config.swa_every == 0:
                self.take_snapshot()
            self.report(loss, progress)
            if not in_flight: self.report()
            if config.val_loss_every and self.step % config.val_loss_every == 0:
                self.report()
                self.validate(validate)
        self.report()
        self.elapsed_seconds = self.world.gather(time.perf_counter() - self.start)[0]
        self.log.progress("")
        stop.deferred = False
        self.finished = not self.world.sum([stop.received])[0]
        if self.finished and self.step < last_step:
            self.log(f"stopping_early: wallclock_cap train_time:{self.elapsed_seconds * 1000:.0f}ms "
                     f"step:{self.step}/{config.iterations}")
        self.save()
        if not self.finished: raise Interrupted(self.checkpoint_path)

    def next_batches(self, progress: float) -> list[Batch]:
        """Enters the stage of this progress and takes the micro-batches of its step."""
        if (stage := stage_at(self.config, progress, self.step)) != self.stage:
            self.enter(stage)
            self.log(f"stage step:{self.step} " + " ".join(f"{k}:{v:g}" for k, v in stage._asdict().items()))
        count = self.config.accumulation_steps(self.world.size, stage.batch_share)
        part = self.world.size * self.config.micro_batch_tokens
        first, self.tokens = self.tokens // part, self.tokens + count * part
        return [self.loader.micro(first + j, stage.seq_len) for j in range(count)]

    def report(self, loss: Tensor | None = None, progress: float = 0.0) -> None:
        """Sends the loss of a step on its way to the host; waits for that of the step before, checks it, logs it."""
        pending, self.pending = self.pending, None
        if loss is not None:
            scale, host = lr_multiplier(self.config, progress, self.step - 1), loss.to("cpu", non_blocking=True)
            done = torch.cuda.current_stream().record_event() if loss.is_cuda else None
            self.pending = self.step, f"lr_multiplier:{scale:.3f} looping:{self.stage.looping:d}", host, done
        if pending is None: return
        step, schedule, host, done = pending
        if done: done.synchronize()
        self.last_loss = host.item()
        self.check(math.isfinite(self.last_loss), f"train_loss:{self.last_loss}", step)
        config, every, seconds = self.config, self.config.train_log_every, time.perf_counter() - self.start
        text = (f"step:{step}/{config.iterations} train_loss:{self.last_loss:.4f} "
                f"train_time:{seconds * 1000:.0f}ms step_avg:{seconds * 1000 / step:.2f}ms")
        twentieths = int(training_progress(config, step, seconds) * 20)
        if step % every == 0 if every else twentieths > self.logged_twentieths or step == 1:
            self.logged_twentieths = twentieths
            self.log(f"{text} {schedule}")
        self.log.progress(text)

    def check(self, finite: bool, what: str, step: int) -> None:
        """UserError where training diverged."""
        kept = self.last_checkpoint or "none; CHECKPOINT_EVERY_SECONDS writes some"
        require(finite, f"{what} at step {step}: {DIVERGED}. Last checkpoint: {kept}")

    def validate(self, validate: Callable[[], Any]) -> None:
        """Scores the present weights; the clock stands still."""
        seconds, before = time.perf_counter() - self.start, time.perf_counter()
        self.model.eval()
        score = validate()
        self.model.train()
        self.start += (paused := time.perf_counter() - before)
        self.log(f"step:{self.step}/{self.config.iterations} val_loss:{score.val_loss:.4f} val_bpb:{score.val_bpb:.4f} "
                 f"train_time:{seconds * 1000:.0f}ms paused_seconds:{paused:.1f}")

    def use_averages(self) -> None:
        """Replaces the last weights by the averaged ones: of the snapshots, else the EMA, if any."""
        for name, average in (self.snapshots or self.averages).items():
            self.params[name].detach().copy_(average / max(self.num_snapshots, 1))

    # --- checkpoints
    def save(self) -> None:
        """Writes the checkpoint over the older one, whole or not at all; all ranks take part."""
        # the loss would show it one step later
        self.check(all(p.isfinite().all() for p in self.params.values()), "weights that are not finite", self.step)
        optimizer = {} if self.finished else self.optimizer.state_dict()
        if self.world.rank == 0:
            state = {"model": model_fields(self.config), "fingerprint": self.fingerprint, "looping": self.model.looping,
                     "params": self.model.state_dict(), "averages": self.averages, "snapshots": self.snapshots,
                     "optimizer": optimizer, **{name: getattr(self, name) for name in COUNTERS}}
            write_atomic(self.checkpoint_path, lambda file: torch.save(state, file), "LOG_DIR")
        self.last_checkpoint = str(self.checkpoint_path)
        self.log(f"checkpoint step:{self.step} path:{self.checkpoint_path}")

    def load(self, path: str) -> None:
        """Continues from a checkpoint. UserError for a file that is none, or belongs to another model or other data."""
        with refusing(Exception, f"RESUME={path}: no readable checkpoint ({{}})"):  # whatever a broken file leads to
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved = state["model"] | {"data_fingerprint": state["fingerprint"], "ema_decay>0": bool(state["averages"])}
        wanted = {"data_fingerprint": self.fingerprint, "ema_decay>0": bool(self.averages)}
        for name, value in (model_fields(self.config) | wanted).items():
            require(saved.get(name) == value, f"RESUME={path}: was trained with {name.upper()}={saved.get(name)}, now "
                    f"{value}: use the same settings and data")
        self.model.load_state_dict(state["params"])
        for name, average in self.averages.items(): average.copy_(state["averages"][name])
        self.snapshots = {name: value.to(self.world.device) for name, value in state["snapshots"].items()}
        for name in COUNTERS: setattr(self, name, state[name])
        self.saved_seconds = seconds = self.elapsed_seconds
        if self.finished: self.model.looping = state["looping"]
        else:  # what this run's own schedule says
            self.enter(stage_at(self.config, training_progress(self.config, self.step, seconds), self.step))
            self.optimizer.load_state_dict(state["optimizer"])
        self.log(f"resumed step:{self.step} train_time:{seconds * 1000:.0f}ms path:{path}")


# ====================================================================================================================
# 9. quantize: weights -> small integers with a scale per row, and back. QUANTIZERS are pairs, chosen by PARAM_TABLE.
# ====================================================================================================================

Arrays = dict[str, np.ndarray]  # what a quantizer makes of one tensor; "codes" are compressed on their own


class Guide(NamedTuple):
    """What calibration knows of a bank of n matrices."""

    feedback: Tensor  # (n, columns, columns) upper U, U^T U = inverse Hessian: how later columns make up for an error
    log_sensitivity: Tensor  # (n, rows, 1): logarithm of the loss for a unit square error of a weight


class Pair(NamedTuple):
    """A direction and its inverse. Of quantizers: (weights (..., rows, columns), steps (..., rows, 1), largest code,
    guide or None) -> Arrays; (Arrays, shape) -> float32 weights. Of codecs: bytes -> bytes; bytes -> bytes."""

    encode: Callable[..., Any]
    decode: Callable[..., Any]


MIN_SCALE = 2.0 ** -24  # the smallest float16 above 0: no scale underflows


def sigma_steps(weight: Tensor, bits: int, clip_sigmas: float) -> Tensor:
    """weights (..., columns) -> (..., 1): steps with which clip_sigmas standard deviations reach the last level.

    Of a single column it is the value itself that counts.
    """
    spread = weight.float().std(-1, keepdim=True) if weight.size(-1) > 1 else weight.float().abs()
    return clip_sigmas * spread / max(2 ** (bits - 1) - 1, 1)


def round_steps(steps: Tensor) -> Tensor:
    """Steps as float16 can hold them, in float32."""
    return steps.clamp(MIN_SCALE, 65504.0).half().float()


def coded(codes: Tensor, steps: Tensor, finer: Tensor | None = None) -> Arrays:
    """Codes (..., rows, columns), steps (..., rows, 1), thirds of a power of 2 by which columns have finer steps
    (n, columns) -> what the artifact keeps of them: int8 and float16."""
    columns = torch.zeros(1, codes.size(-1)) if finer is None else finer
    return {"columns": columns.to(torch.int8).cpu().numpy(), "scale": steps.flatten().half().cpu().numpy(),
            "codes": codes.flatten(0, -2).to(torch.int8).cpu().numpy()}


def nearest(weight: Tensor, steps: Tensor, levels: int) -> Tensor:
    """Weights (..., columns), steps (..., 1) -> codes in float32: the grid of rtn, for the exporter and for QAT.

    levels = 0 is binary: -1 and 1 (2026-03-24 binary record).
    """
    return (weight / steps).round().clamp(-levels, levels) if levels else torch.where(weight < 0, -1.0, 1.0)


def rtn_encode(weight: Tensor, steps: Tensor, levels: int, _: Guide | None = None) -> Arrays:
    """Round to nearest."""
    return coded(nearest(weight, steps := round_steps(steps), levels), steps)


def rescaled(values: Tensor, arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """Values in units of their steps (rows, columns) -> weights."""
    values = (values * torch.from_numpy(arrays["scale"]).float()[:, None]).unflatten(0, (len(arrays["columns"]), -1))
    return (values / 2 ** (torch.from_numpy(arrays["columns"]).float() / 3)[:, None]).view(shape)


def rtn_decode(arrays: Arrays, shape: tuple[int, ...]) -> Tensor:
    """Codes times the steps of their rows and columns; of rtn and gptq."""
    return rescaled(torch.from_numpy(arrays["codes"]).float(), arrays, shape)


@functools.cache
def trellis(states: int) -> tuple[Tensor, Tensor]:
    """-> next state (S, 2) by the parity of a code; odd (S,): code k stands for k + odd / 2 steps in a state.

    Ungerboeck's codes (IEEE Trans. Inf. Theory 28, 1982): even and odd codes of both kinds of states are four sets of
    points that lie far apart; the path decides which two of them are on offer. One state is plain rounding.
    """
    back, ahead = {1: (1, 0), 4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4)}[states]
    following = [[(s >> 1) ^ (back >> 1) * (s & 1) ^ (ahead >> 1) * parity for parity in (0, 1)] for s in range(states)]
    return torch.tensor(following), (torch.arange(states) % 2 * (states > 1)).float()


def search_codes(weight: Tensor, levels: int, feedback: Tensor, states: int) -> Tensor:
    """GPTQ over a trellis: weights (n, rows, columns) in units of their steps -> codes of the least weighted error.

    Columns are coded one after the other, and an error is handed on to the columns behind, as in GPTQ
    (arXiv:2210.17323); but each of the S survivors of a Viterbi search (trellis-coded quantization, Marcellin and
    Fischer 1990) carries its own errors along. After 128 columns only the best goes on.
    """
    following, odd = (x.to(weight.device) for x in trellis(states))
    into = following.flatten().argsort(stable=True).view(states, 2)  # edges to each state, as 2 x origin + parity
    targets, parity = (torch.arange(n, device=weight.device) for n in (states, 2))
    most = levels - (levels + parity) % 2  # the largest code of each parity
    weight, codes, state = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight[..., :1], dtype=torch.long)
    for first in range(0, weight.size(-1), 128):
        last = min(first + 128, weight.size(-1))
        rest = weight[..., None, first:last].repeat(1, 1, states, 1)  # (n, rows, S, columns to come) of each survivor
        cost, history = torch.full_like(rest[..., 0], math.inf).scatter_(2, state, 0.0), []
        for j in range(first, last):
            value = rest[..., :1] - odd[:, None] / 2
            code = (2 * ((value - parity) / 2).round() + parity).clamp(-most, most)
            error = (value - code) / feedback[:, j, j, None, None, None]  # (n, rows, S, 2)
            cost, best = (cost[..., None] + error.square()).flatten(-2)[..., into].min(-1)
            edge = into[targets, best]
            code, error = (x.flatten(-2).gather(-1, edge) for x in (code, error))
            history.append((edge // 2, code, error))
            rest = rest[..., 1:].gather(2, history[-1][0][..., None].expand(-1, -1, -1, last - j - 1))
            rest -= error[..., None] * feedback[:, None, None, j, j + 1:last]
        place = state = cost.argmin(-1, keepdim=True)
        kept = torch.empty_like(weight[..., first:last])
        for j, (origin, code, error) in reversed(list(enumerate(history))):  # back along the best path
            codes[..., first + j], kept[..., j] = (x.gather(2, place)[..., 0] for x in (code, error))
            place = origin.gather(2, place)
        weight[..., last:] -= kept @ feedback[:, first:last, last:]
    return codes


def search_encode(states: int, weight: Tensor, steps: Tensor, levels: int, guide: Guide | None = None) -> Arrays:
    """gptq (one state) and tcq; without a guide no feedback.

    A column's error costs, by what feedback leaves of it, 1 / U_jj^2. Their product over the columns is given, so their
    sum is least where all are equal: steps go with U_jj, which makes the order of the columns indifferent as well.
    """
    weight = weight.view(-1, *weight.shape[-2:])
    feedback = guide.feedback if guide else torch.eye(weight.size(2), device=weight.device).expand(len(weight), -1, -1)
    finer = -3 * feedback.diagonal(dim1=1, dim2=2).log2()
    finer = (finer - finer.mean(1, keepdim=True)).round().clamp(-32, 32)
    scale = 2 ** (finer / 3)[:, None]
    weight, steps = weight * scale, steps.view(*weight.shape[:2], 1)
    if guide: steps = steps.maximum(weight.abs().amax(-1, keepdim=True) / 120)  # no row is clipped
    return coded(search_codes(weight / (steps := round_steps(steps)), levels, feedback * scale, states), steps, finer)


def tcq_decode(arrays: Arrays, shape: tuple[int, ...], states: int = 8) -> Tensor:
    """Walks the trellis along each row's codes, whose parities say where it goes."""
    codes, (following, odd) = torch.from_numpy(arrays["codes"]).long(), trellis(states)
    values, state = torch.empty(codes.shape), torch.zeros(len(codes), dtype=torch.long)
    for j, code in enumerate(codes.t().contiguous()):
        values[:, j], state = code + odd[state] / 2, following[state, code & 1]
    return rescaled(values, arrays, shape)


QUANTIZERS = {"rtn": Pair(rtn_encode, rtn_decode), "gptq": Pair(functools.partial(search_encode, 1), rtn_decode),
              "tcq": Pair(functools.partial(search_encode, 8), tcq_decode), "fp16": Pair(  # the nearest in its range
                  lambda weight, *_: {"values": weight.clamp(-65504.0, 65504.0).half().cpu().numpy()},
                  lambda arrays, shape: torch.from_numpy(arrays["values"]).float().view(shape))}


BLOCK_PRODUCTS = (("q_proj", "k_proj", "v_proj"), ("out_proj",), ("up_proj",), ("down_proj",))  # in order


def gram(x: Tensor) -> Tensor:
    """x (T, D) -> x^T x, float32. Products of half-length numbers are exact there: GPUs need no copies."""
    if x.is_cuda and x.dtype != torch.float32: return torch.mm(x.t(), x, out_dtype=torch.float32)
    return x.float().t() @ x.float()


def calibrate(config: Config, world: World, model: GPT, batches: Iterable[Batch]) -> dict[str, Guide]:
    """Runs training text through the model, forward and backward -> {bank, and embedding or head: Guide}.

    A weight's error e costs about e^2 E[x^2] E[g^2]: x its input, g the gradient of the loss by its output (Kronecker
    form of the Fisher information, arXiv:1503.05671). E[x x^T] is GPTQ's Hessian; E[g^2] tells rows apart.
    """
    head = "embedding" if config.tie_embeddings else "head"
    order = [(names, visit.layer) for visit in model.plans[model.looping] for names in BLOCK_PRODUCTS] + [((head,), 0)]
    shapes = {name: (1, *param_shapes(config)[name])[-3:] for names, _ in order for name in names}
    source = {"k_proj": "q_proj", "v_proj": "q_proj"}  # whose input is theirs
    hessian = {k: torch.zeros(n, c, c, device=world.device) for k, (n, _, c) in shapes.items() if k not in source}
    gain = {name: torch.zeros(n, rows, device=world.device) for name, (n, rows, _) in shapes.items()}
    count = {name: torch.zeros(n, 1, device=world.device) for name, (n, _, _) in shapes.items()}
    spread, times = torch.zeros_like(hessian[head]), torch.zeros_like(gain[head])  # of the embedding where it is read

    def product(x: Tensor, weight: Tensor) -> Tensor:
        names, layer = next(calls)

        def record(x: Tensor, grad: Tensor) -> None:  # in the backward pass
            hessian[names[0]][layer] += gram(x)
            for name, part in zip(names, grad.split([shapes[name][1] for name in names], -1)):
                gain[name][layer] += part.float().square().sum(0)
                count[name][layer] += len(x)

        (y := F.linear(x, weight)).register_hook(functools.partial(record, x.detach()))
        return y

    def look_up(ids: Tensor, weight: Tensor) -> Tensor:
        times.add_(torch.bincount(ids, minlength=len(weight)))
        (x := F.embedding(ids, weight)).register_hook(lambda g: (spread.add_(gram(g)), None)[1])
        return x

    plain = GPT(replace(config, z_loss=0.0), world.dtype, model.attention, Kernels(product, product, look_up))
    plain.to(world.device).load_state_dict(model.state_dict(), assign=True)
    plain.requires_grad_(False).looping = model.looping
    plain.embedding.requires_grad_(True)  # so that gradients flow
    for batch in batches:
        calls = iter(order)
        plain(*batch).sum().backward()
        plain.embedding.grad = None
    for total in (*hessian.values(), *gain.values(), *count.values(), spread, times) if world.size > 1 else ():
        dist.all_reduce(total)
    # the products' outputs have their scale already
    for name in ("out_proj", "down_proj"): gain[name] *= getattr(model, SCALES[name]).detach().square()
    means = {name: total / count[name].clamp_min(1)[..., None] for name, total in hessian.items()}
    if config.tie_embeddings: means[head], gain[head] = tied(means[head], gain[head], spread, times)
    factors, guides = {name: inverse_factor(mean) for name, mean in means.items()}, {}
    for name in shapes:
        feedback = factors[source.get(name, name)]
        cost = gain[name].clamp_min(0.01 * gain[name].mean() + 1e-30).log()  # a row that never learns is not free
        guides[name] = Guide(feedback, (cost - 2 * feedback.diagonal(dim1=1, dim2=2).log().mean(1)[:, None])[..., None])
    return guides


def tied(hessian: Tensor, gain: Tensor, spread: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """What errors cost in a matrix that is head and embedding -> (Hessian, squared gradients of rows) of both uses.

    As a head e costs gain x e H e^T in a row; where it is read, `times` times the gradient's mean square along e, which
    is e spread e^T over the number of tokens. The sum over the rows and, apart from that, over the columns is kept.
    """
    both, reads = hessian + spread / gain.sum(), times * (spread.diagonal(dim1=1, dim2=2).sum() / times.sum())
    return both, (gain * hessian.diagonal(dim1=1, dim2=2).sum() + reads) / both.diagonal(dim1=1, dim2=2).sum()


def inverse_factor(hessian: Tensor) -> Tensor:
    """(n, c, c) symmetric -> upper U with U^T U = inverse of the damped Hessian; columns that are never used are free.

    By the reversed Cholesky factor (PR #1948): no inverse is formed.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damped = torch.where(diagonal > 0, diagonal, 1) + 0.01 * diagonal.mean(-1, keepdim=True)
    factor = torch.linalg.cholesky(hessian.diagonal_scatter(damped, dim1=1, dim2=2).flip(1, 2)).flip(1, 2)
    return torch.linalg.solve_triangular(factor, torch.eye(len(factor[0]), device=factor.device), upper=True)


def labels(config: Config, name: str, layer: int) -> list[str]:
    """What QUANT_OVERRIDES may call a layer of a bank: q_proj, q_proj:10, q_proj:-1, and q_proj:loop in the loop."""
    looped = config.num_loops and config.loop_start <= layer <= config.loop_end
    return [name, f"{name}:{layer}", f"{name}:{layer - config.num_layers}", *[f"{name}:loop"] * bool(looped)]


@functools.cache
def parse_overrides(config: Config) -> list[tuple[str, str, int, float]]:
    """QUANT_OVERRIDES -> (pattern, quantizer, bits or 0, clip or 0) of each part. UserError for what has no meaning."""
    everything = [label for name in param_shapes(config) if PARAM_TABLE[name].quantizer
                  for layer in range(config.num_layers) for label in labels(config, name, layer)]
    result = []
    for part in filter(None, config.quant_overrides.split(",")):
        found = re.fullmatch(r"([^=]+)=(\w+)(?:/([2-8])(?:/(?![0.]*$)(\d+\.?\d*))?)?", part)
        if not found or found[2] not in QUANTIZERS or not fnmatch.filter(everything, found[1]):
            raise UserError(f"QUANT_OVERRIDES={part}: must be like k_proj:-[12]=fp16, *:[3-7]=tcq/5/11.5 (2 to 8 bits, "
                            f"clip) or up_proj:loop=gptq; quantizers: {', '.join(QUANTIZERS)}")
        result.append((found[1], found[2], int(found[3] or 0), float(found[4] or 0)))
    return result


def quantizer_of(config: Config, piece: str) -> tuple[str, int, float]:
    """Parameter, or parameter:layer -> (key of QUANTIZERS, bits, clip in sigmas)."""
    name, _, layer = piece.partition(":")
    if not (role := PARAM_TABLE[name]).quantizer: return "fp16", 16, 0.0
    plan: Any = getattr(config, role.quantizer), getattr(config, role.bits), getattr(config, role.clip_sigmas)
    for pattern, *other in parse_overrides(config):
        if fnmatch.filter(labels(config, name, int(layer or 0)), pattern):
            plan = tuple(new or old for new, old in zip(other, plan))
    return plan


def cut_bank(config: Config, name: str, shape: Sequence[int]) -> dict[str, slice]:
    """Parameter -> {piece: its layers}: itself, or name:first for each run of layers with a quantizer of its own."""
    layers = config.num_layers if len(shape) == 3 and shape[0] == config.num_layers else 1
    plans = [quantizer_of(config, f"{name}:{layer}") for layer in range(layers)]
    starts: list[Any] = [layer for layer in range(layers) if not layer or plans[layer] != plans[layer - 1]]
    return {name if len(starts) == 1 else f"{name}:{a}": slice(a, b) for a, b in zip(starts, [*starts[1:], None])}


def fake_quantizer(config: Config) -> FakeQuantize:
    """What training sees of the weights while QAT is on: what rtn makes of them, with the steps of TARGET_BYTES=0.

    Gradients pass as if there were no rounding. QAT_NOISE: looped layers get uniform noise of the grid's step instead,
    fresh in each pass (Noisy QAT, PR #363).
    """
    plans = {(k, i): quantizer_of(config, f"{k}:{i}") for k in param_shapes(config) for i in range(config.num_layers)}

    def fake(name: str, layer: int, weight: Tensor) -> Tensor:
        quantizer, bits, clip_sigmas = plans[name, max(layer, 0)]
        # of what adam trains embedding, head and hashed pairs have a quantizer
        if quantizer == "fp16" or (PARAM_TABLE[name].optimizer == "adam" and not config.qat_embedding): return weight
        with torch.no_grad():
            step, levels = round_steps(sigma_steps(weight, bits, clip_sigmas)), 2 ** (bits - 1) - 1
            noisy = config.qat_noise and config.num_loops and config.loop_start <= layer <= config.loop_end
            change = (torch.rand_like(weight) - 0.5) * step if noisy else nearest(weight, step, levels) * step - weight
        return weight + change
    return fake


def step_sizes(config: Config, weights: Mapping[str, Tensor], guides: Mapping[str, Guide]) -> dict[str, Tensor]:
    """Steps (..., rows, 1) of all matrices that are not kept in float16.

    With entropy coding a row costs log2(spread / step) bits a weight and its error weighs sensitivity x step^2 / 12:
    the loss is least, for all bytes together, where that product is the same everywhere. QUANT_SENSITIVITY goes that
    part of the way, from steps in proportion to the rows' standard deviations, for matrices that have a guide. Binary
    and ternary grids stay as they were trained.
    """
    plans = {name: quantizer_of(config, name) for name in weights}
    plain = {name: sigma_steps(weights[name], bits, clip_sigmas).clamp_min(MIN_SCALE).log()
             for name, (quantizer, bits, clip_sigmas) in plans.items() if quantizer != "fp16"}
    guided = {k: -0.5 * guides[k].log_sensitivity.view_as(plain[k]) for k in plain if k in guides and plans[k][1] > 2}
    total = max(sum(weights[name].numel() for name in guided), 1)
    shift = sum(weights[name].numel() / total * (plain[name] - other).mean() for name, other in guided.items())
    return {name: value.lerp(guided[name] + shift, config.quant_sensitivity).exp() if name in guided else value.exp()
            for name, value in plain.items()}


@torch.no_grad()
def quantize(config: Config, weights: Mapping[str, Tensor], guides: Mapping[str, Guide] | None = None,
             multiplier: float = 1.0) -> dict[str, tuple[str, Arrays]]:
    """{name: weights} -> {piece: (quantizer, arrays)}, all steps times the multiplier. UserError for NaN, infinity."""
    pieces, known, result = {}, {}, {}
    for name, weight in weights.items():
        require(weight.isfinite().all(), f"{name}: holds NaN or infinity, nothing to quantize; lower learning rates")
        for piece, layers in cut_bank(config, name, weight.shape).items():
            pieces[piece] = weight.detach()[layers]
            if guides and name in guides: known[piece] = Guide(*(part[layers] for part in guides[name]))
    steps = step_sizes(config, pieces, known)
    for piece, weight in pieces.items():
        quantizer, bits, _ = quantizer_of(config, piece)
        levels = 127 if bits > 2 and (piece in known or config.target_bytes) else 2 ** (bits - 1) - 1
        size = steps[piece] * (multiplier if bits > 2 else 1) if piece in steps else weight  # not looked at by float16
        # no row is clipped; feedback may add a little
        if levels == 127: size = size.maximum(weight.abs().amax(-1, keepdim=True) / 120)
        result[piece] = quantizer, QUANTIZERS[quantizer].encode(weight.float(), size, levels, known.get(piece))
    return result


def predicted_bytes(config: Config) -> int:
    """Entropy of the codes of normal weights, plus scales and float16 tensors: about what a good coder reaches."""
    total = 0.0
    for name, shape in param_shapes(config).items():
        for piece, layers in cut_bank(config, name, shape).items():
            count = math.prod(shape) * len(range(shape[0])[layers]) / shape[0]
            quantizer, bits, clip_sigmas = quantizer_of(config, piece)
            if quantizer == "fp16": total += 2 * count
            else:  # a step of s standard deviations leaves log2(sqrt(2 pi e) / s) bits
                levels = max(2 ** (bits - 1) - 1, 1)
                per_weight = max(math.log2(math.sqrt(2 * math.pi * math.e) * levels / clip_sigmas), 0.0)
                total += count * (min(per_weight, math.log2(levels + 2 ** (bits - 1))) / 8 + 2 / shape[-1])
    return int(total)


# ====================================================================================================================
# 10. compress: arrays -> one artifact file.
#     Layout: magic, header length (uint32 little-endian), zlib-compressed JSON header, streams, sha256 of all before.
# ====================================================================================================================


ANS: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]


def rans_model(counts: np.ndarray) -> Any:
    """Counts (n,) -> the distribution that both directions code with."""
    return ANS.model.Categorical(counts / counts.sum(dtype=np.float64), perfect=False)


def rans_encode(data: bytes) -> bytes:
    """Order-0 entropy coder: range asymmetric numeral systems (arXiv:1311.2540), by the constriction package.

    Layout, little-endian: number of bytes uint64, first symbol and number of symbols - 1 uint8, their counts to scale
    uint16, 32-bit words. A symbol is a byte with its highest bit flipped, so that small signed integers lie side by
    side.
    """
    if not data: return b""
    symbols = (np.frombuffer(data, np.uint8) ^ 0x80).astype(np.int32)
    first, coder = min(int(symbols.min()), 254), ANS.stack.AnsCoder()
    counts = np.bincount(symbols - first, minlength=2)
    counts = np.maximum(counts * 65535 // counts.max(), counts > 0).astype("<u2")
    coder.encode_reverse(symbols - np.int32(first), rans_model(counts))
    compressed = coder.get_compressed().astype("<u4").tobytes()
    return struct.pack("<QBB", len(data), first, len(counts) - 1) + counts.tobytes() + compressed


def rans_decode(data: bytes) -> bytes:
    """The inverse of rans_encode."""
    if not data: return b""
    (count, first, _), split = struct.unpack("<QBB", data[:10]), 10 + 2 * (data[9] + 1)
    coder = ANS.stack.AnsCoder(np.frombuffer(data[split:], "<u4").astype(np.uint32))
    symbols = coder.decode(rans_model(np.frombuffer(data[10:split], "<u2")), count)
    return ((symbols + first).astype(np.uint8) ^ 0x80).tobytes()


CODECS = {"rans": Pair(rans_encode, rans_decode)} | {
    name: Pair(functools.partial(module.compress, **options), module.decompress) for name, module, options in (
        ("zlib", zlib, {"level": 9}), ("brotli", brotli, {"quality": 11, "lgwin": 24}),
        ("zstd", zstandard, {"level": 22}), ("lzma", lzma, {"preset": 9 | lzma.PRESET_EXTREME}))}
SIDE_CODECS = {**dict(zip(CODECS, CODECS)), "rans": "brotli"}  # of float16 values: an order-0 coder sees no repeats
ARTIFACT_MAGIC = b"PGOLF\x00\x00\x04"  # the last byte is the version


CLASSES = 32
FINEST, COARSEST = -1.0, 6.0  # powers of 2 by which fit_artifact multiplies steps


def row_classes(codes: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Codes (rows, columns) -> (rows,) uint8: the size of their root mean square in thirds of a power of 2.

    columns (n, columns) int8: thirds of a power of 2 by which the columns of n matrices are larger than they were.
    """
    values = codes.reshape(len(columns), -1, codes.shape[1]) * np.exp2(columns / -3).astype(np.float32)[:, None]
    size = np.square(values).mean(2).reshape(-1)
    return np.clip(np.rint(1.5 * np.log2(size + 0.01)) + 10, 0, CLASSES - 1).astype(np.uint8)


def by_class(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes of rows, sizes of columns (n, columns) -> (order that sorts the codes by class, codes of each class).

    Codes of one class, of all tensors, share a stream: they have nearly one distribution, so an order-0 coder needs
    fewer bits for them apart than together, by more than the classes cost.
    """
    classes = np.clip(rows.reshape(len(columns), -1, 1) + columns[:, None].astype(np.int16), 0, CLASSES - 1).ravel()
    return np.argsort(classes, kind="stable"), np.bincount(classes, minlength=CLASSES)


def pack_artifact(config: Config, quantized: Mapping[str, tuple[str, Arrays]], info: Mapping[str, Any]) -> bytes:
    """Quantized tensors -> the artifact's bytes: a stream of codes for each class, the classes, float16 values."""
    specs, side, groups = [], [], [list[bytes]() for _ in range(CLASSES)]
    for name, (quantizer, arrays) in quantized.items():
        specs.append([name, quantizer, {key: array.shape for key, array in arrays.items()}])
        for key, array in arrays.items():
            if key == "codes":
                order, sizes = by_class(rows := row_classes(array, arrays["columns"]), arrays["columns"])
                side.append(rows.tobytes())
                for group, part in zip(groups, np.split(array.reshape(-1)[order], np.cumsum(sizes)[:-1])):
                    group.append(part.tobytes())
            # bytes of one significance side by side
            else: side.append(array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes())
    with ThreadPoolExecutor() as pool:  # the compressors release the interpreter lock
        streams = [*pool.map(CODECS[config.compressor].encode, (b"".join(group) for group in groups)),
                   CODECS[SIDE_CODECS[config.compressor]].encode(b"".join(side))]
    header = {"model": model_fields(config), **info, "codec": config.compressor, "tensors": specs,
              "streams": [len(stream) for stream in streams]}
    packed_header = zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9)
    body = b"".join([ARTIFACT_MAGIC, len(packed_header).to_bytes(4, "little"), packed_header, *streams])
    return body + hashlib.sha256(body).digest()


def fit_artifact(config: Config, weights: Mapping[str, Tensor], guides: Mapping[str, Guide], info: Mapping[str, Any],
                 code_bytes: int, log: Callable[[str], None]) -> bytes:
    """Quantizes and packs with the finest steps that fit: artifact and code have TARGET_BYTES. UserError if none do."""
    count = sum(value.numel() for name, value in weights.items() if quantizer_of(config, name)[0] != "fp16")
    target, best, slope = config.target_bytes - code_bytes, b"", max(count / 8, 1)  # at most a bit for each weight
    last, data, wanted = (0.0, predicted_bytes(config)), b"", 0.9995 * target  # last: log2 of the factor, bytes
    for attempt in range(8):
        power = min(max(last[0] + (last[1] - wanted) / slope, FINEST), COARSEST) if config.target_bytes else 0.0
        data = pack_artifact(config, quantize(config, weights, guides, 2 ** power), info)
        log(f"quantize steps:x{2 ** power:.4f} predicted_bytes:{last[1] - slope * (power - last[0]):.0f} "
            f"artifact_bytes:{len(data)} target_bytes:{target}")
        if not config.target_bytes: return data
        best = max(best, data if len(data) <= target else b"", key=len)
        if (best and (power == FINEST or len(best) > 0.999 * target)) or (attempt and power == last[0]): break
        # as measured: coarse steps save less
        if attempt: slope = min(max((last[1] - len(data)) / (power - last[0]), count / 400), count / 8)
        last = power, len(data)
    require(best, f"TARGET_BYTES={config.target_bytes}: steps {2 ** last[0]:.3g} times those of MATRIX_BITS leave "
            f"{len(data)} bytes, and the code has {code_bytes}; raise it or take a smaller model")
    return best


def unpack_artifact(data: bytes, where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The artifact's bytes -> (header, {name: float32 weights}). UserError for what pack_artifact did not write."""
    (*magic, version), file = ARTIFACT_MAGIC, io.BytesIO(data[:-32])
    require(file.read(len(magic)) == bytes(magic), f"{where}: no artifact of this program")
    require((found := file.read(1)) == bytes([version]), f"{where}: artifact version {found.hex()}, here is {version}")
    require(hashlib.sha256(data[:-32]).digest() == data[-32:], f"{where}: truncated or altered (sha256); copy it again")
    header = json.loads(zlib.decompress(file.read(int.from_bytes(file.read(4), "little"))))
    streams = [file.read(length) for length in header["streams"]]
    side = io.BytesIO(CODECS[SIDE_CODECS[header["codec"]]].decode(streams.pop()))
    with ThreadPoolExecutor() as pool: groups = [*map(io.BytesIO, pool.map(CODECS[header["codec"]].decode, streams))]
    weights, shapes = {}, param_shapes(artifact_config(header))
    for name, quantizer, specs in header["tensors"]:
        arrays = {}
        for key, shape in specs.items():
            if key == "codes":
                order, sizes = by_class(np.frombuffer(side.read(shape[0]), np.uint8), arrays["columns"])
                codes = np.empty(len(order), np.int8)
                codes[order] = np.frombuffer(b"".join(map(io.BytesIO.read, groups, sizes.tolist())), np.int8)
                arrays[key] = codes.reshape(shape)
            else:
                size = math.prod(shape) * (dtype := np.dtype(np.int8 if key == "columns" else "<f2")).itemsize
                planes = np.frombuffer(side.read(size), np.uint8).reshape(dtype.itemsize, -1)
                arrays[key] = planes.T.copy().view(dtype).reshape(shape)
        name = name.partition(":")[0]
        weights.setdefault(name, []).append(QUANTIZERS[quantizer].decode(arrays, (-1, *shapes[name][1:])))
    return header, {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in weights.items()}


def artifact_config(header: Mapping[str, Any], config: Config | None = None) -> Config:
    """`config` with the model of an artifact."""
    return replace(config or Config(eval_mode="packed"), **header["model"])


def read_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Artifact file -> (header, {name: float32 weights})."""
    with naming_path(path, "ARTIFACT_PATH"), refusing((LookupError, TypeError), f"{path}: another program's ({{}})"):
        return unpack_artifact(path.read_bytes(), str(path))


# ====================================================================================================================
# 11. evaluate: validation tokens -> windows (pure) -> nats, tokens, bytes -> bits per byte. Each target counts once.
# ====================================================================================================================


@dataclass
class Score:
    """Sums over scored targets. bits per byte = nats / ln 2 / bytes: the one definition."""

    nats: float
    tokens: int
    bytes: int
    seconds: float

    val_loss = property(lambda self: self.nats / self.tokens)  # nats per token
    val_bpb = property(lambda self: self.nats / math.log(2) / max(self.bytes, 1))  # bits per byte of text


def windows(length: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows over `length` tokens -> (start, end, first scored): the scored ranges cover every token exactly once.

    The first window scores all it sees, each later one the tokens that the one before did not see, with at least
    seq_len - stride tokens of context. stride = seq_len packs without overlap.
    """
    context = seq_len - stride
    return [(s, min(s + seq_len, length), s + context if s else 0) for s in range(0, max(length - context, 1), stride)]


def score_windows(ids: np.ndarray, seq_len: int, stride: int, document_mask: bool) -> np.ndarray:
    """Windows over ids (n,), within documents if document_mask -> (W, 3) start, end, first scored; cover all once."""
    bounds = document_bounds(ids).tolist() if document_mask else [0, len(ids)]
    return np.concatenate([np.array(windows(b - a, seq_len, stride)) + a for a, b in zip(bounds, bounds[1:])])


def batch_windows(rows: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Consecutive windows (W, 3) -> groups of at most `tokens` tokens."""
    groups, first, before = [], 0, np.cumsum([0, *(rows[:, 1] - rows[:, 0])])
    while first < len(rows):
        groups.append(rows[first:max(int(np.searchsorted(before, before[first] + tokens, "right")) - 1, first + 1)])
        first += len(groups[-1])
    return groups


# --- n-gram smoothing: the model's probabilities are the prior of counts of what followed the same tokens before
NGRAM_ORDERS = (4, 5, 6, 8, 12, 16)


def grouped(key: Tensor) -> tuple[Tensor, Tensor]:
    """key (m,) int -> order that sorts it and keeps equal ones in theirs; whether each there equals the one before."""
    key, order = key.sort(stable=True)
    return order, key.diff(prepend=~key[:1]) == 0


def group_starts(again: Tensor, place: Tensor) -> Tensor:
    """again (m,): whether a row is of the group of the row before; place (m or more,) 0, 1, .. -> its group's start."""
    return (place[:len(again)] * ~again).cummax(0).values


def ngram_counts(tokens: Tensor, orders: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """tokens (n,) int64 -> for each order, rising: the order, places (m,) in the text, and three counts (m,) for each.

    Of the tokens before a place, the last order - 1 are its context. seen: how often that occurred before, with a token
    behind it; hits: how often that was the one at this place; kinds: how many different ones there were. Places with a
    context that occurs once in the text are left out. All are int32; places stand by context, then as in the text.

    Contexts are compared token by token. Rows, one a place, stand in groups of a context. Those of a group with the
    same token are, a place on, the group of a context of a token more: each length takes one sort, in blocks that fit
    a cache. A block is whole groups; all but its first start in its last 2^16 rows, so 16 bits tell them apart.
    """
    text, length, block = tokens.short(), min(orders[0] - 1, 3) - 1, 1 << 16
    place = torch.arange(len(text), dtype=torch.int32, device=text.device)
    by, again = grouped(sum((text[i:i - length].int() << 16 * i for i in range(length)), 0 * place[length:]))
    at, start = place[length:].index_select(0, by), group_starts(again, place)
    for order in range(length + 1, orders[-1] + 1):
        (hits, kinds), longer, size = at.new_empty(2, len(at)), at.new_empty(2, len(at)), 0
        ends = [*start[::block].unique_consecutive().tolist(), len(at)]
        for a, b in zip(ends, ends[1:]):
            by, again = grouped((start[a:b].clamp(min=b - block) << 16) + text.index_select(0, at[a:b]))
            if order in orders:
                hits[a:b].scatter_(0, by, place[:b - a] - group_starts(again, place))
                found = (hits[a:b] == 0).cumsum(0, dtype=torch.int32)
                kinds[a:b] = found - found.index_select(0, start[a:b] - a) + (hits[a:b] > 0)
            rows = at[a:b].index_select(0, by) + 1
            again &= rows < len(text)
            kept = again | again.roll(-1)
            rows, again = rows.masked_select(kept), again.masked_select(kept)
            longer[:, size:size + len(rows)] = torch.stack((rows, group_starts(again, place) + size))
            size += len(rows)
        if order in orders: yield order, at, place[:len(at)] - start, hits, kinds
        at, start = longer[:, :size]


def smoothed(nats: Tensor, order: int, seen: Tensor, hits: Tensor, kinds: Tensor) -> Tensor:
    """Nats (m,) float64 under p and three counts (m,), see ngram_counts -> nats under (hits + a p) / (seen + a).

    a = 8000 / order^3 x kinds^1.5: Witten and Bell's smoothing (IEEE Trans. Inf. Theory 37, 1991) with a power, and
    with the model where they have shorter contexts. `hits` of all tokens sum to `seen`: p' sums to 1 where p does.
    """
    prior = 8000 / order ** 3 * kinds.double() ** 1.5
    return torch.where(seen > 0, (seen + prior).log() - torch.logaddexp(hits.double().log(), prior.log() - nats), nats)


class Ledger:
    """Nats of every target, and how often each was scored: the one place where scores of a stage are kept."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.start = dataset, time.perf_counter()
        self.nats, self.times = np.zeros(len(dataset.val_bytes)), np.zeros(len(dataset.val_bytes), np.uint8)

    def add(self, place: np.ndarray, nats: np.ndarray) -> None:
        """place, nats: any equal shape; targets that are -1 are nobody's."""
        scored = place >= 0
        np.add.at(self.times, place[scored], 1)
        self.nats[place[scored]] = nats[scored]

    def smooth(self, order: int, device: torch.device) -> None:
        """Changes all nats to those with n-gram smoothing of all NGRAM_ORDERS up to this one."""
        tokens, nats = (torch.from_numpy(x).to(device) for x in (self.dataset.val_tokens.astype(np.int64), self.nats))
        for order, at, *counts in ngram_counts(tokens, [x for x in NGRAM_ORDERS if x <= order]):
            nats[at - 1] = smoothed(nats[at - 1], order, *counts)
        self.nats = np.where(self.times > 0, nats.cpu().numpy(), 0.0)

    def score(self, world: World) -> Score:
        """The sum over all ranks. AssertionError where a target was scored twice or never."""
        parts, times = world.gather(np.packbits(self.times != 0)), self.times - (self.times != 0)
        for part in parts: times += np.unpackbits(part, count=len(times))
        assert (times == 1).all(), f"{np.count_nonzero(times != 1)} of {len(times)} targets not scored exactly once"
        (nats,), count_bytes = world.sum([self.nats.sum()]), int(self.dataset.val_bytes.sum())
        return Score(nats, len(times), count_bytes, time.perf_counter() - self.start)


class Evaluator:
    """Scores the validation tokens with any weights; every rank takes its share of the windows."""

    def __init__(self, config: Config, world: World, log: Log, dataset: Dataset, compiled: bool):
        self.config, self.world, self.log, self.dataset, self.compiled = config, world, log, dataset, compiled
        self.stages: dict[str, Score] = {}
        # halved where memory runs out; on CPUs logits of 16 MB stay in reused memory, larger ones cost page faults
        wanted = config.val_batch_tokens // world.size if world.device.type == "cuda" else 2 ** 22 // config.vocab_size
        self.batch_tokens = max(min(wanted, config.val_batch_tokens // world.size), config.eval_seq_len)

    def build(self, rows: np.ndarray, tokens: int = 0, num_segments: int = 0) -> tuple[Batch, Any]:
        """Windows (W, 3) -> a batch of them in a row, and each token's place in the text, -1 = not scored."""
        lengths = rows[:, 1] - rows[:, 0]
        starts = np.cumsum(lengths) - lengths
        place = np.arange(lengths.sum()) - np.repeat(starts - rows[:, 0], lengths)
        window, targets = self.dataset.val_tokens[place], self.dataset.val_tokens[place + 1]
        place = np.where(place >= np.repeat(rows[:, 2], lengths), place, -1)
        if self.compiled and (rest := tokens - len(place)):  # one shape: fill up with segments that nobody scores
            starts = np.concatenate((starts, np.arange(len(place), tokens, self.config.eval_seq_len)))
            window, targets = np.pad(window, (0, rest)), np.pad(targets, (0, rest))
            place = np.pad(place, (0, rest), constant_values=-1)
        segments = make_segments(starts, len(window), self.config.eval_seq_len, num_segments)
        return make_batch(window, targets, segments), place

    def keep(self, stage: str, score: Score) -> None:
        """Keeps and logs the score of one stage of the pipeline. UserError where it is no number."""
        self.stages[stage] = score
        require(math.isfinite(score.nats), f"final_{stage}: {score.nats} nats: {DIVERGED}")
        self.log(f"final_{stage}_exact val_loss:{score.val_loss:.8f} val_bpb:{score.val_bpb:.8f} "
                 f"eval_time:{score.seconds * 1000:.0f}ms")

    def score(self, forward: Forward, stride: int) -> Score:
        """forward = a GPT or its compiled form -> Score of all targets, summed in float64 over all ranks."""
        return self.score_all(forward, stride).score(self.world)

    def score_all(self, forward: Forward, stride: int) -> Ledger:
        """The same -> this rank's share of the scores."""
        config, ledger = self.config, Ledger(self.dataset)
        rows = score_windows(self.dataset.val_tokens[:-1], config.eval_seq_len, stride, config.document_mask)
        self.score_rows(forward, rows[self.world.rank::self.world.size], ledger)
        return ledger

    @torch.no_grad()
    def score_rows(self, forward: Forward, mine: np.ndarray, ledger: Ledger) -> None:
        """Scores windows (W, 3) into the ledger, as many at once as the memory holds."""
        while len(mine):
            groups, fillers = batch_windows(mine, self.batch_tokens), self.batch_tokens // self.config.eval_seq_len + 2
            bound = -(-(max(map(len, groups)) + fillers) // 64) * 64 if self.compiled else 0
            try:
                for group in groups:
                    batch, place = self.build(group, self.batch_tokens, bound)
                    ledger.add(place, forward(*to_device(batch, self.world.device)).cpu().double().numpy())
                    mine = mine[len(group):]
                    self.log.progress(f"evaluate windows_left:{len(mine)}")
            except torch.OutOfMemoryError:
                if self.batch_tokens <= self.config.eval_seq_len: raise
                self.batch_tokens = max(self.batch_tokens // 2, self.config.eval_seq_len)
                print(f"rank {self.world.rank}: out of memory, now scores {self.batch_tokens} tokens", flush=True)
                gc.collect()
        self.log.progress("")


# ====================================================================================================================
# 12. test-time training: the text in chunks; each is scored, and only then adapters, or all weights, learn from it.
#     In: a model made of the artifact alone, the validation text. Out: the score. Adapters learn from what score
#     returned, with its graph: nothing is run twice, and nothing can be learned from a token that has no score yet.
# ====================================================================================================================


def plan_groups(config: Config, lengths: np.ndarray, documents: Sequence[int], world: World) -> list[list[int]]:
    """Lengths of all documents, those to score -> this rank's groups of documents to score side by side.

    Documents that carry nothing over may be scored in any order without changing a score: the longest come first, in
    smaller groups, so that ranks share them.
    """
    in_a_row, groups = config.ttt_warm_start_a and config.ttt_order == "stream", []
    order = list(documents) if in_a_row else sorted(documents, key=lambda i: (-int(lengths[i]), i))
    while order:
        is_long = not in_a_row and lengths[order[0]] > 2 * config.eval_seq_len
        size = config.small_group if is_long else config.ttt_batch_size
        groups, order = [*groups, order[:size]], order[size:]
    return groups[world.rank::world.size]


def chunk_size(config: Config, longest: int) -> int:
    """Tokens of a chunk in a group whose longest document has so many; no more than a row holds (PR #2014)."""
    fitting = [int(chunk) for chunk, most in parse_schedule(config.ttt_chunk_schedule) if longest <= most]
    return min([*fitting, config.ttt_chunk_size][0], config.eval_seq_len)


def plan_chunks(longest: int, size: int, row: int) -> list[tuple[int, int, bool]]:
    """Chunks of a document -> (first token, its place in the row, whether it is scored there) of each.

    The context of a chunk is a row of so many tokens. A full one gives way to another that begins half a row back, with
    chunks that were scored before.
    """
    place, chunks = 0, []
    for start in range(0, longest, size):
        if place + size > row:
            place = row // 2 // size * size
            chunks += [(start - place + i, i, False) for i in range(0, place, size)]
        chunks.append((start, place, True))
        place += size
    return chunks


class Slots:
    """Documents side by side: the keys and values that they had, adapters, and the adapters' optimizer.

    A chunk passes through the model with the TTT_BACK_TOKENS before it. What lies further back is attended to as it was
    then: its keys and values come from the adapters of that time, and no gradient reaches them. Shapes never change, so
    that on a GPU both halves of a step are CUDA graphs.
    """

    def __init__(self, config: Config, model: GPT, count: int, size: int):
        """`count` documents, chunks of `size` tokens."""
        self.config, self.model, self.count, self.size, row = config, model, count, size, config.eval_seq_len
        self.tokens, device = min(size + config.ttt_back_tokens, row), model.embedding.device  # of a pass
        visits, width, kv = len(model.plans[model.looping]), config.model_dim, (config.num_kv_heads, config.head_dim)
        self.memory = torch.zeros(2, visits, count, row, *kv, dtype=model.dtype, device=device)  # keys, values
        generator, self.first, self.recorded = torch.Generator().manual_seed(config.seed), dict[str, Tensor](), ()
        for target in config.ttt_targets.split(","):
            layers, inputs, outputs = visits, width, math.prod(kv) if target in "kv" else width
            if target == "head": layers, inputs, outputs = 1, config.embed_dim or width, config.vocab_size
            inner = torch.empty(layers, config.ttt_lora_rank, inputs)  # drawn on the CPU: the same on all devices
            inner = inner.uniform_(-(inputs ** -0.5), inputs ** -0.5, generator=generator).to(device)
            outer = inner.new_zeros(layers, outputs, config.ttt_lora_rank)
            self.first |= {f"{target}_document_in": inner, f"{target}_document_out": outer}
        self.adapters = self.leaves = {name: x.repeat(count, 1, 1, 1) for name, x in self.first.items()}
        self.optimizer = adaptation_optimizer(config, self.adapters.values(), config.ttt_lora_lr, config.ttt_optimizer)

    def start(self) -> None:
        """New documents: all as at the beginning, but for inner matrices under TTT_WARM_START_A."""
        for name, value in self.adapters.items():
            if not (self.config.ttt_warm_start_a and name.endswith("in")): value[:] = self.first[name]
        for kept in (self.memory, *(x for state in self.optimizer.state.values() for x in state.values())): kept.zero_()

    def score(self, table: Tensor) -> Tensor:
        """table (count, ...): ids of a pass, with two more before them for SmearGate and BigramHash; targets of the
        chunk; its place in its row; whether it learns -> nats (count x size,) with the graph."""
        if self.recorded:
            self.recorded[2].copy_(table)
            self.recorded[0].replay()
            return self.recorded[3]
        ids, targets, place, _ = table.split([self.tokens + 2, self.size, 1, 1], 1)
        config, count, tokens, row = self.config, self.count, self.tokens, self.config.eval_seq_len
        slot, column = (torch.arange(n, device=table.device) for n in (count, row + 2))
        slot, start = slot[:, None], (place + self.size - tokens).clamp(0)
        own = column[:tokens] < (column[:tokens + 2, None] - 1).clamp(1)  # a query sees up to its own key
        seen = torch.cat([x.expand(count, tokens + 2, -1) for x in ((column[:row] < start)[:, None], own)], -1)
        mask = torch.where(seen, 0.0, -math.inf).to(self.memory).repeat(1, config.num_heads // config.num_kv_heads, 1)
        rows, visits = (slot * row + start + column[:tokens]).flatten(), iter(self.memory.unbind(1))

        def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:  # queries that share keys lie in a row
            whole, kept = [], next(visits)
            for memory, x in zip(kept, (k, v)):
                x = x.unflatten(0, (count, -1))[:, 2:]
                whole.append(torch.cat((memory, x), 1).transpose(1, 2))
                memory.flatten(0, 1).index_copy_(0, rows, x.detach().flatten(0, 1))
            q = q.unflatten(0, (count, -1)).unflatten(2, (kept.size(3), -1)).permute(0, 2, 3, 1, 4)
            y = F.scaled_dot_product_attention(q.flatten(2, 3), *whole, attn_mask=mask[:, None]).view(q.shape)
            return y.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
        self.leaves = {name: x.detach().requires_grad_() for name, x in self.adapters.items()}
        self.model.attention, usual = attention, self.model.attention
        positions = (start - 2 + column[:tokens + 2]).clamp(0).flatten()
        nats = self.model(ids.reshape(1, -1), targets.reshape(1, -1), Segments(place, positions, row), self.leaves,
                          (slot * (tokens + 2) + place - start + 2 + column[:self.size]).flatten())
        self.model.attention = usual
        return nats

    def adapt(self, nats: Tensor, table: Tensor) -> None:
        """One step of the optimizer on the mean nats of the chunks that learn. A document whose nats or gradients are
        no numbers rests."""
        if self.recorded: return self.recorded[1].replay()
        loss = (nats.nan_to_num(0, 0, 0).view(self.count, -1) * table[:, -1:]).sum() / self.size
        grads = torch.autograd.grad(loss, [*self.leaves.values()])
        for value, grad in zip(self.adapters.values(), grads): value.grad = grad.nan_to_num_(0, 0, 0)
        self.optimizer.step()
        if not (self.config.cuda_graphs and table.is_cuda) or torch.cuda.is_current_stream_capturing(): return
        first, second, table = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), table.clone()
        with torch.cuda.graph(first, capture_error_mode="thread_local"): nats = self.score(table)
        with torch.cuda.graph(second, first.pool(), capture_error_mode="thread_local"): self.adapt(nats, table)
        self.recorded = first, second, table, nats


def adaptation_optimizer(config: Config, params: Any, lr: float, kind: str) -> torch.optim.Optimizer:
    """SGD or AdamW of adapters, or of all weights."""
    if kind == "sgd": return torch.optim.SGD(params, lr, momentum=config.global_ttt_momentum)
    return torch.optim.AdamW(params, lr, (config.ttt_beta1, config.ttt_beta2), 1e-10, config.ttt_weight_decay,
                             fused=True, capturable=torch.cuda.is_available())


class TestTimeTrainer:
    """Scores the validation text with weights that learn from what was scored."""

    def __init__(self, config: Config, evaluator: Evaluator, model: GPT, started: float):
        self.config, self.world, self.evaluator, self.model = config, evaluator.world, evaluator, model
        self.dataset, self.ledger = evaluator.dataset, Ledger(evaluator.dataset)
        self.deadline, self.bounds = started + config.eval_budget_seconds, document_bounds(self.dataset.val_tokens[:-1])
        self.lengths, self.unscored = np.diff(self.bounds), int(self.bounds[-1])
        # what scoring a target takes, if nothing learns
        self.plain_seconds = known.seconds / known.tokens if (known := evaluator.stages.get("quantized")) else 0.0
        self.done_work, self.done_seconds, self.step_seconds = 0, 0.0, 0.0
        self.scored_chunks, self.learned_chunks, self.skipped = 0, 0, 0
        self.slots_for = functools.cache(functools.partial(Slots, config, model))  # of two sizes, usually
        model.requires_grad_(False).fused = True

    def run(self) -> Ledger:
        """Scores all targets, in parts of the documents; behind each part all weights learn, if they are to."""
        config, streams = self.config, self.config.ttt_strategy == "stream"
        order = np.argsort(-self.lengths * (config.ttt_order == "length"), kind="stable")
        optimizer = self.weight_optimizer()
        for epoch in range(config.ttt_unsafe_multi_epoch):  # not legal: learns from what has no score yet
            self.learn_from(order, optimizer, epoch / config.ttt_unsafe_multi_epoch, 1 / config.ttt_unsafe_multi_epoch)
        for i, part in enumerate(parts := self.parts(order)):
            (self.score_windows if streams else self.score_documents)(part)
            self.unscored -= int(self.lengths[part].sum())
            share, seconds = 1 - self.unscored / self.bounds[-1], time.perf_counter() - self.ledger.start
            (self.evaluator.log.progress if streams else self.evaluator.log)(
                f"adapted share:{share:.3f} seconds:{seconds:.0f} projected_seconds:{seconds / share:.0f}")
            if i + 1 < len(parts) and not config.ttt_unsafe_multi_epoch:
                if streams: self.learn_from(part, optimizer, i / (len(parts) - 1), 0.0)
                else: self.learn_from(np.concatenate(parts[:i + 1]), self.weight_optimizer(), 0.0, 1.0)
        self.evaluator.log(f"adaptation scored_chunks:{self.scored_chunks} learned_chunks:{self.learned_chunks} "
                           f"skipped:{self.skipped} legal:{int(not config.ttt_unsafe_multi_epoch)}")
        return self.ledger

    def parts(self, order: np.ndarray) -> list[np.ndarray]:
        """Documents in the order of their scores -> those between two times that all weights learn."""
        config, count = self.config, len(order)
        if config.ttt_strategy == "stream":
            before = np.cumsum(self.lengths[order]) - self.lengths[order]
            ends = np.flatnonzero(np.diff(before // (config.global_ttt_chunk_tokens or 1))) + 1
        else:
            prefix, phases = min(config.phased_ttt_prefix_docs, count), config.phased_ttt_num_phases
            ends = sorted({prefix * (phase + 1) // phases for phase in range(phases)} - {0, count})
        return np.split(order, ends)

    def in_time(self, seconds: float) -> bool:
        """Whether there is time for something that takes so long, and for scoring what is left without adaptation."""
        late = time.perf_counter() + seconds + self.plain_seconds * self.unscored > self.deadline
        self.skipped += late
        return not late

    # --- adapters of documents
    def score_documents(self, documents: np.ndarray) -> None:
        """Scores documents, each with adapters of its own that learn from chunk to chunk."""
        for i, group in enumerate(groups := plan_groups(self.config, self.lengths, documents.tolist(), self.world)):
            self.score_group(group)
            self.evaluator.log.progress(f"adapted groups:{i + 1}/{len(groups)}")

    def score_group(self, group: Sequence[int]) -> None:
        """score, then adapt, chunk by chunk, as long as there is time; what is left is scored without adapters."""
        size, few = chunk_size(self.config, longest := int(self.lengths[group].max())), self.config.small_group
        slots = self.slots_for(few if len(group) <= few else self.config.ttt_batch_size, size)
        slots.start()
        for start, place, scores in plan_chunks(longest, size, self.config.eval_seq_len):
            begin = time.perf_counter()
            if not self.in_time(self.step_seconds): break
            table, places = self.tabulate(slots, group, start, place, scores)
            scored = slots.score(table)
            self.ledger.add(places, scored.detach().cpu().double().numpy())
            self.scored_chunks += scores
            self.learned_chunks += (learns := bool(table[:, -1].any()))
            assert self.learned_chunks <= self.scored_chunks
            if learns: slots.adapt(scored, table)
            self.step_seconds = time.perf_counter() - begin
        places = np.concatenate([np.arange(self.bounds[i], self.bounds[i + 1]) for i in group])
        lost = places[(self.ledger.times[places] == 0) | ~np.isfinite(self.ledger.nats[places])]
        if len(lost):  # time was over, or adapters broke
            self.evaluator.score_rows(self.model, self.windows_of(group), plain := Ledger(self.dataset))
            self.ledger.nats[lost], self.ledger.times[lost] = plain.nats[lost], 1
            self.evaluator.log(f"adaptation: {len(lost)} targets were scored without adapters")

    def tabulate(self, slots: Slots, group: Sequence[int], start: int, place: int, scores: bool) -> tuple[Tensor, Any]:
        """A chunk of each document -> the table of Slots.score; its targets' places in the text, -1 = nobody's."""
        last, known = len(self.dataset.val_tokens) - 1, (np.arange(slots.count) < len(group))[:, None] & scores
        begin, end = (np.resize(x[group], (slots.count, 1)) for x in (self.bounds[:-1] + start, self.bounds[1:]))
        at, passing = begin + np.arange(slots.size), begin - min(slots.tokens - slots.size, place)
        ids, targets = (self.dataset.val_tokens[np.clip(x, 0, last)].astype(np.int64)
                        for x in (passing + np.arange(-2, slots.tokens), at + 1))
        mine, learns = known & (at < end), known & (begin + slots.size < end)
        table = np.concatenate((ids, np.where(mine, targets, -1), np.full_like(begin, place), learns), 1)
        return torch.from_numpy(table).to(self.world.device), np.where(mine, at, -1).ravel()

    # --- all weights
    def windows_of(self, documents: Sequence[int] | np.ndarray, stride: int = 0) -> np.ndarray:
        """-> (W, 3) windows over the documents' targets, see windows; without a stride they do not overlap."""
        n = self.config.eval_seq_len
        return np.concatenate([self.bounds[i] + windows(int(self.lengths[i]), n, stride or n) for i in documents])

    def score_windows(self, documents: np.ndarray) -> None:
        """Scores documents with the weights as they are."""
        start, rows = time.perf_counter(), self.windows_of(documents, self.config.eval_stride)
        self.evaluator.score_rows(self.model, rows[self.world.rank::self.world.size], self.ledger)
        self.done_work += int(self.lengths[documents].sum())
        self.done_seconds += time.perf_counter() - start
        self.scored_chunks, self.plain_seconds = self.scored_chunks + 1, self.done_seconds / self.done_work

    def learn_from(self, documents: np.ndarray, optimizer: torch.optim.Optimizer, progress: float, span: float) -> None:
        """Trains all weights on documents; the learning rate follows a cosine from `progress` over `span`."""
        start, tokens = time.perf_counter(), self.config.global_ttt_chunk_tokens or 32768
        assert self.config.ttt_unsafe_multi_epoch or self.lengths[documents].sum() <= self.bounds[-1] - self.unscored
        for i, rows in enumerate(chunks := batch_windows(self.windows_of(documents), tokens)):
            if not self.world.gather(self.in_time((time.perf_counter() - start) / max(i, 1)))[0]: break
            for _ in range(self.config.global_ttt_epochs):
                self.learn(rows, optimizer, 0.5 + 0.5 * math.cos(math.pi * (progress + span * i / len(chunks))))

    def learn(self, rows: np.ndarray, optimizer: torch.optim.Optimizer, lr_scale: float) -> None:
        """One step of all weights on the targets of windows (W, 3), shared out over ranks."""
        config, params, total = self.config, dict(self.model.named_parameters()), int((rows[:, 1] - rows[:, 0]).sum())
        grads = {name: torch.zeros_like(p) for name, p in params.items()}
        frozen = {name: p.detach()[:max(config.ttt_freeze_blocks + len(p) - config.num_layers, 0)].clone()
                  for name, p in params.items() if name not in GLOBAL_ROLES | SKIP_ROLES and "adapter" not in name}
        for name, p in params.items(): p.requires_grad_(True).grad = grads[name]
        for group in batch_windows(rows[self.world.rank::self.world.size], self.evaluator.batch_tokens):
            (self.model(*to_device(self.evaluator.build(group)[0], self.world.device)).sum() / total).backward()
        for grad in grads.values() if self.world.size > 1 else (): dist.all_reduce(grad)
        for name, kept in frozen.items(): grads[name][:len(kept)] = 0
        if config.global_ttt_grad_clip: torch.nn.utils.clip_grad_norm_(params.values(), config.global_ttt_grad_clip)
        for settings in optimizer.param_groups: settings["lr"] = settings["base_lr"] * lr_scale
        self.skipped += not (sound := all(bool(grad.isfinite().all()) for grad in grads.values()))
        if sound: optimizer.step()  # else the weights stay as they were
        self.learned_chunks += sound and config.ttt_strategy == "stream"  # elsewhere these are chunks of adapters
        self.model.requires_grad_(False)
        for name, kept in frozen.items(): params[name][:len(kept)] = kept  # adamw lets weights decay

    def weight_optimizer(self) -> torch.optim.Optimizer:
        """Of all weights: sgd in phases. adamw has the factors of PR #532: output projections 3, up projections 0.5."""
        config, params = self.config, self.model.named_parameters()
        kind = config.ttt_optimizer if config.ttt_strategy == "stream" else "sgd"
        factors = {"out_proj": 3.0, "down_proj": 3.0, "up_proj": 0.5} if kind == "adamw" else {}
        groups = [{"params": [p], "base_lr": config.global_ttt_lr * factors.get(name, 1.0)} for name, p in params]
        return adaptation_optimizer(config, groups, config.global_ttt_lr, kind)


def score_model(config: Config, evaluator: Evaluator, model: GPT, started: float) -> Ledger:
    """Scores all targets as EVAL_MODE and NGRAM_ORDER say; `started` on the evaluation's clock."""
    ledger = TestTimeTrainer(config, evaluator, model, started).run() if config.eval_mode == "adapted" else \
        evaluator.score_all(model, config.eval_stride if config.eval_mode == "sliding" else config.eval_seq_len)
    if config.ngram_order:
        evaluator.keep(config.eval_mode, ledger.score(evaluator.world))
        ledger.smooth(config.ngram_order, evaluator.world.device)
    return ledger


def audit(config: Config, evaluator: Evaluator, make: Callable[[], GPT]) -> dict[str, Any]:
    """Scores the beginning of the text twice, and once with another token at a random place -> what that tells.

    No target before the changed token may have another score, beyond what two equal runs differ by, nor, in a few first
    rows, may any token that could stand there. `make` gives a model as the artifact has it. Also: how far a sum of
    probabilities over the vocabulary is from 1.
    """
    dataset, world, tokens = evaluator.dataset, evaluator.world, np.array(evaluator.dataset.val_tokens[:4096])
    brief = replace(config, global_ttt_chunk_tokens=min(config.global_ttt_chunk_tokens, 1024))  # several steps of it
    inside, random = np.flatnonzero(tokens[2:] != BOS) + 2, np.random.default_rng(config.seed)
    place, changed = int(random.choice(inside)) if len(inside) else len(tokens), tokens.copy()
    changed[place:place + 1] = max((int(tokens[place % len(tokens)]) + 1) % config.vocab_size, BOS + 1)

    def nats_of(text: np.ndarray) -> np.ndarray:
        sample = replace(dataset, val_tokens=text, val_bytes=dataset.val_bytes[:len(text) - 1])
        quiet = Evaluator(config, world, Log(replace(world, rank=-1), config), sample, False)
        return np.array(world.sum(score_model(brief, quiet, make(), math.inf).nats.tolist()))
    first, again, other = nats_of(tokens), nats_of(tokens), nats_of(changed)
    bounds, target = document_bounds(tokens[:-1]), np.arange(len(first))  # target i is token i + 1
    # where the order is another, other documents may have been scored behind it
    since = bounds[np.searchsorted(bounds, place - 1, "right") - 1] if config.ttt_order == "length" else 0
    earlier = (target >= since) & (target < place - 1)
    size, model = min(8, len(first), config.eval_seq_len), make()
    every, segments = np.arange(config.vocab_size), make_segments(np.array([0, size]), 2 * size, size, 0)
    batches = (make_batch(np.concatenate((tokens[:size - 1], [last], tokens[:size])), np.tile(every, (2 * size, 1)),
                          segments) for last in (BOS, 0))
    nats = np.array([model(*to_device(batch, world.device)).tolist() for batch in batches])
    noise, change, ahead, behind = (float(np.abs(x).max(initial=0)) for x in (again - first, (
        other - first)[earlier], np.delete(nats[1] - nats[0], size - 1, 0), (other - first)[~earlier]))
    prior = torch.from_numpy(nats[0][-1])  # what follows the sample, for every token that could stand there
    for order in [x for x in NGRAM_ORDERS if x <= min(config.ngram_order, len(tokens))]:
        rows = np.lib.stride_tricks.sliding_window_view(tokens, order)
        hits = torch.from_numpy(np.bincount(rows[(rows[:, :-1] == rows[-1, :-1]).all(1), -1], minlength=len(every)))
        prior = smoothed(prior, order, hits.sum(), hits, (hits > 0).sum())
    return {"sample_tokens": len(tokens), "changed_token": place, "noise_nats": noise, "change_before_nats":
            max(change, ahead), "change_behind_nats": behind, "causal": max(change, ahead) <= noise,
            "probability_error": float(np.abs(np.append(np.exp(-nats).sum(-1), (-prior).exp().sum()) - 1).max())}


# ====================================================================================================================
# 13. main: the pipeline.
# ====================================================================================================================


def write_run_header(log: Log, config: Config, world: World, source: bytes) -> int:
    """Source, versions, device and settings at the start of the log file; a summary of them on the terminal.

    -> the bytes of code to count: of this file if tools/pack.py made it, else some that the packed file stays below.
    """
    code_bytes = len(source if (packed := source.startswith(b"#coding:latin1\n")) else lzma.compress(source))
    log(source.decode("latin1" if packed else "utf8"), to_terminal=False)
    log("\n".join(["=" * 100, *(f"{f.name}:{getattr(config, f.name)}" for f in fields(config))]), to_terminal=False)
    log(f"train_gpt:{VERSION} python:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__} "
        f"source_sha256:{hashlib.sha256(source).hexdigest()[:16]}")
    log(f"run_id:{config.run_id} device:{world.describe()} world_size:{world.size} dtype:{str(world.dtype)[6:]}")
    log(f"code_bytes:{code_bytes} {'packed' if packed else 'upper bound: run what tools/pack.py makes of this file'}")
    return code_bytes


def check_disk(config: Config, trainer: Trainer, artifact_path: Path) -> None:
    """Tries out, before anything costs time, whether checkpoints and the artifact can be written. UserError if not."""
    needed = 8 * 4 * trainer.num_params + predicted_bytes(config)  # weights, averages, moments, in two checkpoints
    for path, variable in ((trainer.checkpoint_path, "LOG_DIR"), (artifact_path, "ARTIFACT_PATH")):
        write_atomic(probe := path.with_name(f".{path.name}.probe"), lambda file: file.write(b"probe"), variable)
        probe.unlink()
        require((free := shutil.disk_usage(path.parent).free) >= needed and not path.is_dir(), f"{variable}: {path} is "
                f"a folder, or its disk is full ({free:,} bytes free, {needed:,} needed); free some or set {variable}")


def preflight(config: Config, log: Log, trainer: Trainer, code_bytes: int) -> int:
    """Measures a step of every stage; predicts steps, seconds, memory and bytes -> exit code."""
    seconds, shares = trainer.warmup(max(config.warmup_steps, 2)), stages(config)
    for stage, taken in seconds.items():
        log(f"preflight step_seconds:{taken:.4f} share:{shares[stage]:.3f} "
            + " ".join(f"{k}:{v:g}" for k, v in stage._asdict().items()))
    budget, predicted = training_budget_seconds(config), predicted_bytes(config)
    steps = int(min(config.iterations, budget * sum(share / seconds[stage] for stage, share in shares.items())))
    projected = min(budget, config.iterations * sum(share * seconds[stage] for stage, share in shares.items()))
    log(f"preflight projected_steps:{steps} projected_train_seconds:{projected:.0f} "
        f"peak_memory:{trainer.world.peak_memory_bytes() // 2**20}MiB")
    log(f"preflight predicted_artifact_bytes:{predicted} code_bytes:{code_bytes} predicted_submission_bytes:"
        f"{predicted + code_bytes} limit_bytes:{SIZE_LIMIT_BYTES}\npreflight ok")
    return 0


def run(config: Config, notes: list[str], world: World, log: Log, stop: StopRequest) -> int:
    """Config -> trained weights -> artifact on disk -> model rebuilt from those bytes -> score -> exit code."""
    code_bytes = write_run_header(log, config, world, source := Path(__file__).read_bytes())
    attention_name, attention = choose_attention(config.attention, world.device)
    compiled = use_compile(config, world, attention_name)
    artifact_path = Path(config.eval_only or config.artifact_path or Path(config.log_dir) / f"{config.run_id}.artifact")
    if config.eval_only: config = reload(config, world, artifact_path, attention)[0].config
    dataset = open_dataset(config, world)
    for note in notes + ["this score is not legal"] * bool(config.ttt_unsafe_multi_epoch): log(f"warning: {note}")
    log(f"train_shards:{len(dataset.train.shards)} train_tokens:{len(dataset.train)} "
        f"val_documents:{len(document_bounds(dataset.val_tokens[:-1])) - 1} val_tokens:{len(dataset.val_tokens)} "
        f"val_bytes:{int(dataset.val_bytes.sum())} leaked_documents:{dataset.leaked_documents}"
        f"{'' if dataset.tokenizer_sha256 else ' bytes:unchecked'}\ndata_fingerprint:{dataset.fingerprint}")
    evaluator = Evaluator(config, world, log, dataset, compiled)
    facts = {"steps": 0, "train_tokens": 0, "train_seconds": 0.0, "compile_seconds": 0.0, "calibration_seconds": 0.0,
             "num_params": sum(map(math.prod, param_shapes(config).values()))}
    if not config.eval_only:
        trainer = Trainer(config, world, log, dataset, attention, compiled, fake_quantizer(config))
        log(f"num_params:{trainer.num_params} attention:{attention_name} compile:{int(compiled)} kernels:"
            f"{trainer.model.kernels.names} accumulation_steps:{config.accumulation_steps(world.size)}")
        if world.rank == 0: check_disk(config, trainer, artifact_path)
        if config.preflight: return preflight(config, log, trainer, code_bytes)
        facts |= make_artifact(config, trainer, evaluator, stop, artifact_path, code_bytes)

    start = time.perf_counter()
    model, header, size = reload(config, world, artifact_path, attention)
    require(header["tokenizer_sha256"] == dataset.tokenizer_sha256, f"{artifact_path}: was made with tokenizer "
            f"{header['tokenizer_sha256'][:12]}, TOKENIZER_PATH is {dataset.tokenizer_sha256[:12]}: set the right one")
    if config.eval_mode == "adapted": evaluator.compiled, model.fused = False, True  # CUDA graphs do most of it
    compile_model(model, evaluator.compiled)
    evaluator.keep("quantized", evaluator.score(model, config.eval_seq_len))
    if (official := "smoothed" if config.ngram_order else config.eval_mode) != "packed":
        evaluator.keep(official, score_model(config, evaluator, model, start).score(world))
    measured = {**facts, "eval_seconds": round(time.perf_counter() - start, 3), "artifact_bytes": size, "code_bytes":
                code_bytes, "submission_bytes": size + code_bytes, "source_sha256": hashlib.sha256(source).hexdigest()}
    torch.use_deterministic_algorithms(config.deterministic or config.audit)  # no clock runs any more
    found = audit(config, evaluator, lambda: reload(config, world, artifact_path, attention)[0]) if config.audit else {}
    return report_result(config, world, log, dataset, evaluator.stages, measured, found)


def make_artifact(config: Config, trainer: Trainer, evaluator: Evaluator, stop: StopRequest, path: Path,
                  code_bytes: int) -> dict[str, Any]:
    """Compiles, resumes if asked, trains, averages, calibrates, writes the artifact -> what is to be known of that."""
    world, start = trainer.world, time.perf_counter()
    if trainer.compiled and config.warmup_steps:
        trainer.warmup(config.warmup_steps)
        trainer.log(f"compile_warmup seconds:{time.perf_counter() - start:.1f}")
    compile_seconds = time.perf_counter() - start
    if config.resume: trainer.load(config.resume)
    if not trainer.finished: trainer.run(stop, lambda: evaluator.score(trainer.forward, config.eval_seq_len))
    trainer.loader.close()
    trainer.graphs.clear()
    trainer.log(f"peak_memory:{world.peak_memory_bytes() // 2**20}MiB steps:{trainer.step} "
                f"train_seconds:{trainer.elapsed_seconds:.3f}")
    trainer.model.eval()
    evaluator.keep("raw", evaluator.score(trainer.forward, config.eval_seq_len))
    trainer.use_averages()
    evaluator.keep("averaged", evaluator.score(trainer.forward, config.eval_seq_len))
    guides, calibration_seconds = calibrate_on_training_text(config, trainer, evaluator.dataset)
    if world.rank == 0:
        info = {"looping": trainer.model.looping, "temperature": trainer.model.temperature,
                "tokenizer_sha256": evaluator.dataset.tokenizer_sha256}
        data = fit_artifact(config, trainer.params, guides, info, code_bytes, trainer.log)
        write_atomic(path, lambda file: file.write(data), "ARTIFACT_PATH")
    return {"steps": trainer.step, "train_tokens": trainer.tokens, "train_seconds": round(trainer.elapsed_seconds, 3),
            "compile_seconds": round(compile_seconds, 3), "calibration_seconds": round(calibration_seconds, 3)}


def calibrate_on_training_text(config: Config, trainer: Trainer, dataset: Dataset) -> tuple[dict[str, Guide], float]:
    """-> (guides for the quantizers that take them, seconds); sets the model's temperature. All ranks take part.

    The guides' pieces come from all over the text.
    """
    start, world, stream = time.perf_counter(), trainer.world, dataset.train
    temperature = trainer.model.temperature = fit_temperature(config, trainer)
    guided = re.search("gptq|tcq", f"{config.matrix_quantizer} {config.embed_quantizer} {config.quant_overrides}")
    if not guided and config.eval_temperature: return {}, 0.0
    tokens = min(config.micro_batch_tokens, 16384)  # without compilation more would not fit
    count = world.size * max(config.gptq_calibration_batches * config.micro_batch_tokens // (world.size * tokens), 1)
    pieces = (stream.slice(i * len(stream) // count, tokens + 1) for i in range(world.rank, count, world.size))
    batches = (to_device(window_batch(config, piece, config.train_seq_len), world.device) for piece in pieces)
    guides = calibrate(config, world, trainer.model, batches) if guided else {}
    world.synchronize()
    seconds = max(world.gather(time.perf_counter() - start))
    trainer.log(f"calibration tokens:{count * tokens} temperature:{temperature} seconds:{seconds:.3f}")
    return guides, seconds


@torch.no_grad()
def fit_temperature(config: Config, trainer: Trainer) -> float:
    """EVAL_TEMPERATURE; where that is 0, of 0.90 to 1.10 the one that suits the training text behind the last step's.

    It takes GPTQ_CALIBRATION_BATCHES. 1 where they were read: what a model knows by heart wants another one.
    """
    world, loader, part = trainer.world, trainer.loader, config.micro_batch_tokens * trainer.world.size
    first, count = trainer.tokens // part, -(-config.gptq_calibration_batches // world.size)
    if config.eval_temperature or (first + count) * part > len(loader.stream): return config.eval_temperature or 1.0
    model = GPT(config, world.dtype, trainer.model.attention).to(world.device).eval()
    model.load_state_dict(trainer.params, assign=True)
    model.looping, grid, nats = trainer.model.looping, np.linspace(0.9, 1.1, 21).round(2).tolist(), np.zeros(21)
    for i in range(first, first + count):
        batch = to_device(loader.build(i, config.train_seq_len), world.device)
        features = model.features(batch.ids, batch.segments)
        for j, model.temperature in enumerate(grid): nats[j] += model.nats(features, batch.targets[0]).sum().item()
    return grid[int(np.argmin(world.sum(nats.tolist())))]


def reload(config: Config, world: World, path: Path, attention: Attention) -> tuple[GPT, dict[str, Any], int]:
    """Artifact file, read by rank 0 -> (model on every rank, made of nothing but the file; its header; its bytes).

    UserError where the environment asks for another model.
    """
    (header, weights), size = (read_artifact(path), path.stat().st_size) if world.rank == 0 else (({}, {}), 0)
    header, size = world.gather((header, size))[0]
    for name, kept in header["model"].items() if config.eval_only else ():
        require((wanted := getattr(config, name)) in (getattr(Config, name), kept),
                f"EVAL_ONLY={path}: was made with {name.upper()}={kept}, not {wanted}; leave it out")
    config = artifact_config(header, config)
    kernels = choose_kernels(replace(config, fp8_matmul=False), world.device)
    model = GPT(config, world.dtype, attention, kernels).to(world.device).eval()
    model.looping, model.temperature = header["looping"], header.get("temperature", 1.0)
    if world.rank == 0: model.load_state_dict(weights)
    for parameter in model.parameters() if world.size > 1 else (): dist.broadcast(parameter.detach(), 0)
    return model, header, size


def use_compile(config: Config, world: World, attention: str) -> bool:
    """Whether to compile. auto: on CUDA with Triton, where attention takes packed segments. UserError without CUDA."""
    on_gpu, fits = world.device.type == "cuda", attention != "sdpa" and importlib.util.find_spec("triton")
    if config.compile == "0" or (config.compile == "auto" and not (on_gpu and fits)): return False
    require(on_gpu, f"COMPILE={config.compile}: needs CUDA, this is {world.device.type}; use COMPILE=auto")
    torch._dynamo.config.recompile_limit = 64  # graphs: the stages of training, and scoring, with their shapes
    return True


def report_result(config: Config, world: World, log: Log, dataset: Dataset, stages: Mapping[str, Score],
                  measured: Mapping[str, Any], audited: Mapping[str, Any]) -> int:
    """Logs sizes and the result line -> exit code: 3 where the submission is too large, else 0."""
    submission, training = measured["submission_bytes"], measured["train_seconds"] + measured["calibration_seconds"]
    official, fits = [*stages][-1], submission <= SIZE_LIMIT_BYTES  # the last one is the score
    score, in_time = stages[official], max(measured["eval_seconds"], training) <= LIMIT_SECONDS
    log(f"artifact_bytes:{measured['artifact_bytes']} code_bytes:{measured['code_bytes']} "
        f"submission_bytes:{submission} limit_bytes:{SIZE_LIMIT_BYTES} fits:{int(fits)}")
    if not fits:
        log(f"error: {submission} bytes, over {SIZE_LIMIT_BYTES}; lower TARGET_BYTES; ALLOW_OVERSIZE=1 accepts it")
    result = {
        "version": VERSION, "run_id": config.run_id, "seed": config.seed, "world_size": world.size,
        "device": world.describe(), "torch": torch.__version__, "data_fingerprint": dataset.fingerprint,
        "overrides": config.overrides(), "peak_memory_bytes": max(world.gather(world.peak_memory_bytes())),
        "stages": {name: {**vars(x), "val_loss": x.val_loss, "val_bpb": x.val_bpb, "seconds": round(x.seconds, 3)}
                   for name, x in stages.items()}, "official_stage": official, "val_loss": score.val_loss,
        "val_bpb": score.val_bpb, **measured, "headroom_bytes": SIZE_LIMIT_BYTES - submission, "fits": fits,
        "legal": fits and in_time and not (dataset.leaked_documents or config.ttt_unsafe_multi_epoch or config.val_docs)
        and audited.get("causal", True) and audited.get("probability_error", 0) < 1e-4,
        "audit": {"scored_targets": score.tokens, "targets": len(dataset.val_tokens) - 1, "scored_bytes": score.bytes,
                  "leaked_documents": dataset.leaked_documents, "in_time": in_time, **audited}}
    log("result " + json.dumps(result))
    return 0 if fits or config.allow_oversize else 3


def main(environ: Mapping[str, str], arguments: Sequence[str] = ()) -> int:
    """Environment -> exit code: 0 done, 2 a mistake of the user, 3 too large, 130 interrupted."""
    if arguments:
        print(help_text())
        return 0 if set(arguments) <= {"-h", "--help"} else 2
    log, rank, stop = None, environ.get("RANK", "0"), StopRequest()
    try:
        require(tuple(map(int, torch.__version__.split(".")[:2])) >= MIN_TORCH,
                f"torch {torch.__version__} is too old: {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer is needed")
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, stop.handle)
        config, notes = Config.from_env(environ)
        world = World.start(config, environ)
        config = replace(config, run_id=config.run_id or world.gather(time.strftime("%Y%m%d-%H%M%S"))[0])
        return run(config, notes, world, log := Log(world, config), stop)
    except UserError as error: message, code = f"error: {error}", 2
    except torch.OutOfMemoryError as error:
        message, code = f"error: out of memory ({first_line(error)}); lower MICRO_BATCH_TOKENS", 2
    except Interrupted as interruption: message, code = f"interrupted; RESUME={interruption} continues", 130
    except (Exception, KeyboardInterrupt) as error:
        # a KeyboardInterrupt; libraries turn some into errors of their own
        if stop.ending: message, code = "interrupted; nothing was left half-written", 130
        elif isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            message, code = f"error: another process is gone ({first_line(error):.200})", 2
        else: raise
    if log: log(message, to_terminal=False)
    print((f"rank {rank}: " if rank.isdigit() and rank != "0" else "") + message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    exit_code = main(os.environ, sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_code)  # at once: threads of gloo abort, one time in ten, when the interpreter ends around them
