"""Section 3, data: shards, the circular stream, segments, the loader on any number of ranks, leaks, bytes of text."""
import hashlib
import io
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    BOS,
    SPACE,
    Config,
    TokenStream,
    TrainLoader,
    UserError,
    World,
    cut_segments,
    document_bounds,
    find_shards,
    make_segments,
    open_dataset,
    read_shard,
    scan_shard,
    table_bytes,
)

VOCAB = 64
DOCUMENTS = st.lists(st.lists(st.integers(2, VOCAB - 1), max_size=30), min_size=1, max_size=30)


def shard_bytes(tokens, magic=20240520, version=1, promised=None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if promised is None else promised
    return header.tobytes() + np.asarray(tokens, "<u2").tobytes()


def write(path: Path, tokens, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard_bytes(tokens, **options))
    return path


def memory_stream(*shards) -> TokenStream:
    """A stream over arrays, without files."""
    stream = TokenStream([])
    stream.shards = [np.asarray(shard, np.uint16) for shard in shards]
    stream.offsets = np.cumsum([0, *map(len, stream.shards)])
    return stream


def make_documents(seed: int, count: int, low: int = 2, longest: int = 60) -> list[np.ndarray]:
    """`count` documents: BOS and 5 to `longest` random tokens."""
    random = np.random.default_rng(seed)
    return [np.concatenate(([BOS], random.integers(low, VOCAB, random.integers(5, longest)))) for _ in range(count)]


def fill(folder: Path, train: list, val, sidecar=None) -> Config:
    """Writes shards (with a sidecar, so that no tokenizer is needed) -> the config that reads them."""
    for i, tokens in enumerate(train):
        write(folder / f"fineweb_train_{i:06}.bin", tokens)
    write(folder / "fineweb_val_000000.bin", val)
    sidecar = np.where(np.asarray(val) == BOS, 0, 2) if sidecar is None else sidecar
    write(folder / "fineweb_val_bytes_000000.bin", sidecar)
    return Config(data_path=str(folder), data_dir=str(folder / "none"), vocab_size=VOCAB, train_seq_len=16,
                  micro_batch_tokens=32, train_batch_tokens=128)


def one_world(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"), torch.float32)


def refused(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(config, one_world())
    return str(caught.value)


# --- shards
WHOLE = shard_bytes(range(2, 12))


@pytest.mark.parametrize("data, complaint", [
    (b"", "no token shard"), (b"x", "no token shard"), (WHOLE[:500], "no token shard"), (WHOLE[:501], "no token shard"),
    (b"some text that is no shard, but long enough to be one" * 100, "no token shard"),
    (b"odd text that is no shard, though long enough" * 101, "no token shard"),
    (shard_bytes([5] * 9, magic=20240521), "no token shard"), (shard_bytes([5] * 9, version=2), "no token shard"),
    (WHOLE[:1024], "truncated"), (WHOLE[:-2], "1042 bytes, its header promises 1044: truncated"),
    (WHOLE[:-1], "1043 bytes, its header promises 1044: truncated"), (WHOLE + b"x", "1045 bytes"),
    (WHOLE + b"xx", "1046 bytes, its header promises 1044: truncated or altered"),
    (shard_bytes([], promised=0), "holds no tokens"), (shard_bytes([], promised=-1), "truncated or altered")],
    ids=["empty", "one byte", "half a header", "odd header", "text", "odd text", "other magic", "other version",
         "no data", "last token lost", "last byte lost", "a byte more", "a token more", "no tokens", "negative"])
def test_a_file_that_is_no_whole_shard_is_refused(tmp_path, data, complaint):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_shard(path)
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_an_absent_shard_is_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_shard(tmp_path / "fineweb_train_000000.bin")


def test_a_shard_reads_as_written(tmp_path):
    tokens = np.array([1, 0, 65535, 2, 1], np.uint16)
    read = read_shard(write(tmp_path / "a.bin", tokens))
    assert read.dtype == np.uint16 and np.array_equal(read, tokens) and isinstance(read, np.memmap)


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=5),
       st.integers(0, 10**12), st.integers(1, 120))
def test_slices_of_the_stream_are_those_of_the_repeated_concatenation(shards, start, count):
    stream = memory_stream(*shards)
    whole = np.concatenate(shards)
    assert len(stream) == len(whole)
    expected = whole[(start + np.arange(count)) % len(whole)]
    result = stream.slice(start, count)
    assert result.dtype == np.uint16 and np.array_equal(result, expected)


# --- segments
def naive_starts(ids, seq_len: int, document_mask: bool) -> list[int]:
    starts, since = [], 0
    for i, token in enumerate(ids):
        if i == 0 or (document_mask and token == BOS) or since == seq_len:
            starts.append(i)
            since = 0
        since += 1
    return starts


@given(st.lists(st.sampled_from([1, 1, 2, 3, 4, 5]), min_size=1, max_size=80), st.integers(1, 20), st.booleans(),
       st.integers(0, 9))
def test_segments_are_those_of_a_naive_loop(ids, seq_len, document_mask, spare):
    starts = cut_segments(np.array(ids, np.uint16), seq_len, document_mask)
    expected = naive_starts(ids, seq_len, document_mask)
    assert starts.tolist() == expected
    bounds = [*expected, len(ids)]
    positions = [i - max(s for s in expected if s <= i) for i in range(len(ids))]
    for padded in (0, len(expected) + spare):
        segments = make_segments(starts, len(ids), seq_len, padded)
        assert segments.boundaries.dtype == segments.positions.dtype == torch.int32
        assert segments.boundaries.tolist() == bounds + [len(ids)] * (max(padded, len(expected)) - len(expected))
        assert segments.positions.tolist() == positions
        assert segments.max_length == (seq_len if padded else max(np.diff(bounds)))


def test_too_many_segments_for_the_fixed_shape_are_a_fault():
    with pytest.raises(AssertionError):
        make_segments(np.array([0, 2, 4]), 6, 2, 2)
    with pytest.raises(AssertionError):
        make_segments(np.array([0, 2]), 6, 3, 2)


# --- the loader
def loader(size: int, rank: int, stream: TokenStream, micro_tokens: int, **options) -> TrainLoader:
    config = Config(train_batch_tokens=128, micro_batch_tokens=micro_tokens, train_seq_len=16, **options)
    return TrainLoader(config, one_world(rank, size), stream)


def read_step(loaders: list[TrainLoader], step: int) -> list:
    """The micro-batches of a step of 128 tokens, in the order of the stream, as the trainer takes them."""
    count = 128 // sum(worker.config.micro_batch_tokens for worker in loaders)
    return [worker.micro(step * count + micro, 16) for micro in range(count) for worker in loaders]


@pytest.fixture
def as_read(monkeypatch):
    """Segments stay where the stream has them."""
    monkeypatch.setattr(train_gpt, "longest_first", lambda starts, total: (starts, np.arange(total)))


@pytest.mark.parametrize("order, document_mask", [("sequential", True), ("shuffled", True), ("sequential", False)])
def test_the_longest_segments_come_first(order, document_mask, request):
    """They are those of the stream, whole, with their targets and positions; equally long ones keep their order."""
    stream = memory_stream(*(np.concatenate(make_documents(s, 4)) for s in range(3)))
    worker = loader(1, 0, stream, 64, train_order=order, document_mask=document_mask)

    def pieces(batch) -> list[tuple]:
        cuts, positions = batch.segments.boundaries.tolist(), batch.segments.positions.tolist()
        assert all(positions[a:b] == list(range(b - a)) for a, b in zip(cuts, cuts[1:]))
        return [(*batch.ids[0, a:b].tolist(), *batch.targets[0, a:b].tolist()) for a, b in zip(cuts, cuts[1:])]

    ours = [pieces(worker.build(index, 16)) for index in range(20)]
    request.getfixturevalue("as_read")
    wanted = [sorted(pieces(worker.build(index, 16)), key=len, reverse=True) for index in range(20)]
    assert ours == wanted


@pytest.mark.parametrize("size, micro_tokens", [(1, 32), (2, 32), (4, 32), (1, 128), (2, 16), (8, 16)])
def test_every_number_of_ranks_reads_the_same_stream(size, micro_tokens, as_read):
    """Epoch after epoch: no token skipped or repeated, and any step can be read without those before it."""
    stream = memory_stream(*(np.concatenate(make_documents(s, 4)) for s in range(3)))
    steps = 3 * len(stream) // 128 + 2
    loaders = [loader(size, rank, stream, micro_tokens) for rank in range(size)]
    batches = [batch for step in range(steps) for batch in read_step(loaders, step)]
    ids = torch.cat([batch.ids[0] for batch in batches]).numpy()
    targets = torch.cat([batch.targets[0] for batch in batches]).numpy()
    assert np.array_equal(ids, stream.slice(0, steps * 128)) and np.array_equal(targets, stream.slice(1, steps * 128))
    for batch in batches:
        assert batch.ids.shape == batch.targets.shape == (1, micro_tokens) and batch.ids.dtype == torch.int64
        expected = naive_starts(batch.ids[0].tolist(), 16, True)
        assert batch.segments.boundaries.tolist() == [*expected, micro_tokens]
    for worker in loaders:
        worker.close()
    late = loader(size, size - 1, stream, micro_tokens)  # a resumed run begins in the middle, then jumps
    for index in (7, 8, 3, 7):
        start = (index * size + size - 1) * micro_tokens
        assert np.array_equal(late.micro(index, 16).ids[0].numpy(), stream.slice(start, micro_tokens))
    late.close()


def test_a_stage_changes_segments_of_batches_prepared_ahead(as_read):
    """The tokens stay those of the index; nothing that was prepared for the stage before is handed out."""
    stream = memory_stream(np.concatenate(make_documents(0, 9)))
    worker, random = loader(1, 0, stream, 64), np.random.default_rng(1)
    for index in range(12):
        seq_len = int(random.choice([4, 16]))
        ids, targets, segments = worker.micro(index, seq_len)
        assert np.array_equal(ids[0].numpy(), stream.slice(64 * index, 64))
        assert segments.boundaries.tolist() == [*naive_starts(ids[0].tolist(), seq_len, True), 64]
        assert targets.shape == (1, 64) and np.array_equal(targets[0].numpy(), stream.slice(64 * index + 1, 64))
    worker.close()


def test_without_document_mask_rows_are_plain():
    stream = memory_stream(np.concatenate(make_documents(0, 9)))
    worker = loader(1, 0, stream, 64, document_mask=False)
    assert worker.micro(1, 16).segments.boundaries.tolist() == [0, 16, 32, 48, 64]
    worker.close()


@pytest.mark.parametrize("order", ["strided", "shuffled"])
@pytest.mark.parametrize("size, micro_tokens", [(1, 32), (2, 32), (4, 32), (1, 128), (2, 16)])
def test_rows_are_the_same_for_every_number_of_ranks_and_each_comes_once_an_epoch(size, micro_tokens, order, as_read):
    stream = memory_stream(*(np.concatenate(make_documents(s, 4)) for s in range(3)))
    rows = len(stream) // 16
    loaders = [loader(size, rank, stream, micro_tokens, train_order=order) for rank in range(size)]
    reference = loader(1, 0, stream, 16, train_order=order)
    seen = []
    for step in range(2 * rows // 8 + 1):
        batches = read_step(loaders, step)
        ids, targets = (torch.cat([batch[i][0] for batch in batches]).numpy() for i in (0, 1))
        expected = torch.cat([batch.ids[0] for batch in read_step([reference], step)]).numpy()
        assert np.array_equal(ids, expected)
        for i in range(0, 128, 16):
            row = next(r for r in range(rows) if np.array_equal(stream.slice(r * 16, 16), ids[i:i + 16]))
            assert np.array_equal(stream.slice(row * 16 + 1, 16), targets[i:i + 16])
            seen.append(row)
        for batch in batches:
            starts = [i + s for i in range(0, micro_tokens, 16)
                      for s in naive_starts(batch.ids[0, i:i + 16].tolist(), 16, True)]
            assert batch.segments.boundaries.tolist() == [*starts, micro_tokens]
    assert sorted(seen[:rows]) == sorted(seen[rows:2 * rows]) == list(range(rows))
    assert (seen[:rows] == seen[rows:2 * rows]) == (order == "strided")
    assert seen[:rows] != list(range(rows)), "rows come from all over the shards"
    for worker in [*loaders, reference]:
        worker.close()


@given(st.integers(1, 5000))
def test_the_stride_meets_every_row(rows):
    stride = train_gpt.coprime_stride(rows)
    assert stride >= 1 and len({i * stride % rows for i in range(rows)}) == rows
    assert rows < 20 or 0.5 * rows < stride < 0.75 * rows


def test_every_seed_and_epoch_shuffles_in_its_own_way():
    orders = [train_gpt.shuffled_rows(50, seed, epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders) and len({*map(tuple, orders)}) == 4
    train_gpt.shuffled_rows.cache_clear()
    assert train_gpt.shuffled_rows(50, 0, 0).tolist() == orders[0]


@pytest.mark.parametrize("order", ["sequential", "strided", "shuffled"])
def test_padded_batches_have_room_for_all_segments(tmp_path, order):
    """As on CUDA, where every batch has one shape."""
    random = np.random.default_rng(0)
    tokens = np.where(random.random(4000) < np.linspace(0, 1, 4000) ** 4, BOS, random.integers(2, VOCAB, 4000))
    config = changed(fill(tmp_path, [tokens[:3000], tokens[3000:]], VALIDATION[0]), train_order=order,
                     micro_batch_tokens=128, train_seq_schedule="8@0.5,16@1")
    dataset = open_dataset(config, one_world())
    for length in (16, 8):
        worker = TrainLoader(config, one_world(), dataset.train, dataset.max_segments)
        batches = [worker.micro(index, length) for index in range(70)]  # more than two epochs
        assert {batch.segments.boundaries.numel() for batch in batches} == {dataset.max_segments[length] + 1}
        assert {batch.segments.max_length for batch in batches} == {length}
        worker.close()


@given(DOCUMENTS, st.integers(1, 40), st.sets(st.integers(1, 12), min_size=1), st.data())
def test_the_bound_on_segments_holds_for_every_window(documents, window, lengths, data):
    """With one to spare at most."""
    tokens = np.concatenate([[BOS, *document] for document in documents]).astype(np.uint16)
    window = min(window, len(tokens))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens) - 1), max_size=4))) if len(tokens) > 1 else []
    stream = memory_stream(*np.split(tokens, cuts))
    scans = [scan_shard(stream, i, np.empty(0, np.uint64), set(), window, lengths) for i in range(len(stream.shards))]
    for length in lengths:
        most = max(len(cut_segments(stream.slice(start, window), length, True)) for start in range(len(tokens)))
        assert most <= max(scan.max_segments[length] for scan in scans) <= most + 1


