"""Paths, one thread, the packed program, and the marks of all tests."""
import hashlib
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools", ROOT / "data"):
    sys.path.insert(0, str(folder))
torch.set_num_threads(1)  # the tests themselves run side by side
import pack  # noqa: E402


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` need one."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def no_waiting_for_the_disk():
    """Runs in this process do not wait for the disk, which kill -9 does not need: hundreds of files are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def registries(monkeypatch):
    """What bench/ registers in the program is taken back afterwards -> monkeypatch."""
    import train_gpt

    for name in ("QUANTIZERS", "CODECS", "SIDE_CODECS", "CHOICES"):
        monkeypatch.setattr(train_gpt, name, dict(getattr(train_gpt, name)))
    return monkeypatch


@pytest.fixture(scope="session")
def packed_program(tmp_path_factory) -> Path:
    """The packed train_gpt.py, alone in its folder: packed once, by the first of the processes that run tests."""
    source = (ROOT / "train_gpt.py").read_bytes()
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    path = folder / f"packed_{hashlib.sha256(source).hexdigest()[:16]}" / "train_gpt.py"
    if not path.is_file():
        part = tmp_path_factory.mktemp("packed") / "part"
        part.write_bytes(pack.pack(source))
        path.parent.mkdir(exist_ok=True)
        os.replace(part, path)
    return path


@pytest.fixture
def corpus_dir() -> Path:
    """The proxy corpus."""
    path = Path(os.environ.get("TEST_CORPUS_DIR") or "/nonexistent")
    if not path.is_dir():
        pytest.skip("set TEST_CORPUS_DIR to the proxy corpus")
    return path


@pytest.fixture
def published_model(corpus_dir) -> Path:
    """The published CaseOps tokenizer, which lies beside the corpus."""
    path = corpus_dir.parent / "tokenizers" / "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path
