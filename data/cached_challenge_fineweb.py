"""Fetches the published shards and tokenizers of the challenge: the published command line, on huggingface_hub.

    python data/cached_challenge_fineweb.py --variant sp1024 --train-shards 10
    python data/cached_challenge_fineweb.py --variant sp8192_caseops --train-shards 80
    python data/cached_challenge_fineweb.py --list                      # variants of the repository
    python data/cached_challenge_fineweb.py --with-docs                 # the text itself, for data/prepare.py

All files are of one commit, whose manifest is read anew each time. Each is checked against the hash that the
repository tells (SHA-256, or git's for small files) before it gets its name, and so is what was there before. A broken
or interrupted transfer goes on where it stopped, also in a later run. Variables: MATCHED_FINEWEB_REPO_ID and
MATCHED_FINEWEB_REMOTE_ROOT_PREFIX name another repository and folder in it; HF_ENDPOINT a mirror; HF_TOKEN a token.
"""
import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import prepare
from huggingface_hub import errors
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

REPO_ID, CASEOPS_REPO_ID = "willdepueoai/parameter-golf", "romeerp/parameter-golf-caseops-v1"
ROOT_PREFIX = "datasets"
HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 20  # for the first answer of the hub
TRIES = 2  # transfers of a file whose hash is wrong
MIN_FREE_BYTES = 64 << 20  # that stay on the disk
POLL_SECONDS = 0.5


class Remote(NamedTuple):
    """A file of the repository."""

    path: str
    size: int
    sha256: str | None  # of large files
    git_sha1: str  # of small ones: over "blob SIZE\0" and the bytes

    def matches(self, path: Path) -> bool:
        """Whether a local file has this size and content."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256:
            return prepare.file_sha256(path) == self.sha256
        data = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == self.git_sha1


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Turns what the hub's library raises into InputError. Which HTTP library it uses, and its errors, has changed."""
    try:
        yield
    except (prepare.InputError, Stopped):
        raise
    except errors.GatedRepoError:
        raise prepare.InputError(f"{what}: access is restricted; ask for it there, and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise prepare.InputError(f"{what}: no such repository, or a private one; set MATCHED_FINEWEB_REPO_ID, or "
                                 "HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise prepare.InputError(f"{what}: no such --revision; leave it away for the newest") from None
    except errors.EntryNotFoundError:
        raise prepare.InputError(f"{what}: not in the repository; set MATCHED_FINEWEB_REMOTE_ROOT_PREFIX or another "
                                 "--revision") from None
    except errors.HFValidationError as error:
        raise prepare.InputError(f"MATCHED_FINEWEB_REPO_ID: {str(error).splitlines()[0]}; set it to OWNER/NAME"
                                 ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise  # of this machine's disk
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise prepare.InputError(f"{what}: cannot be fetched ({reason}); check the network, or set HF_ENDPOINT to a "
                                 "mirror, and start again: it goes on with what is here") from None


class Hub:
    """One commit of a dataset repository."""

    def __init__(self, repo_id: str, revision: str | None):
        self.repo_id, self.endpoint = repo_id, os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
        self.api = huggingface_hub.HfApi(endpoint=self.endpoint)
        with telling(f"{repo_id}{f' at {revision}' if revision else ''}"):
            info = self.api.dataset_info(repo_id, revision=revision, timeout=TIMEOUT_SECONDS)
        assert info.sha is not None
        self.commit = info.sha

    def files(self, folder: str) -> dict[str, Remote]:
        """The files directly in a folder, by name."""
        found = {}
        with telling(f"{self.repo_id}: {folder or 'its files'}"):
            for item in self.api.list_repo_tree(self.repo_id, folder or None, revision=self.commit,
                                                repo_type="dataset"):
                if isinstance(item, huggingface_hub.RepoFile):
                    sha256 = item.lfs.sha256 if item.lfs else None
                    found[Path(item.path).name] = Remote(item.path, item.size, sha256, item.blob_id)
        return found

    def get(self, remote: Remote, part: "Part") -> None:
        """Appends what is missing of a file to its part."""
        url = huggingface_hub.hf_hub_url(self.repo_id, remote.path, repo_type="dataset", revision=self.commit,
                                         endpoint=self.endpoint)
        with telling(f"{self.repo_id}: {remote.path}"):
            http_get(url, part, resume_size=part.tell(), headers=build_hf_headers(), expected_size=remote.size)


# ------------------------------------------------------------------------------------------------ transfers
class Stopped(Exception):
    """Another transfer failed, or the user interrupted."""


class Part(io.BufferedWriter):
    """A file to append to that counts its bytes and can be stopped from outside."""

    def __init__(self, path: Path, stop: threading.Event, count: Callable[[int], None]):
        super().__init__(io.FileIO(path, "ab"))
        self.stop, self.count = stop, count

    def write(self, data: Any) -> int:
        if self.stop.is_set():
            raise Stopped
        self.count(len(data))
        return super().write(data)


class Task(NamedTuple):
    remote: Remote
    local: Path


def part_of(task: Task, folder: Path) -> Path:
    """The name of a file on its way says what it will be: another version of it has another."""
    return folder / f"{task.remote.sha256 or task.remote.git_sha1}.part"


class Transfers:
    """Fetches files side by side; all that arrived is counted for the progress."""

    def __init__(self, hub: Hub, folder: Path):
        self.hub, self.folder = hub, folder
        self.stop, self.lock, self.bytes = threading.Event(), threading.Lock(), 0

    def count(self, size: int) -> None:
        with self.lock:
            self.bytes += size

    def fetch(self, task: Task) -> None:
        """InputError for a content that stays wrong, which is not kept."""
        part = part_of(task, self.folder)
        for _ in range(TRIES):
            if part.exists() and part.stat().st_size > task.remote.size:
                part.unlink()
            with Part(part, self.stop, self.count) as file:
                self.hub.get(task.remote, file)
            if task.remote.matches(part):
                task.local.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, task.local)
                return
            part.unlink()
        raise prepare.InputError(f"{task.remote.path}: its hash is not the one that {self.hub.repo_id} tells, "
                                 f"{TRIES} times; the mirror or the network alters it: set another HF_ENDPOINT")

    def run(self, tasks: list[Task], workers: int) -> None:
        """Fetches all; the first error stops the others, whose parts stay."""
        progress = prepare.Progress("fetch", sum(task.remote.size for task in tasks))
        self.bytes = sum(part.stat().st_size for part in (part_of(task, self.folder) for task in tasks)
                         if part.exists())
        pool = ThreadPoolExecutor(workers)
        try:
            waiting: set[Future[None]] = {pool.submit(self.fetch, task) for task in tasks}
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS)
                progress.reach(min(self.bytes, progress.total_bytes))
                for future in done:
                    future.result()
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)
            progress.close()