def test_the_bound_on_segments_holds_for_windows_longer_than_the_stream():
    """A micro-batch that goes several times round a small stream. On CUDA the padded segments would not suffice."""
    stream = memory_stream([BOS, 5], [BOS, 6, 7])
    scans = [scan_shard(stream, i, np.empty(0, np.uint64), set(), 33, [2]) for i in range(2)]
    most = max(len(cut_segments(stream.slice(start, 33), 2, True)) for start in range(5))
    assert max(scan.max_segments[2] for scan in scans) >= most


# --- leaks
VALIDATION = make_documents(100, 12)
TRAINING = make_documents(200, 40)


def cut(tokens: np.ndarray, *places: int) -> list[np.ndarray]:
    return np.split(tokens, places)


def plant(where: str) -> tuple[list[np.ndarray], int]:
    """Training shards with a validation document in them, and the index of the shard where it begins."""
    leak = VALIDATION[7]
    before, after = np.concatenate(TRAINING[:20]), np.concatenate(TRAINING[20:])
    whole, begin = np.concatenate((before, leak, after)), len(before)
    return {
        "first": ([np.concatenate((leak, before)), after], 0), "start": ([before, np.concatenate((leak, after))], 1),
        "middle": ([whole], 0), "shard of its own": ([before, leak, after], 1),
        "end of a shard": ([np.concatenate((before, leak)), after], 0),
        "very end": ([before, np.concatenate((after, leak))], 1),
        "two shards": (cut(whole, begin + 5), 0), "after its BOS": (cut(whole, begin + 1), 0),
        "last token apart": (cut(whole, begin + len(leak) - 1), 0),
        "three shards": (cut(whole, begin + 2, begin + 4), 0),
        "five shards": (cut(whole, begin, begin + 1, begin + 3, begin + 4), 1),
        "end of the stream, in two": (cut(np.concatenate((before, after, leak)), begin + len(after) + 3), 0),
    }[where]


