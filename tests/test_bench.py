"""bench/: the tables appear, and what they count is right."""
import subprocess
import sys
from dataclasses import replace

import numpy as np
import program
import pytest
import torch
from helpers import random_batch, randomize, tiny_config

import train_gpt
from train_gpt import GPT, Batch, Config, make_segments

sys.path.insert(0, str(program.ROOT / "bench"))
import compression
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
        pieces = train_gpt.cut_segments(dataset.train.slice(start, 4096), 2048, True)
        assert len(pieces) <= dataset.max_segments[2048] <= 64


@pytest.mark.parametrize("arguments,variables,code", [
    (["--repeats", "1"], {"QAT_START": "0.9"}, 0), ([], {"MODEL_DIM": "33"}, 2)])
def test_speed_prints_a_table(arguments, variables, code, tmp_path):
    settings = program.settings(tmp_path, tmp_path / "logs", **variables)
    done = subprocess.run([sys.executable, program.ROOT / "bench/speed.py", *arguments], env=settings, check=False,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("error: MODEL_DIM=33") and done.stdout == ""
        return
    lines = done.stdout.splitlines()
    assert lines[0].startswith("train_gpt:") and lines[0].endswith(" kernels:torch") and lines[1].startswith("| stage")
    stages = [line.split("|")[1].strip() for line in lines[3:-1]]
    assert stages == ["loops off, 64 tokens", "loops on, 64 tokens", "loops on, 64 tokens, QAT"]
    for line in lines[3:-1]:
        cells = [cell.strip(" %") for cell in line.split("|")[2:-1]]
        *times, utilization = (float(cell.replace(",", "")) for cell in cells[:-1])
        assert min(times) > 0 and utilization >= 0  # 0.0 % on a busy machine
    assert "tokens/s; peak memory" in lines[-1] and not (tmp_path / "logs").exists()


def check_cases(config, kernels, device, dtype, tolerance):
    """Each kernel against its twin, forward and backward."""
    cases = speed.kernel_cases(config, kernels, device, dtype)
    for name, case in cases.items():
        both, inputs = [], case.differentiable
        for function in (case.kernel, case.twin):
            outputs = function(*case.inputs)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            both.append([*outputs, *torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])])
        for a, b in zip(*both):
            if not any(a.stride()): continue  # has no memory, only a gradient
            assert a.shape == b.shape and (a - b).double().norm() <= tolerance * b.double().norm(), name
    return list(cases)


def plain_kernels(config):
    """What has the form of the kernels and is none."""
    def rotate(qkv, gain, cos, sin, width):
        pieces = qkv.unflatten(-1, (-1, width))
        (q, k), v = train_gpt.rotary(train_gpt.norm(pieces[:, :-config.num_kv_heads]), cos, sin).split(
            [config.num_heads, config.num_kv_heads], 1), pieces[:, -config.num_kv_heads:]
        spread = (x.repeat_interleave(config.num_heads // config.num_kv_heads, 1) for x in (k, v))
        return q * gain[:, None], k + 0, v + 0, *spread

    def mix(a, b, c, weights, scale, chain, window):  # no gradient reaches c
        mixed = weights[1] * b + weights[2] * (chain + (c - chain).detach()) + (0 if a is None else weights[0] * a)
        return mixed, train_gpt.norm(mixed, scale), train_gpt.norm(mixed, scale)[:, :window] + 0, chain + 0

    def cross_entropy(x, head, targets, caps, learned):
        logits = x @ head.T
        squashed = torch.where(logits >= 0, caps[0] * (logits / caps[0]).tanh(), caps[1] * (logits / caps[1]).tanh())
        return squashed.logsumexp(-1) - squashed.gather(1, targets[:, None])[:, 0]

    def linear_add(x, weight, base):
        return x @ weight.T + (0 if base is None else base)
    return train_gpt.PLAIN._replace(
        linear_add=linear_add, rotate_heads=rotate, mix_norm=mix, cross_entropy=cross_entropy,
        exclude=lambda y, v, opened: (train_gpt.exclusive(y, v) * opened[:, :, None]).flatten(1),
        leaky2=lambda n, up, down, base, slope: linear_add(
            torch.nn.functional.leaky_relu(n @ up.T, slope).square(), down, base))


def test_speed_compares_kernels_with_their_twins(capsys):
    config, cpu = tiny_config(), torch.device("cpu")
    world = train_gpt.World(0, 1, cpu, torch.float32)
    names = check_cases(config, plain_kernels(config), cpu, torch.float32, 1e-5)
    assert names == ["linear_add", "linear_add, to nothing", "leaky2", "rotate_heads", "exclude", "cross_entropy",
                     "mix_norm", "mix_norm, with a skip"]
    speed.report_kernels(config, world, plain_kernels(config), 1e9, False, 1)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-1]]
    assert [row[0] for row in rows] == names and all(float(cell) >= 0 for row in rows for cell in row[1:])
    flops = 12 * config.micro_batch_tokens * config.model_dim * config.mlp_dim
    assert float(rows[names.index("leaky2")][-1]) == pytest.approx(1e3 * flops / 1e9, rel=0.01)
    assert lines[-1].startswith("floor: inputs, outputs")
    speed.report_kernels(config, world, train_gpt.PLAIN, 1e9, False, 1)
    assert capsys.readouterr().out == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
                    reason="needs a Hopper GPU")
