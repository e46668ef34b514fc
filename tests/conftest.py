"""Paths, one thread, and the marks of all tests."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools", ROOT / "data"):
    sys.path.insert(0, str(folder))
torch.set_num_threads(1)  # the tests themselves run side by side


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