@pytest.mark.parametrize("where", ["first", "start", "middle", "shard of its own", "end of a shard", "very end",
                                   "two shards", "after its BOS", "last token apart", "three shards", "five shards",
                                   "end of the stream, in two"])
def test_a_validation_document_in_training_data_is_found(tmp_path, where):
    shards, culprit = plant(where)
    config = fill(tmp_path, shards, np.concatenate(VALIDATION))
    text = refused(config)
    assert f"fineweb_train_{culprit:06}.bin: 1 of 12 validation documents" in text and "MAX_LEAKED_DOCUMENTS=1" in text
    accepted = open_dataset(Config(**{**vars(config), "max_leaked_documents": 1}), one_world())
    assert accepted.leaked_documents == 1


@given(st.permutations(range(30)), st.sets(st.integers(1, 500), max_size=6), st.integers(0, 11))
def test_a_leak_is_found_wherever_shards_are_cut(order, cuts, leaked):
    documents = [*TRAINING[:29], VALIDATION[leaked]]
    tokens = np.concatenate([documents[i] for i in order]).astype(np.uint16)
    stream = memory_stream(*np.split(tokens, sorted(cut for cut in cuts if cut < len(tokens))))
    val = np.concatenate(VALIDATION).astype(np.uint16)
    bounds = document_bounds(val)
    keys = np.unique(train_gpt.document_keys(val, bounds))
    digests = {train_gpt.digest(val[a:b]) for a, b in zip(bounds[:-1], bounds[1:])}
    scans = [scan_shard(stream, i, keys, digests, 33, [16]) for i in range(len(stream.shards))]
    assert set().union(*(scan.leaked for scan in scans)) == {train_gpt.digest(VALIDATION[leaked].astype(np.uint16))}