def test_speed_compares_the_real_kernels_with_their_twins(capsys):
    config, device = Config(micro_batch_tokens=8192, train_batch_tokens=8192), torch.device("cuda")
    kernels = train_gpt.choose_kernels(config, device)
    assert len(check_cases(config, kernels, device, torch.bfloat16, 0.02)) == 8
    speed.report_kernels(config, train_gpt.World(0, 1, device, torch.bfloat16), kernels, 7e14, True, 2)
    assert capsys.readouterr().out.count("\n") == 11


# --- bench/compression.py
def write_artifact(path, config, weights, **info):
    path.write_bytes(train_gpt.pack_artifact(config, train_gpt.quantize(config, weights), info))
    return str(path)


def test_weighted_error_is_the_quadratic_form():
    torch.manual_seed(0)
    x, weight, noise = torch.randn(40, 6), torch.randn(2, 3, 6), 0.1 * torch.randn(2, 3, 6)
    hessian, gain = x.T @ x / 40, torch.rand(2, 3) + 0.5
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)
    feedback = train_gpt.inverse_factor(hessian.expand(2, -1, -1))
    log_sensitivity = gain.log() - 2 * feedback.diagonal(dim1=1, dim2=2).log().mean(-1, keepdim=True)
    guides = {"q_proj": train_gpt.Guide(feedback, log_sensitivity[..., None])}
    found = compression.weighted_error({"q_proj": weight}, {"q_proj": weight + noise}, guides)
    wanted = sum(float(gain[i, r] * noise[i, r] @ damped @ noise[i, r]) for i in range(2) for r in range(3))
    assert found == pytest.approx(wanted, rel=1e-3)
    assert compression.plain_error({"q_proj": weight}, {"q_proj": 1.5 * weight}, guides) == pytest.approx(0.5)


def test_entropy_counts_codes_and_raw_values():
    codes = np.array([[0, 0, 1, 1], [2, 2, 3, 3]], np.int8)
    arrays = {"codes": codes, "scale": np.ones(2, np.float16)}
    assert compression.entropy_bytes({"a": ("rtn", arrays), "b": ("fp16", {"values": np.ones(3, np.float16)})}) == \
        pytest.approx(8 * 2 / 8 + 4 + 6)