def check_space(tasks: Iterable[Task], folder: Path, out: Path) -> None:
    """InputError where the disk cannot hold what is missing."""
    missing = 0
    for task in tasks:
        part = part_of(task, folder)
        missing += task.remote.size - (part.stat().st_size if part.exists() else 0)
    free = shutil.disk_usage(out).free
    if missing + MIN_FREE_BYTES > free:
        raise prepare.InputError(f"{out}: {missing:,} bytes are missing and {free:,} are free there; free the space, "
                                 "take fewer --train-shards, or another --out")


# ------------------------------------------------------------------------------------------------ manifest -> files
class Plan(NamedTuple):
    """What a variant consists of."""

    folder: str  # of the dataset, below datasets/
    tasks: list[Task]
    tokenizer: str  # file name of the SentencePiece model, below tokenizers/


def read_manifest(hub: Hub, prefix: str, out: Path, files: dict[str, Remote]) -> dict[str, Any]:
    """Fetches manifest.json anew. InputError where it is missing or not one."""
    name = f"{hub.repo_id}: {prefix}/manifest.json"
    if "manifest.json" not in files:
        raise prepare.InputError(f"{name}: not in the repository; set MATCHED_FINEWEB_REMOTE_ROOT_PREFIX to the folder "
                                 "that holds it")
    local, parts = out / "manifest.json", out / ".downloads"
    parts.mkdir(parents=True, exist_ok=True)
    if not files["manifest.json"].matches(local):
        Transfers(hub, parts).fetch(Task(files["manifest.json"], local))
    try:
        manifest = json.loads(local.read_bytes())
        if all(isinstance(entry["name"], str) for kind in ("datasets", "tokenizers") for entry in manifest[kind]):
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise prepare.InputError(f"{name}: not a list of datasets and tokenizers; set another --revision")