def test_every_leaked_document_counts_once(tmp_path):
    shards = [np.concatenate([*TRAINING[:5], *VALIDATION[2:5], VALIDATION[2]]), np.concatenate(VALIDATION[4:6])]
    assert "4 of 12 validation documents" in refused(fill(tmp_path, shards, np.concatenate(VALIDATION)))


def test_documents_that_differ_in_one_token_are_no_leak(tmp_path):
    """Every place, also those that the cheap key does not look at, and prefixes and continuations."""
    near = []
    for document in VALIDATION[:4]:
        for place in range(1, len(document)):
            near.append(document.copy())
            near[-1][place] = 2 + (document[place] - 1) % (VOCAB - 2)
        near += [document[:-1], np.append(document, 5), np.delete(document, 3)]
    dataset = open_dataset(fill(tmp_path, [np.concatenate(near)], np.concatenate(VALIDATION)), one_world())
    assert dataset.leaked_documents == 0


def test_empty_documents_are_no_leak(tmp_path):
    config = fill(tmp_path, [np.concatenate(([BOS], *TRAINING, [BOS]))], np.concatenate(([BOS], *VALIDATION, [BOS])))
    assert open_dataset(config, one_world()).leaked_documents == 0


# --- the folder
def test_the_dataset_tells_what_it_read(tmp_path):
    val = np.concatenate(VALIDATION)
    config = fill(tmp_path, [np.concatenate(TRAINING[:9]), np.concatenate(TRAINING[9:])], val,
                  np.where(val == BOS, 0, val % 7))
    dataset = open_dataset(config, one_world())
    assert np.array_equal(dataset.val_tokens, val) and dataset.val_tokens.dtype == np.uint16
    assert np.array_equal(dataset.val_bytes, np.where(val == BOS, 0, val % 7)[1:]) and dataset.val_bytes.dtype == int
    assert len(dataset.train) == sum(map(len, TRAINING)) and dataset.tokenizer_sha256 == ""
    assert len(dataset.fingerprint) == 64 and dataset.leaked_documents == 0