def test_compression_compares_quantizers_at_equal_bytes(tmp_path):
    data = program.write_data(tmp_path / "data")
    settings = program.settings(data, tmp_path / "logs", MODEL_DIM=64, GATE_WINDOW=8)
    program.run(settings)
    done = subprocess.run([sys.executable, program.ROOT / "bench/compression.py", tmp_path / "logs/run.checkpoint",
                           "--eval"], env=settings, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and [line.split(":")[0] for line in done.stderr.splitlines()] == [*compression.METHODS]
    lines = done.stdout.splitlines()
    assert "bits per byte before quantization" in lines[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    methods = {row[0]: row[1:] for row in rows[2:2 + len(compression.METHODS)]}
    assert rows[0][7:] == ["s to decode", "bits per byte"]
    assert list(methods) == list(compression.METHODS)
    sizes = [int(row[0].replace(",", "")) for row in methods.values()]
    assert max(sizes) < 1.02 * min(sizes)
    weighted = {name: float(row[4]) for name, row in methods.items()}
    assert weighted["tcq"] < weighted["gptq"] < weighted["rtn"]
    visits = rows[4 + len(compression.METHODS):-len(train_gpt.CODECS) - 2]
    assert len(visits) > 2 and all(0 < float(row[2]) < 1 for row in visits) and visits[0][3] == "1.00"
    assert max(float(row[6]) for row in methods.values()) > 0
    codecs = {row[1]: row for row in rows[-len(train_gpt.CODECS):]}
    assert list(codecs) == list(train_gpt.CODECS) and all(float(row[4]) > 0 for row in codecs.values())
    last = [*compression.METHODS][-1]
    assert {row[0] for row in codecs.values()} == {last} and f"error of {last}," in done.stdout

@pytest.mark.parametrize("only, fitted, own", [
    ("act_order and lqer_*,ternary, r*,codebooks of #532, rans",
     ["act_order and lqer_asym", "act_order and lqer_sym", "act_order and lqer_best"],
     ["codebooks of #532, rans", "ternary, radix", "ternary, radix_lzma", "ternary, rans"]),
    ("codebooks*", [], ["codebooks of #532, huffman", "codebooks of #532, rans"])])
def test_compression_of_an_artifact_with_some_methods_and_codecs(only, fitted, own, registries, tmp_path, capsys):
    """In this process: rows of the methods that were asked for, and each of them with each codec."""
    data, path = program.write_data(tmp_path / "data"), tmp_path / "run.artifact"
    for name, value in program.settings(data, tmp_path / "logs").items():
        registries.setenv(name, value)
    config, _ = Config.from_env(program.settings(data, tmp_path / "logs"))
    model = GPT(config)
    model.init_weights(0)
    randomize(model, 1)
    write_artifact(path, config, dict(model.named_parameters()), looping=True)
    codecs = ["rans", "bitmask", "bitmask_lzma", "pergroup_lzma"]
    assert compression.main([str(path), "--published", "--codecs", "rans,bitmask*,pergroup_lzma", "--only", only]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if "|" in line]
    assert [row[0] for row in rows if len(row) == 8 and row[1][0].isdigit()] == fitted + own
    ran = own + fitted
    assert [row[:2] for row in rows[-4 * len(ran):]] == [[name, codec] for name in ran for codec in codecs]
    assert f"error of {ran[-1]}, on one window" in printed


def test_names_are_chosen_by_patterns():
    names = ["tcq", "tcq, plain", "gptq", "codebooks of #532, huffman"]
    assert compression.chosen("--only", "gptq,tcq*", names) == ["tcq", "tcq, plain", "gptq"]
    assert compression.chosen("--only", "codebooks of #532, huffman,gptq", names) == ["gptq", names[3]]
    for patterns, wrong in (("tcq,none", "none"), ("tcq, gptq", "tcq, gptq"), ("", "")):
        with pytest.raises(train_gpt.UserError) as caught:
            compression.chosen("--only", patterns, names)
        assert str(caught.value) == f"--only {wrong}: fits none of tcq; tcq, plain; gptq; codebooks of #532, huffman"


def test_errors_are_followed_through_the_visits():
    """Against a model whose blocks are called one by one; where nothing changes there is no error."""
    config = tiny_config(num_loops=2, loop_start=1, loop_end=2)
    model = GPT(config)
    model.init_weights(0)
    randomize(model, 1)
    model.looping = True
    batch, weights = random_batch(1, 64, 64), {name: p.detach().clone() for name, p in model.named_parameters()}
    changed = {name: value + 0.01 * torch.randn_like(value) * (name == "up_proj") for name, value in weights.items()}
    errors = compression.visit_errors(model.eval(), batch, weights, changed)
    assert [layer for layer, _ in errors] == [0, 1, 2, 1, 2, 1, 2, 3]
    assert all(0 < error < 1 for _, error in errors)
    assert {error for _, error in compression.visit_errors(model, batch, weights, weights)} == {0.0}
    rows = compression.growth_rows(errors)
    assert [row[:2] for row in rows[:4]] == [["0", "1"], ["1", "1"], ["2", "1"], ["1", "2"]]
    assert float(rows[3][3]) == pytest.approx(errors[3][1] / errors[1][1], abs=0.01)
    late = {**weights, "mlp_scale": weights["mlp_scale"] * torch.tensor([1, 1, 1, 2.0])[:, None]}
    assert [error > 0 for _, error in compression.visit_errors(model, batch, weights, late)] == [False] * 7 + [True]


def test_every_published_method_is_a_config(registries):
    """And quantizes, packs and unpacks a small model."""
    compression.quantizers.register()
    compression.packers.register()
    methods = {name: (changes, "rans") for name, changes in compression.PUBLISHED.items()} | compression.OWN_SIZE
    assert len(methods) > 15
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0))
               for name, shape in train_gpt.param_shapes(tiny_config()).items()}
    for name, (changes, codec) in methods.items():
        config = tiny_config(**changes, compressor=codec, target_bytes=0)
        if "lqer" in name:
            config = replace(config, quant_overrides=f"up_proj:1={name.split()[-1]}")
        data = train_gpt.pack_artifact(config, train_gpt.quantize(config, weights), {})
        _, decoded = train_gpt.unpack_artifact(data, name)
        error = (decoded["up_proj"] - weights["up_proj"]).norm() / weights["up_proj"].norm()
        assert error < (0.6 if "pruned" in name or "ternary" in name else 0.3), name