def variants(manifest: dict[str, Any]) -> list[str]:
    return [entry["name"].removeprefix("fineweb10B_") for entry in manifest["datasets"]]


def find_entry(manifest: dict[str, Any], variant: str, hub: Hub) -> dict[str, Any]:
    """The dataset of a variant. InputError with what there is."""
    published = variant.replace(f"_{prepare.CASEOPS}", prepare.PUBLISHED_CASEOPS)
    for name in (variant, published):
        for entry in manifest["datasets"]:
            if entry["name"] in (name, f"fineweb10B_{name}"):
                return entry
    raise prepare.InputError(f"--variant {variant}: {hub.repo_id} has {', '.join(variants(manifest)) or 'none'}; take "
                             "one of them, or set MATCHED_FINEWEB_REPO_ID to a repository that has it")


def shard_names(files: dict[str, Remote], entry: dict[str, Any], train_shards: int, where: str) -> list[str]:
    """The names of N training shards and of all validation files. InputError where manifest and files disagree."""
    stats = entry.get("stats") or {}
    count = {kind: len([name for name in files if re.fullmatch(rf"fineweb_{kind}_\d+\.bin", name)])
             for kind in ("train", "val", "val_bytes")}
    promised = {kind: int(stats.get(f"files_{kind}", count[kind])) for kind in ("train", "val")}
    if train_shards > promised["train"]:
        raise prepare.InputError(f"--train-shards {train_shards}: {where} has {promised['train']}; take at most that")
    if not count["val"] or count["val"] != promised["val"] or count["val_bytes"] not in (0, count["val"]):
        raise prepare.InputError(f"{where}: {count['val']} validation shards with {count['val_bytes']} byte sidecars, "
                                 f"the manifest says {promised['val']}: it is stale; set another --revision")
    names = [f"fineweb_{kind}_{i:06d}.bin" for kind, number in
             (("val", count["val"]), ("val_bytes", count["val_bytes"]), ("train", train_shards)) for i in range(number)]
    for name in names:
        if name not in files:
            raise prepare.InputError(f"{where}/{name}: not in the repository, but the manifest promises "
                                     f"{promised['train']} training shards: it is stale; take fewer --train-shards, or "
                                     "set another --revision")
    return names


def make_plan(hub: Hub, manifest: dict[str, Any], prefix: str, config: argparse.Namespace) -> Plan:
    """Everything that a variant needs, as files to fetch."""
    entry = find_entry(manifest, config.variant, hub)
    remote_folder = Path(prefix, "datasets", entry["name"]).as_posix()
    files = hub.files(remote_folder)
    folder = f"fineweb10B_{config.variant.removeprefix('fineweb10B_')}"
    tasks = [Task(files[name], config.out / "datasets" / folder / name)
             for name in shard_names(files, entry, config.train_shards, f"{hub.repo_id}: {remote_folder}")]
    tokenizer = next((item for item in manifest["tokenizers"] if item["name"] == entry.get("tokenizer_name")), {})
    paths = [str(tokenizer[key]) for key in ("model_path", "vocab_path", "path") if tokenizer.get(key)]
    if not paths:
        raise prepare.InputError(f"{hub.repo_id}: its manifest names no tokenizer for {entry['name']}: it is stale; "
                                 "set another --revision")
    models = hub.files(Path(prefix, paths[0]).parent.as_posix())
    for path in paths:
        name = Path(path).name
        if name not in models:
            raise prepare.InputError(f"{hub.repo_id}: {path}: the manifest names it, but it is not there; set another "
                                     "--revision")
        tasks.append(Task(models[name], config.out / "tokenizers" / name))
    model = next((Path(path).name for path in paths if path.endswith(".model")), f"fineweb_{prepare.BYTE260}.model")
    return Plan(folder, tasks, model)


def missing(tasks: list[Task], workers: int) -> list[Task]:
    """The tasks whose local file is not there, or is another one; hashes what is there."""
    with ThreadPoolExecutor(workers) as pool:
        have = list(pool.map(lambda task: task.remote.matches(task.local), tasks))
    wanted = [task for task, ok in zip(tasks, have, strict=True) if not ok]
    for task in wanted:
        if task.local.exists():
            print(f"{task.local}: damaged, or of another version: fetching it again", flush=True)
    return wanted