def test_the_fingerprint_depends_on_every_token(tmp_path):
    train, val = [np.concatenate(TRAINING[:9]), np.concatenate(TRAINING[9:])], np.concatenate(VALIDATION)
    sidecar = np.where(val == BOS, 0, 2)
    original = open_dataset(fill(tmp_path / "0", train, val, sidecar), one_world()).fingerprint
    assert open_dataset(fill(tmp_path / "1", train, val, sidecar), one_world()).fingerprint == original
    seen, different = {original}, 1
    for part, array in enumerate((*train, val, sidecar)):
        for place in (3, len(array) // 2, len(array) - 1):
            changed = [x.copy() for x in (*train, val, sidecar)]
            changed[part][place] = 1 + changed[part][place] % (VOCAB - 2)
            if part < 3 or val[place] != BOS:
                folder, different = tmp_path / f"changed{part}-{place}", different + 1
                seen.add(open_dataset(fill(folder, changed[:2], *changed[2:]), one_world()).fingerprint)
    seen.add(open_dataset(fill(tmp_path / "swapped", train[::-1], val, sidecar), one_world()).fingerprint)
    assert len(seen) == different + 1 >= 13, "two different data sets have one fingerprint"


def test_missing_kinds_of_shards_are_named(tmp_path):
    config = fill(tmp_path / "data", [TRAINING[0]], VALIDATION[0])
    for name, kind in (("fineweb_train_000000.bin", "train"), ("fineweb_val_000000.bin", "val")):
        path = tmp_path / "data" / name
        path.rename(tmp_path / "away")
        assert f"no fineweb_{kind}_*.bin" in refused(config) and str(tmp_path) in refused(config)
        (tmp_path / "away").rename(path)
    open_dataset(config, one_world())
    text = refused(Config(**{**vars(config), "data_path": str(tmp_path / "nowhere")}))
    assert "nowhere: no such folder" in text and "prepare.py" in text


def test_a_sidecar_is_never_read_as_tokens(tmp_path):
    for name in ("train_000001", "train_000000", "val_000001", "val_bytes_000001", "val_000000", "val_bytes_000000"):
        (tmp_path / f"fineweb_{name}.bin").touch()
    (tmp_path / "fineweb_val_000000.bin.xz").touch()
    names = [[path.name[8:-4] for path in paths] for paths in find_shards(tmp_path)]
    assert names == [["train_000000", "train_000001"], ["val_000000", "val_000001"],
                     ["val_bytes_000000", "val_bytes_000001"]]
    (tmp_path / "fineweb_val_000001.bin").unlink()
    with pytest.raises(UserError, match="1 validation shards, 2 byte sidecars"):
        find_shards(tmp_path)
    (tmp_path / "fineweb_val_000000.bin").unlink()
    with pytest.raises(UserError, match="no fineweb_val_"):
        find_shards(tmp_path)


def test_tokens_outside_the_vocabulary_are_refused_with_the_shard(tmp_path):
    config = fill(tmp_path, [TRAINING[0], np.append(TRAINING[1], VOCAB)], VALIDATION[0])
    assert f"fineweb_train_000001.bin: holds token {VOCAB}, outside VOCAB_SIZE={VOCAB}" in refused(config)
    config = fill(tmp_path, [TRAINING[0], TRAINING[1]], np.append(VALIDATION[0], VOCAB + 5))
    assert f"fineweb_val_000000.bin: holds token {VOCAB + 5}, outside VOCAB_SIZE={VOCAB}" in refused(config)


def test_a_single_validation_token_cannot_be_scored(tmp_path):
    assert "no target to score" in refused(fill(tmp_path, [TRAINING[0]], [BOS]))


def test_a_broken_shard_is_refused_with_its_name(tmp_path):
    config = fill(tmp_path, [TRAINING[0], TRAINING[1]], VALIDATION[0])
    path = tmp_path / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert f"{path}: " in refused(config) and "truncated" in refused(config)


def test_relative_paths_are_found_below_the_folders_of_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_gpt.resolve_path("tests") == Path(train_gpt.__file__).resolve().parent / "tests"
    (tmp_path / "tests").mkdir()
    assert train_gpt.resolve_path("tests") == Path("tests")
    assert train_gpt.resolve_path("nowhere/at/all") == Path("nowhere/at/all")


# --- bytes of text
TEXTS = ["The cat sat on the mat, and 12 dogs saw it.", " leading space", "  two leading", "trailing space ", "", " ",
         "line one\nline two\n\n\ttab", "caf\u00e9 na\u00efve \u20ac12 \U0001f600 \u4f60\u597d", "a", "\u20ac", "  ",
         "UPPER lower MiXed", "many    spaces   inside", "zzzqqqxxx \u0416\u0416", "the the the the"] + [
    f"document {i} tells the story of the {word} that went to the market.\n" * 3
    for i, word in enumerate(("cat", "dog", "horse", "snake", "bird", "fish", "mouse", "lion"))]


def train_tokenizer(texts=TEXTS, vocab_size: int = 400, **options) -> bytes:
    """A small SentencePiece model with the options of data/prepare.py."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3), model_writer=model, vocab_size=vocab_size, **{
            "model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
            "split_by_whitespace": False, "character_coverage": 0.98, "pad_id": 0, "bos_id": 1, "eos_id": 2,
            "unk_id": 3, "num_threads": 1, "minloglevel": 2, "hard_vocab_limit": False, **options})
    return model.getvalue()


MODELS = {"plain": {}, "dummy prefix": {"add_dummy_prefix": True, "split_by_whitespace": True},
          "published": {"add_dummy_prefix": True, "normalization_rule_name": "nmt_nfkc", "split_by_whitespace": True,
                        "remove_extra_whitespaces": True, "allow_whitespace_only_pieces": False},
          "no byte fallback": {"byte_fallback": False, "character_coverage": 1.0}}


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {name: train_tokenizer(**options) for name, options in MODELS.items()}


def processor(model: bytes):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def encode(tokenizer, texts) -> np.ndarray:
    return np.concatenate([[BOS, *tokenizer.encode(text)] for text in texts]).astype(np.uint16)


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_of_the_decoded_text(models, name):
    tokenizer = processor(models[name])
    tokens = encode(tokenizer, TEXTS)
    counts = table_bytes(tokens, tokenizer)
    assert counts.shape == (len(tokens) - 1,) and (counts >= 0).all() and not counts[tokens[1:] == BOS].any()
    bounds = document_bounds(tokens)
    assert len(bounds) == len(TEXTS) + 1
    for text, start, end in zip(TEXTS, bounds[:-1], bounds[1:]):
        decoded = tokenizer.decode(tokens[start + 1:end].tolist())
        if name != "published":
            assert decoded == text  # then the sum is that of the original text
        assert counts[start:end - 1].sum() == len(decoded.encode())


def test_a_space_that_the_tokenizer_put_before_the_text_is_free(models):
    tokenizer = processor(models["dummy prefix"])
    piece = next(i for i in range(260, tokenizer.vocab_size()) if tokenizer.id_to_piece(i) == "\u2581the")
    assert table_bytes(np.array([BOS, piece, piece, BOS, piece], np.uint16), tokenizer).tolist() == [3, 4, 0, 3]


CHARACTERS = st.text(st.sampled_from(list("the cat og   \n\t12aE\u20ac\u00e9\U0001f600\u4f60")), max_size=20)


@given(st.lists(CHARACTERS, min_size=1, max_size=12))
def test_bytes_of_any_text_add_up(texts):
    for name in ("plain", "dummy prefix"):
        tokenizer = cached_processor(name)
        tokens = encode(tokenizer, [*texts, "end"])
        assert table_bytes(tokens, tokenizer).sum() == sum(len(text.encode()) for text in texts) + 3


CACHE: dict = {}


def cached_processor(name: str):
    """For tests that hypothesis calls many times, where fixtures of a function cannot be used."""
    if name not in CACHE:
        CACHE[name] = processor(train_tokenizer(**MODELS[name]))
    return CACHE[name]


def write_text_data(folder: Path, model: bytes) -> Config:
    """Shards of TEXTS and their tokenizer, without a sidecar."""
    tokenizer = processor(model)
    write(folder / "fineweb_train_000000.bin", encode(tokenizer, ["completely other words"] * 20))
    write(folder / "fineweb_val_000000.bin", encode(tokenizer, TEXTS))
    (folder / "tokenizer.model").write_bytes(model)
    return Config(data_path=str(folder), tokenizer_path=str(folder / "tokenizer.model"), micro_batch_tokens=64,
                  vocab_size=tokenizer.vocab_size(), train_batch_tokens=64)


def changed(config: Config, **values) -> Config:
    return Config(**{**vars(config), **values})


def test_the_dataset_counts_bytes_with_the_tokenizer(tmp_path, models):
    config = write_text_data(tmp_path, models["plain"])
    dataset = open_dataset(config, one_world())
    assert dataset.val_bytes.sum() == sum(len(text.encode()) for text in TEXTS)
    assert dataset.tokenizer_sha256 == hashlib.sha256(models["plain"]).hexdigest()


def test_wrong_tokenizers_are_refused(tmp_path, models):
    config = write_text_data(tmp_path, models["plain"])
    path = tmp_path / "tokenizer.model"
    assert "VOCAB_SIZE=4000" in refused(changed(config, vocab_size=4000))
    assert "no such file" in refused(changed(config, tokenizer_path=str(tmp_path / "none.model")))
    small = train_tokenizer(vocab_size=300)
    for model, complaint in ((b"no model" * 9, "not a SentencePiece model"), (b"", "has 0 pieces"),
                             (small, f"has 300 pieces, VOCAB_SIZE={config.vocab_size}"),
                             (train_tokenizer(bos_id=2, eos_id=1), "its BOS is 2")):
        path.write_bytes(model)
        assert complaint in refused(config)
    letters = write_text_data(tmp_path, train_tokenizer(vocab_size=300, byte_fallback=False, character_coverage=1.0))
    assert letters.vocab_size == 300
    path.write_bytes(small)  # whose first pieces are bytes
    assert "TOKENIZER_PATH does not fit these shards" in refused(letters)


def test_a_tokenizer_that_would_cut_the_text_differently_is_refused(tmp_path, models):
    """Table and decoder agree for any model; that its own encoding is another one tells that it did not make them.

    Not certain: a model whose merges agree passes, and a missing manifest is why the log warns.
    """
    config = write_text_data(tmp_path, models["plain"])
    tokenizer = processor(models["plain"])
    letters = [[BOS, *(i for letter in text for i in tokenizer.encode(letter))] for text in TEXTS]
    write(tmp_path / "fineweb_val_000000.bin", np.concatenate(letters))
    assert "encodes" in (complaint := refused(config)) and "TOKENIZER_PATH" in complaint


def test_an_unknown_tokenizer_file_is_only_needed_without_a_sidecar(tmp_path, models):
    config = changed(write_text_data(tmp_path, models["plain"]), tokenizer_path="", data_dir=str(tmp_path / "none"))
    assert "no such file, but it counts the bytes" in refused(config)
    val = read_shard(tmp_path / "fineweb_val_000000.bin")
    write(tmp_path / "fineweb_val_bytes_000000.bin", np.where(val == BOS, 0, 1))
    assert open_dataset(config, one_world()).val_bytes.sum() == (val != BOS).sum()


def test_the_sidecar_is_checked_against_the_tokenizer(tmp_path, models):
    config = write_text_data(tmp_path, models["plain"])
    val = np.array(read_shard(tmp_path / "fineweb_val_000000.bin"))
    right = np.concatenate(([0], table_bytes(val, processor(models["plain"]))))
    path = tmp_path / "fineweb_val_bytes_000000.bin"
    write(path, right)
    assert np.array_equal(open_dataset(config, one_world()).val_bytes, right[1:])
    shifted, doubled = np.where(val == BOS, 0, np.roll(right, 1)), 2 * right
    spaced = np.array([processor(models["plain"]).id_to_piece(int(i)).startswith(SPACE) for i in val])
    for wrong, complaint in ((right[:-1], f"{len(val) - 1} counts, {len(val)} tokens"),
                             (right + (val == BOS), "counts bytes for BOS"), (shifted, "does not belong to these"),
                             (doubled, "does not belong to these"), (val, "counts bytes for BOS"),
                             (right + spaced, "does not belong to these")):  # each space counted twice (PR #1719)
        write(path, wrong)
        assert complaint in refused(config), complaint


@pytest.mark.parametrize("documents", [1, 2, 100])
def test_a_part_of_the_validation_documents(tmp_path, documents):
    """The first ones, each with the token behind it as its last target; what trains is as before."""
    val = np.concatenate(VALIDATION)
    config = fill(tmp_path, [np.concatenate(TRAINING)], val, np.where(val == BOS, 0, val % 7))
    whole, part = open_dataset(config, one_world()), open_dataset(changed(config, val_docs=documents), one_world())
    end = sum(map(len, VALIDATION[:documents]))
    assert np.array_equal(part.val_tokens, whole.val_tokens[:end + 1])
    assert np.array_equal(part.val_bytes, whole.val_bytes[:end]) and len(part.val_tokens) == len(part.val_bytes) + 1
    assert (part.fingerprint == whole.fingerprint) == (documents > len(VALIDATION))
    assert len(part.train) == len(whole.train) and part.max_segments == whole.max_segments


# --- the proxy corpus
def test_the_proxy_corpus_is_read_as_published(tmp_path, corpus_dir):
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        with lzma.open(corpus_dir / f"{name}.xz") as source, open(tmp_path / name, "wb") as target:
            shutil.copyfileobj(source, target)
    with lzma.open(corpus_dir / "fineweb_train_000000.bin.xz") as source:
        write(tmp_path / "fineweb_train_000000.bin", np.frombuffer(source.read(1024 + 2 * 200_000)[1024:], "<u2"))
    tokenizer = corpus_dir.parent / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    dataset = open_dataset(Config(data_path=str(tmp_path), tokenizer_path=str(tokenizer)), one_world())
    assert len(dataset.val_tokens) == 986_379 and dataset.val_bytes.sum() == 3_081_622
    assert len(document_bounds(dataset.val_tokens)) - 1 == 1_140 and dataset.leaked_documents == 0