def test_lrzip_by_name_is_refused_before_anything_else_is_read(registries, capsys):
    registries.setattr(compression.packers.shutil, "which", lambda name: None)
    for codecs in ("lrzip", "rans,pergroup"):
        assert compression.main(["/nowhere", "--published", "--codecs", codecs]) == 2
        assert capsys.readouterr().err.startswith("error: lrzip: no such program; install it")


def test_weights_of_an_artifact_are_those_it_decodes_to(tmp_path):
    """Its model goes over the settings; altered and newer ones are refused with the reason."""
    config = tiny_config()
    weights = {name: torch.randn(shape) for name, shape in train_gpt.param_shapes(config).items()}
    path = write_artifact(tmp_path / "a.artifact", config, weights, looping=True, temperature=1.25)
    other = replace(config, model_dim=64, target_bytes=123)
    found, decoded, looping, temperature = compression.load_weights(path, other)
    assert found == replace(config, target_bytes=123) and looping and temperature == 1.25
    expected = train_gpt.read_artifact(tmp_path / "a.artifact")[1]
    assert decoded.keys() == weights.keys() and all(torch.equal(decoded[name], expected[name]) for name in weights)
    plain = write_artifact(tmp_path / "b.artifact", config, weights, looping=False)
    assert compression.load_weights(plain, other)[2:] == (False, 1.0)
    data, newer = (tmp_path / "a.artifact").read_bytes(), train_gpt.ARTIFACT_MAGIC[-1] + 1
    for changed, complaint in ((data[:-40] + bytes(40), "truncated or altered"), (data[:100], "truncated or altered"),
                               (data[:7] + bytes([newer]) + data[8:], f"artifact version 0{newer}")):
        (tmp_path / "c.artifact").write_bytes(changed)
        with pytest.raises(train_gpt.UserError, match=f"c.artifact: {complaint}"):
            compression.load_weights(str(tmp_path / "c.artifact"), other)


@pytest.mark.parametrize("arguments, code, complaint", [
    ([], 2, "give a checkpoint or an artifact, or --predict"), (["a", "--predict"], 2, "an artifact, or --predict"),
    (["/nowhere/a.checkpoint"], 2, "error: /nowhere/a.checkpoint: No such file"),
    ([__file__], 2, "neither a readable checkpoint (")])
def test_compression_refuses_what_it_cannot_do(arguments, code, complaint, tmp_path):
    settings = program.settings(program.write_data(tmp_path / "data"), tmp_path / "logs")
    done = subprocess.run([sys.executable, program.ROOT / "bench/compression.py", *arguments], env=settings,
                          check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_the_largest_model_that_fits(capsys, monkeypatch):
    monkeypatch.setattr(compression, "pack", lambda source: bytes(len(source) // 8))  # saves time
    config = Config(attn_clip_sigmas=16.0, mlp_clip_sigmas=16.0)
    compression.predict(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"predicted_artifact_bytes:{train_gpt.predicted_bytes(config)} code_bytes:")
    hidden, layers = (int(line.split(":")[1]) for line in lines[1:])
    limit = int(lines[0].split("limit_bytes:")[1]) - int(lines[0].split("code_bytes:")[1].split()[0])
    for name, value, step in (("mlp_hidden", hidden, 16), ("num_layers", layers, 1)):
        assert train_gpt.predicted_bytes(replace(config, **{name: value})) <= limit
        assert train_gpt.predicted_bytes(replace(config, **{name: value + step})) > limit
    compression.predict(Config())
    assert "largest NUM_LAYERS that fits: 10\n" in capsys.readouterr().out
