"""bench/: the tables appear, and what they count is right."""
import subprocess
import sys

import numpy as np
import program
import pytest
import torch

import train_gpt
from train_gpt import Batch, Config, make_segments

sys.path.insert(0, str(program.ROOT / "bench"))
import speed


def test_flops_of_a_step():
    config = Config(vocab_size=64, num_layers=3, model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2, rope_dims=4,
                    gate_window=4, xsa_last_n=0, parallel_start_layer=0, loop_start=1, loop_end=1, num_loops=1)
    ids = torch.zeros(1, 10, dtype=torch.long)
    batch = Batch(ids, ids, make_segments(np.array([0, 4]), 10, 6, 4))
    layer = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8 + 2 * 8 * 16
    for looping, visits in ((False, 3), (True, 4)):
        assert speed.step_flops(config, batch, looping) == \
            6 * 10 * (visits * layer + 64 * 8) + 6 * 8 * visits * (4 ** 2 + 6 ** 2)


def test_made_up_documents_fill_the_stream(tmp_path):
    config = train_gpt.Config(vocab_size=512, micro_batch_tokens=4096, train_batch_tokens=4096)
    dataset = speed.made_up_dataset(config, tmp_path)
    tokens = dataset.train.slice(0, len(dataset.train))
    assert len(tokens) == 1 << 18 and tokens[0] == train_gpt.BOS and tokens.max() < 512
    documents = np.count_nonzero(tokens == train_gpt.BOS)
    assert 500 < len(tokens) / documents < 1100
    for start in range(0, len(tokens), 999):
        assert np.count_nonzero(dataset.train.slice(start, 4097) == train_gpt.BOS) <= dataset.max_documents


@pytest.mark.parametrize("arguments,variables,code", [
    (["--repeats", "1"], {"PREFIX_LOSS": "0.1", "QAT_START": "0.9"}, 0), ([], {"MODEL_DIM": "33"}, 2)])
def test_speed_prints_a_table(arguments, variables, code, tmp_path):
    settings = program.settings(tmp_path, tmp_path / "logs", **variables)
    done = subprocess.run([sys.executable, program.ROOT / "bench/speed.py", *arguments], env=settings, check=False,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("error: MODEL_DIM=33") and done.stdout == ""
        return
    lines = done.stdout.splitlines()
    assert lines[0].startswith("train_gpt:") and lines[1].startswith("| stage")
    stages = [line.split("|")[1].strip() for line in lines[3:-1]]
    assert stages == ["loops off, 64 tokens, auxiliary", "loops on, 64 tokens, auxiliary", "loops on, 64 tokens",
                      "loops on, 64 tokens, QAT"]
    for line in lines[3:-1]:
        cells = [cell.strip(" %") for cell in line.split("|")[2:-1]]
        assert all(float(cell.replace(",", "")) > 0 for cell in cells[:-1])
    assert "tokens/s; peak memory" in lines[-1] and not (tmp_path / "logs").exists()
