"""data/cached_challenge_fineweb.py against a server on this machine that answers as the hub does."""
import contextlib
import hashlib
import http.server
import io
import json
import re
import shutil
import threading
import urllib.parse

import cached_challenge_fineweb as program_under_test
import huggingface_hub
import numpy as np
import prepare
import pytest
import sentencepiece
import verify
from program import free_port, write_tokens
from test_prepare import REAL, make, write_jsonl

import train_gpt

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")
COMMIT, OLD_COMMIT = "a" * 40, "b" * 40
PUBLISHED = "sp400_lossless_caps_caseops_v1_reserved"


class Hub(http.server.ThreadingHTTPServer):
    """A dataset repository and what is wrong with it. Files over 1,000 bytes are large ones, which have a SHA-256."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.revisions: dict[str, dict[str, bytes]] = {"main": {}, COMMIT: {}}
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.tokens: set[str | None] = set()
        self.cut: dict[str, int] = {}  # path -> the connection ends after so many bytes of the file
        self.cuts = 10**9  # connections that are cut
        self.altered: dict[str, int] = {}  # path -> answers with another content
        self.together: threading.Barrier | None = None  # transfers of shards that must be under way at once
        self.repo_id = "someone/golf"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, files: dict[str, bytes]) -> None:
        self.revisions["main"].update(files)
        self.revisions[COMMIT] = self.revisions["main"]

    def transfers(self, word: str = "") -> list[str]:
        return [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path and word in path]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, body: bytes = b"", **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.requests.append((self.command, path, self.headers.get("Range", "")))
        hub.tokens.add(self.headers.get("Authorization"))
        repo = re.escape(hub.repo_id)
        if found := re.fullmatch(rf"/api/datasets/{repo}(?:/revision/([^/]+))?", path):
            if (found[1] or "main") not in hub.revisions:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            commit = {"main": COMMIT, None: COMMIT}.get(found[1], found[1])
            return self.answer(200, json.dumps({"id": hub.repo_id, "sha": commit, "siblings": []}).encode())
        if found := re.fullmatch(rf"/api/datasets/{repo}/tree/([^/]+)/?(.*)", path):
            return self.tree(hub.revisions[found[1]], found[2])
        if found := re.fullmatch(rf"/datasets/{repo}/resolve/([^/]+)/(.+)", path):
            return self.resolve(hub.revisions[found[1]], found[2])
        return self.answer(401 if path.startswith("/api/") else 404, X_Error_Code="RepoNotFound")

    def tree(self, files: dict[str, bytes], folder: str) -> None:
        start = f"{folder}/" if folder else ""
        items = {}
        for name, data in files.items():
            if name.startswith(start):
                head, _, rest = name[len(start):].partition("/")
                item = {"type": "directory", "path": start + head, "oid": "0" * 40, "size": 0}
                if not rest:
                    item = {"type": "file", "path": name, "size": len(data),
                            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
                    if len(data) > 1000:
                        item["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                items[head] = item
        if not items:
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer(200, json.dumps(list(items.values())).encode())

    def resolve(self, files: dict[str, bytes], path: str) -> None:
        hub, data = self.server, files[path]
        if hub.altered.get(path, 0) > 0:
            hub.altered[path] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if hub.together and "train" in path:
            hub.together.wait(10)
        start = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        part = data[start:]
        if path in hub.cut and len(data) > hub.cut[path] >= start and hub.cuts > 0:
            hub.cuts -= 1
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part[:hub.cut[path] - start])
            self.close_connection = True
            return None
        range_of = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        return self.answer(206 if start else 200, part, **range_of)


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> dict[str, bytes]:
    """The files of a repository: sp400, byte260 and CaseOps of the same text."""
    root = tmp_path_factory.mktemp("remote")
    source = write_jsonl(root / "a.jsonl", REAL[:40])
    kinds = {"sp400": (("--vocab-size", 400), "fineweb_400_bpe.model"),
             PUBLISHED: (("--vocab-size", 400, "--caseops"), f"fineweb_{PUBLISHED[2:5]}_bpe{PUBLISHED[5:]}.model"),
             "byte260": (("--tokenizer", "byte260"), "fineweb_pure_byte_260.json")}
    files, datasets, tokenizers = {"datasets/docs_selected.jsonl": source.read_bytes()}, [], []
    for name, (options, tokenizer) in kinds.items():
        result = make(root / name, source, "--val-docs", 5, "--shard-tokens", 7000, *options)
        for path in result.folder.glob("*.bin"):
            files[f"datasets/datasets/fineweb10B_{name}/{path.name}"] = path.read_bytes()
        files[f"datasets/tokenizers/{tokenizer}"] = result.model.read_bytes() if name != "byte260" else b'{"byte": 4}'
        datasets.append({"name": f"fineweb10B_{name}", "tokenizer_name": name, "stats": {
            f"files_{side}": len(result.manifest[side]["shards"]) for side in ("train", "val")}})
        key = "path" if name == "byte260" else "model_path"
        tokenizers.append({"name": name, key: f"tokenizers/{tokenizer}"})
    files["datasets/manifest.json"] = json.dumps({"datasets": datasets, "tokenizers": tokenizers}).encode()
    return files


@pytest.fixture
def hub(remote, monkeypatch):
    server = Hub()
    server.put(remote)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", server.repo_id)
    monkeypatch.setenv("HF_ENDPOINT", f"{server.endpoint}/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # a chunk that is cut is lost
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(hub, tmp_path):
    """fetch(options) -> exit code, stdout, stderr."""
    def run(*options) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = program_under_test.main([*map(str, options), "--out", str(tmp_path / "data")])
            except SystemExit as stop:
                code = stop.code
        if code:
            assert err.getvalue().count("\n") == 1
        return code, out.getvalue(), err.getvalue()
    return run


def refused(fetch, *options) -> str:
    code, _, err = fetch(*options)
    assert code == 2 and err.startswith("error: "), err
    return err


def change_manifest(hub: Hub, change) -> None:
    manifest = json.loads(hub.revisions["main"]["datasets/manifest.json"])
    change(manifest)
    hub.put({"datasets/manifest.json": json.dumps(manifest).encode()})


SHARD = "datasets/datasets/fineweb10B_sp400/fineweb_train_000001.bin"
FIRST = SHARD.replace("000001", "000000")


# --- what is fetched
@pytest.mark.parametrize("variant, size", [("sp400", 400), ("sp400_caseops", 400), ("byte260", 260), (PUBLISHED, 400)])
def test_a_variant_is_ready_for_the_trainer(hub, fetch, remote, tmp_path, variant, size):
    code, out, err = fetch("--variant", variant, "--train-shards", 2)
    assert (code, err) == (0, "")
    folder = tmp_path / "data" / "datasets" / f"fineweb10B_{variant}"
    source = f"datasets/datasets/fineweb10B_{PUBLISHED if 'caps' in variant or 'ops' in variant else variant}/"
    wanted = {name.removeprefix(source): data for name, data in remote.items() if name.startswith(source) and (
        "train" not in name or name.endswith(("train_000000.bin", "train_000001.bin")))}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == wanted and len(wanted) in (3, 4, 5)
    settings = dict(word.split("=", 1) for word in out.splitlines()[-1].split()[2:])
    assert settings["VOCAB_SIZE"] == str(size) and settings["DATA_PATH"] == str(folder)
    config, _ = train_gpt.Config.from_env(settings)
    world = train_gpt.World(0, 1, train_gpt.torch.device("cpu"), train_gpt.torch.float32)
    fingerprint = train_gpt.open_dataset(config, world).fingerprint
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert verify.main([str(folder), "--workers", "1"]) == 0  # it knows the published names
    assert said.getvalue().splitlines()[-1] == f"data_fingerprint:{fingerprint} {folder}"
    assert not (tmp_path / "data" / ".downloads").exists()


def test_the_published_command_line(fetch, tmp_path):
    """A number without an option, as at first, is the number of shards."""
    assert fetch("--variant", "sp400", 1)[0] == 0
    assert len(list((tmp_path / "data" / "datasets" / "fineweb10B_sp400").glob("*train*"))) == 1


def test_the_default_repositories(monkeypatch):
    monkeypatch.delenv("MATCHED_FINEWEB_REPO_ID", raising=False)
    asked = []
    monkeypatch.setattr(program_under_test, "Hub", lambda repo_id, revision: asked.append(repo_id) or 1 / 0)
    for variant in ("sp1024", "sp8192_caseops", PUBLISHED):
        with pytest.raises(ZeroDivisionError):
            program_under_test.main(["--variant", variant])
    assert asked == ["willdepueoai/parameter-golf"] + 2 * ["romeerp/parameter-golf-caseops-v1"]


def test_variants_are_those_of_the_manifest(fetch):
    code, out, _ = fetch("--list")
    assert code == 0 and out.split() == ["sp400", PUBLISHED, "byte260"]
    error = refused(fetch, "--variant", "sp8192")
    assert f"--variant sp8192: someone/golf has sp400, {PUBLISHED}, byte260; take one of them" in error


def test_the_text_itself(fetch, remote, tmp_path):
    code, out, _ = fetch("--with-docs")
    path = tmp_path / "data" / "docs_selected.jsonl"
    assert code == 0 and path.read_bytes() == remote["datasets/docs_selected.jsonl"]
    assert out.splitlines()[-1].endswith(f"data/prepare.py {path} --like fineweb")


def test_another_folder_of_the_repository(hub, fetch, monkeypatch, remote):
    hub.revisions["main"].clear()
    hub.put({name.replace("datasets/", "my/root/", 1): data for name, data in remote.items()})
    assert "datasets: not in the repository; set MATCHED_FINEWEB_REMOTE_ROOT_PREFIX" in refused(fetch)
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "my/root")
    assert fetch("--variant", "sp400", 1)[0] == 0
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "")
    hub.revisions["main"].clear()
    hub.put({name.replace("datasets/", "", 1): data for name, data in remote.items()})
    assert fetch("--variant", "sp400", 1)[0] == 0


def test_a_revision(hub, fetch, remote, tmp_path):
    old = {**remote, FIRST: remote[FIRST][:-2] + b"xy"}
    hub.revisions[OLD_COMMIT] = old
    path = tmp_path / "data" / FIRST.split("/", 1)[1]
    for options, data in ((("--revision", OLD_COMMIT), old[FIRST]), ((), remote[FIRST])):
        out = fetch("--variant", "sp400", "--train-shards", 1, *options)[1]
        assert path.read_bytes() == data
    assert f"{path}: damaged, or of another version" in out
    assert "someone/golf at v9: no such --revision" in refused(fetch, "--revision", "v9")


def test_a_token_is_sent(hub, fetch, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch("--variant", "sp400", 1)[0] == 0
    assert hub.tokens == {"Bearer hf_secret"}


def test_transfers_run_side_by_side(hub, fetch):
    hub.together = threading.Barrier(2)
    assert fetch("--variant", "sp400", "--train-shards", 2, "--workers", 2)[0] == 0


# --- again
def test_what_is_there_is_not_fetched_again(hub, fetch, tmp_path):
    assert fetch("--variant", "sp400", 1)[0] == 0
    hub.requests.clear()
    code, out, _ = fetch("--variant", "sp400", 2)
    assert code == 0 and [path.rpartition("/")[2] for path in hub.transfers()] == ["fineweb_train_000001.bin"]
    assert "3 of 4 files are here" in out
    out = fetch("--variant", "sp400", 1)[1]
    assert "1 more shards are there and will be read too, such as fineweb_train_000001.bin" in out


def test_damage_is_repaired(hub, fetch, remote, tmp_path):
    assert fetch("--variant", "sp400", 1)[0] == 0
    path = tmp_path / "data" / FIRST.split("/", 1)[1]
    for damaged in (remote[FIRST][:-1], remote[FIRST][:-1] + b"x"):
        path.write_bytes(damaged)
        assert f"{path}: damaged" in fetch("--variant", "sp400", 1)[1]
        assert path.read_bytes() == remote[FIRST]


# --- what goes wrong on the way
def test_a_broken_connection_is_resumed(hub, fetch, remote, tmp_path):
    hub.cut, hub.cuts = {FIRST: 5000}, 1
    assert fetch("--variant", "sp400", 1)[0] == 0
    assert [wanted for _, path, wanted in hub.requests if path.endswith("train_000000.bin")] == ["", "bytes=5000-"]
    assert (tmp_path / "data" / FIRST.split("/", 1)[1]).read_bytes() == remote[FIRST]


def test_a_broken_transfer_goes_on_in_a_later_run(hub, fetch, remote, tmp_path):
    hub.cut = {FIRST: 5000}
    error = refused(fetch, "--variant", "sp400", 1)
    assert f"someone/golf: {FIRST}: cannot be fetched" in error and "it goes on with what is here" in error
    path = tmp_path / "data" / FIRST.split("/", 1)[1]
    part, = (tmp_path / "data" / ".downloads").iterdir()
    assert not path.exists() and part.read_bytes() == remote[FIRST][:5000]
    hub.cut = {}
    hub.requests.clear()
    assert fetch("--variant", "sp400", 1)[0] == 0
    assert [wanted for _, path, wanted in hub.requests if path.endswith("train_000000.bin")] == ["bytes=5000-"]
    assert path.read_bytes() == remote[FIRST]


def test_a_part_that_is_too_long_is_thrown_away(hub, fetch, remote, tmp_path):
    parts = tmp_path / "data" / ".downloads"
    parts.mkdir(parents=True)
    (parts / f"{hashlib.sha256(remote[FIRST]).hexdigest()}.part").write_bytes(remote[FIRST] + b"more")
    assert fetch("--variant", "sp400", 1)[0] == 0
    assert (tmp_path / "data" / FIRST.split("/", 1)[1]).read_bytes() == remote[FIRST]


def test_a_wrong_content_is_fetched_once_more_and_never_kept(hub, fetch, remote, tmp_path):
    path = tmp_path / "data" / FIRST.split("/", 1)[1]
    hub.altered = {FIRST: 2}
    error = refused(fetch, "--variant", "sp400", 1)
    assert f"{FIRST}: its hash is not the one that someone/golf tells, 2 times" in error
    assert not path.exists() and not list((tmp_path / "data" / ".downloads").glob("*.part"))
    hub.altered = {FIRST: 1, "datasets/manifest.json": 0}
    assert fetch("--variant", "sp400", 1)[0] == 0 and path.read_bytes() == remote[FIRST]
    hub.altered = {"datasets/tokenizers/fineweb_pure_byte_260.json": 2}  # a small file: git's hash
    assert "byte_260.json: its hash" in refused(fetch, "--variant", "byte260", 1)


def test_no_network(fetch, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    error = refused(fetch)
    assert error.startswith("error: someone/golf: cannot be fetched (") and "set HF_ENDPOINT to a mirror" in error
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(fetch)


def test_no_repository(fetch, monkeypatch):
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "someone/else")
    assert "error: someone/else: no such repository, or a private one" in refused(fetch)
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", "a/b/c")
    assert "MATCHED_FINEWEB_REPO_ID: " in refused(fetch)


def test_a_full_disk_is_told_before_the_work(hub, fetch, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=program_under_test.MIN_FREE_BYTES + 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = refused(fetch, "--variant", "sp400", "--train-shards", 2)
    assert f"{tmp_path / 'data'}: " in error and f"{usage.free:,} are free there; free the space" in error
    assert not hub.transfers("train")


def test_a_full_disk_is_told_in_the_middle(hub, fetch, monkeypatch):
    write = program_under_test.Part.write

    def fail(part, data):
        if part.tell() > 5000:
            raise OSError(28, "No space left on device")
        return write(part, data)
    monkeypatch.setattr(program_under_test.Part, "write", fail)
    assert "No space left on device; free space" in refused(fetch, "--variant", "sp400", 1)


def test_an_interrupt_is_told_and_the_next_run_goes_on(fetch, monkeypatch):
    def interrupt(waiting, seconds):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(program_under_test, "wait", interrupt)
        code, _, err = fetch("--variant", "sp400", "--train-shards", 2, "--workers", 2)
    assert code == 130 and "the same command continues" in err
    assert fetch("--variant", "sp400", "--train-shards", 2)[0] == 0


def test_a_transfer_that_is_stopped_keeps_its_part(hub, remote, tmp_path):
    transfers = program_under_test.Transfers(program_under_test.Hub(hub.repo_id, None), tmp_path)
    remote_file = transfers.hub.files(FIRST.rpartition("/")[0])[FIRST.rpartition("/")[2]]
    task, count = program_under_test.Task(remote_file, tmp_path / "local"), transfers.count

    def stop_at_3000(size: int) -> None:
        count(size)
        if transfers.bytes >= 3000:
            transfers.stop.set()
    transfers.count = stop_at_3000
    with pytest.raises(program_under_test.Stopped):
        transfers.fetch(task)
    assert program_under_test.part_of(task, tmp_path).read_bytes() == remote[FIRST][:3000]
    assert not task.local.exists()


# --- stale manifests
def test_the_manifest_is_read_anew_each_time(hub, fetch, tmp_path):
    assert fetch("--variant", "sp400", 1)[0] == 0
    change_manifest(hub, lambda manifest: manifest["datasets"][0].update(name="fineweb10B_sp401"))
    assert "someone/golf has sp401" in refused(fetch, "--variant", "sp400", 1)
    assert "sp401" in (tmp_path / "data" / "manifest.json").read_text()


@pytest.mark.parametrize("change, shards, words", [
    (lambda m: m["datasets"][0]["stats"].update(files_train=99), 99, "promises 99 training shards: it is stale"),
    (lambda m: m["datasets"][0]["stats"].update(files_train=1), 2, "--train-shards 2: someone/golf: "),
    (lambda m: m["datasets"][0]["stats"].update(files_val=2), 1, "the manifest says 2: it is stale"),
    (lambda m: m["datasets"][0].update(tokenizer_name="other"), 1, "names no tokenizer for fineweb10B_sp400"),
    (lambda m: m["tokenizers"][0].update(model_path="tokenizers/x.model"), 1, "tokenizers/x.model: the manifest names"),
    (lambda m: m.update(datasets=[{}]), 1, "manifest.json: not a list of datasets and tokenizers"),
    (lambda m: m.clear(), 1, "manifest.json: not a list of datasets and tokenizers")])
def test_a_manifest_that_does_not_fit_its_files(hub, fetch, change, shards, words):
    change_manifest(hub, change)
    assert words in refused(fetch, "--variant", "sp400", "--train-shards", shards)
    assert not hub.transfers("train")


def test_a_manifest_without_counts_and_no_manifest(hub, fetch):
    change_manifest(hub, lambda manifest: manifest["datasets"][0].pop("stats"))
    assert fetch("--variant", "sp400", 2)[0] == 0
    del hub.revisions["main"]["datasets/manifest.json"]
    assert "datasets/manifest.json: not in the repository" in refused(fetch, "--variant", "sp400", 2)


def test_a_sidecar_that_is_missing(hub, fetch):
    write = [name for name in hub.revisions["main"] if "_bytes_" in name]
    assert len(write) == 1
    hub.put({write[0].replace("000000", "000001"): b"x"})
    assert "1 validation shards with 2 byte sidecars" in refused(fetch, "--variant", PUBLISHED, 1)


# --- progress and mistakes
def test_progress_counts_the_bytes_that_arrive(hub, fetch, monkeypatch, remote):
    bars = []

    class Bar:
        def __init__(self, stage: str, total: int):
            self.stage, self.total, self.done = stage, total, 0
            bars.append(self)

        def update(self, size: int) -> None:
            self.done += size

        def close(self) -> None:
            self.stage = f"{self.stage} closed"
    monkeypatch.setattr(prepare, "make_bar", Bar)
    assert fetch("--variant", "sp400", 2)[0] == 0
    names = [f"datasets/datasets/fineweb10B_sp400/fineweb_{kind}.bin" for kind in (
        "val_000000", "train_000000", "train_000001")] + ["datasets/tokenizers/fineweb_400_bpe.model"]
    total = sum(len(remote[name]) for name in names)
    assert [(bar.stage, bar.total, bar.done) for bar in bars] == [("fetch closed", total, total)]


@pytest.mark.parametrize("arguments, words", [
    (("--train-shards", 0), "--train-shards 0: must be at least 1"), (("--variant", "../x"), "--variant ../x: letters"),
    (("--train-shards", "many"), "--train-shards"), (("--workers", 0), "--workers")])
def test_mistakes_are_told(fetch, arguments, words):
    assert words in refused(fetch, *arguments)


def test_byte260_of_the_hub_has_a_model_for_the_trainer(fetch, tmp_path):
    assert fetch("--variant", "byte260", 1)[0] == 0
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "data" / "tokenizers" / "fineweb_byte260.model"))
    assert model.encode("a\u00e9") == [4 + byte for byte in "a\u00e9".encode()]


def test_a_shard_that_is_none_is_left_to_verify(hub, fetch, tmp_path, remote):
    """The repository's own fault has the right hash; verify.py tells."""
    hub.put({FIRST: b"x" * 2000})
    assert fetch("--variant", "sp400", 1)[0] == 0
    folder = tmp_path / "data" / "datasets" / "fineweb10B_sp400"
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        assert verify.main([str(folder)]) == 2
    assert "fineweb_train_000000.bin: no token shard" in err.getvalue()
    write_tokens(folder / "fineweb_train_000000.bin", np.array([1, 5]))