def fetch_all(hub: Hub, tasks: list[Task], config: argparse.Namespace) -> None:
    """Makes every local file what the repository holds."""
    folder = config.out / ".downloads"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = missing(tasks, config.workers)
    size = sum(task.remote.size for task in wanted)
    print(f"{hub.repo_id} at {hub.commit[:12]}: {len(tasks) - len(wanted)} of {len(tasks)} files are here, {size:,} "
          "bytes to fetch", flush=True)
    check_space(wanted, folder, config.out)
    Transfers(hub, folder).run(wanted, config.workers)
    with contextlib.suppress(OSError):  # parts of other versions or runs may be in it
        folder.rmdir()


# ------------------------------------------------------------------------------------------------ the command
def download(config: argparse.Namespace) -> None:
    """InputError for what the user can repair."""
    default = CASEOPS_REPO_ID if prepare.CASEOPS in config.variant else REPO_ID
    prefix = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", ROOT_PREFIX).strip("/")
    hub = Hub(os.environ.get("MATCHED_FINEWEB_REPO_ID", default), config.revision)
    top = hub.files(prefix)
    manifest = read_manifest(hub, prefix, config.out, top)
    if config.list:
        print("\n".join(variants(manifest)))
        return
    if config.with_docs:
        names = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
        if names[0] not in top:
            raise prepare.InputError(f"{hub.repo_id}: {prefix}/{names[0]}: not in the repository; leave --with-docs "
                                     "away")
        fetch_all(hub, [Task(top[name], config.out / name) for name in names if name in top], config)
        print(f"make data with: python data/prepare.py {config.out / names[0]} --like fineweb")
        return
    plan = make_plan(hub, manifest, prefix, config)
    fetch_all(hub, plan.tasks, config)
    folder, path = config.out / "datasets" / plan.folder, config.out / "tokenizers" / plan.tokenizer
    if plan.tokenizer == f"fineweb_{prepare.BYTE260}.model":
        prepare.write_atomic(path, prepare.byte260_model())
    here = {task.local for task in plan.tasks}
    if more := [local for local in folder.glob("fineweb_*.bin") if local not in here]:
        print(f"{folder}: {len(more)} more shards are there and will be read too, such as {min(more).name}; remove "
              "them if they are not of this version")
    size = prepare.load_tokenizer(path.read_bytes(), str(path)).vocab_size()
    print(f"check with: python data/verify.py {folder} --tokenizer {path}")
    print(f"train with: DATA_PATH={folder} TOKENIZER_PATH={path} VOCAB_SIZE={size}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = prepare.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("shards", nargs="?", type=int, metavar="N", help="the same as --train-shards N")
    add("--variant", default="sp1024", help="sp1024, sp4096, sp8192, byte260, sp8192_caseops, or another one of the "
        "repository's manifest (default: %(default)s)")
    add("--train-shards", type=int, default=80, metavar="N", help="the first N training shards, of 100 million tokens "
        "each; validation is always whole (default: %(default)s)")
    add("--with-docs", action="store_true", help="fetch the text, docs_selected.jsonl (46 GB), in place of shards")
    add("--list", action="store_true", help="print the variants of the repository")
    add("--revision", help="branch, tag or commit (default: the newest)")
    add("--out", type=Path, default=HERE, help="folder of datasets/ and tokenizers/ (default: that of this file)")
    add("--workers", type=prepare.positive, default=8, help="files at a time (default: %(default)s)")
    config = parser.parse_args(arguments)
    config.train_shards = config.train_shards if config.shards is None else config.shards
    if config.train_shards < 1:
        parser.error(f"--train-shards {config.train_shards}: must be at least 1")
    if not re.fullmatch(r"\w[\w.-]*", config.variant):
        parser.error(f"--variant {config.variant}: letters, digits, '.', '_' and '-' only")
    return config


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a mistake of the user, of the network or of the disk, 130 interrupted."""
    config = parse_arguments(arguments)
    huggingface_hub.logging.set_verbosity_error()  # it speaks of every broken connection
    huggingface_hub.utils.disable_progress_bars()
    try:
        download(config)
    except prepare.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or config.out}: {error.strerror or error}; free space or the permission, or "
              "take another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues with what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
