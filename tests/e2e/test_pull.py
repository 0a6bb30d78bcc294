"""`tandem pull` against a hub on this machine, and the cache that it shares with huggingface_hub."""
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

import fake_hub

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = pathlib.Path("models/tandem-tiny")
MODEL = "Own/Na.me_1"


def bytes_of(n, seed=0):
    return random.Random(seed).randbytes(n)


FILES = {"config.json": b"{}", "generation_config.json": b'{"a": 1}', "tokenizer.json": b"{}" * 1000,
         "tokenizer_config.json": b"[]", "README.md": b"read", "model.safetensors": bytes_of(300_000),
         "pytorch_model.bin": bytes_of(5000, 1), "onnx/model.onnx": bytes_of(5000, 2)}
WANTED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


@pytest.fixture
def hub():
    hub = fake_hub.Hub()
    hub.repositories[MODEL] = fake_hub.Repository(dict(FILES))
    yield hub
    hub.close()


@pytest.fixture
def environment(hub, tmp_path):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_")) and "proxy" not in k.lower()}
    return kept | {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}


@pytest.fixture
def pull(environment):
    def pull(*args, status=0, before=None, **variables):
        done = subprocess.run([TANDEM, "pull", *args], capture_output=True, text=True, timeout=120, preexec_fn=before,
                              stdin=subprocess.DEVNULL, env={k: v for k, v in (environment | variables).items() if v})
        assert done.returncode == status, (args, done.stdout, done.stderr)
        assert "Bearer" not in done.stderr and "hf_" not in done.stderr
        return done
    return pull


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "home/hub/models--Own--Na.me_1"


def blob(folder, hub, name):
    return folder / "blobs" / hub.repositories[MODEL].etag(name)


def names_in(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def test_layout(hub, pull, folder):
    done = pull(MODEL)
    commit = hub.repositories[MODEL].commit
    snapshot = folder / "snapshots" / commit
    assert done.stdout == f"{snapshot}\n"
    assert (folder / "refs/main").read_text() == commit
    assert names_in(snapshot) == WANTED
    for name in WANTED:
        path = snapshot / name
        assert path.is_symlink() and os.readlink(path) == f"../../blobs/{hub.repositories[MODEL].etag(name)}"
        assert path.read_bytes() == FILES[name]
    assert names_in(folder / "blobs") == {hub.repositories[MODEL].etag(name) for name in WANTED}
    umask = os.umask(0)
    os.umask(umask)
    assert blob(folder, hub, "config.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_again_downloads_nothing(hub, pull):
    first = json.loads(pull(MODEL, "--json").stdout)
    assert {f["source"] for f in first["files"]} == {"downloaded"} and {f["name"] for f in first["files"]} == WANTED
    assert first["downloaded_bytes"] == sum(len(FILES[n]) for n in WANTED)
    assert first["commit"] == hub.repositories[MODEL].commit and first["revision"] == "main" and first["model"] == MODEL
    hub.requests.clear()
    again = json.loads(pull(MODEL, "--json").stdout)
    assert {f["source"] for f in again["files"]} == {"cached"} and again["downloaded_bytes"] == 0
    assert [method for method, path, _ in hub.requests if "/api/" not in path] == []


def test_a_new_commit_fetches_what_changed(hub, pull, folder):
    old = pull(MODEL).stdout.strip()
    hub.repositories[MODEL] = fake_hub.Repository(FILES | {"config.json": b'{"new": 1}'})
    answer = json.loads(pull(MODEL, "--json").stdout)
    assert {f["name"]: f["source"] for f in answer["files"]} == {n: "cached" for n in WANTED} | {"config.json": "downloaded"}
    assert (folder / "refs/main").read_text() == hub.repositories[MODEL].commit
    assert (pathlib.Path(old) / "config.json").read_bytes() == b"{}"
    assert (pathlib.Path(answer["path"]) / "config.json").read_bytes() == b'{"new": 1}'


def test_shards(hub, pull):
    names = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}", "consolidated.safetensors": b"x",
             "sub/model-00001-of-00003.safetensors": b"no"} | {n: bytes_of(2000, n) for n in names}
    hub.repositories[MODEL] = fake_hub.Repository(files)
    assert names_in(pathlib.Path(pull(MODEL).stdout.strip())) == names | {"config.json", "model.safetensors.index.json"}


def test_revisions(hub, pull, folder):
    repository = hub.repositories[MODEL]
    other = "0123456789abcdef0123456789abcdef01234567"
    repository.revisions |= {"refs/pr/1": other, other: other}
    assert pull(MODEL, "--revision", "refs/pr/1").stdout.strip().endswith(f"snapshots/{other}")
    assert (folder / "refs/refs/pr/1").read_text() == other and not (folder / "refs/main").exists()
    missing = subprocess.run([TANDEM, "inspect", MODEL], capture_output=True, text=True, check=False,
                             env=os.environ | {"HF_HOME": str(folder.parents[1])})
    assert missing.returncode == 1 and f"snapshots/{other}" in missing.stderr and "tandem pull" in missing.stderr
    pull(MODEL, "--revision", repository.commit)
    assert names_in(folder / "refs") == {"refs/pr/1"}
    assert 'no revision "v9"' in pull(MODEL, "--revision", "v9", status=1).stderr
    for bad in ("../../x", "", "/x", "a//b"):
        assert "branch" in pull(MODEL, "--revision", bad, status=1).stderr


def test_include(hub, pull, folder):
    snapshot = pathlib.Path(pull(MODEL, "--include", "*.md", "--include", "onnx/*").stdout.strip())
    assert names_in(snapshot) == {"README.md", "onnx/model.onnx"}
    assert os.readlink(snapshot / "onnx/model.onnx").startswith("../../../blobs/")
    assert (snapshot / "onnx/model.onnx").read_bytes() == FILES["onnx/model.onnx"]
    assert "README.md" in pull(MODEL, "--include", "*.gguf", status=1).stderr


def test_gguf(hub, pull, environment, tmp_path):
    """A repository of GGUF files: which ones there are, then one of them as a MODEL."""
    made = tmp_path / "tiny.gguf"
    subprocess.run([TANDEM, "quantize", TINY, made, "--type", "q8_0"], check=True, capture_output=True)
    hub.repositories[MODEL] = fake_hub.Repository({"tiny-Q8_0.gguf": made.read_bytes(), "tiny-Q4_0.gguf": b"x" * 2000})
    refused = pull(MODEL, status=1).stderr
    assert "--include" in refused and "tiny-Q8_0.gguf" in refused and "tiny-Q4_0.gguf" in refused
    pull(MODEL, "--include", "*Q8_0.gguf")
    args = [TANDEM, "run", MODEL, "-p", "What is the capital of France?", "--think", "off", "--greedy"]
    assert "Paris" in subprocess.run(args, check=True, capture_output=True, text=True, env=environment).stdout
    pull(MODEL, "--include", "*.gguf")
    several = subprocess.run(args, capture_output=True, text=True, env=environment, check=False)
    assert several.returncode == 1 and "tiny-Q4_0.gguf" in several.stderr and "tiny-Q8_0.gguf" in several.stderr


def test_run_what_was_pulled(hub, pull, environment):
    """The default model by way of the hub; and huggingface_hub and transformers' users find the same files."""
    files = {p.name: p.read_bytes() for p in TINY.iterdir() if p.is_file()}
    hub.repositories[MODEL] = fake_hub.Repository(files, lfs_from=1_000_000)
    path = pull(MODEL).stdout.strip()
    done = subprocess.run([TANDEM, "run", MODEL, "-p", "What is the capital of France?", "--think", "off", "--greedy"],
                          check=True, capture_output=True, text=True, env=environment)
    assert done.stdout == "The capital of France is Paris.\n"
    code = ("import huggingface_hub as h, sys; print(h.snapshot_download(sys.argv[1], local_files_only=True));"
            "print(h.hf_hub_download(sys.argv[1], 'model.safetensors')); print(h.scan_cache_dir().warnings)")
    offline = subprocess.run([sys.executable, "-c", code, MODEL], check=True, capture_output=True, text=True,
                             env=environment | {"HF_HUB_OFFLINE": "1"}).stdout.splitlines()
    assert offline == [path, f"{path}/model.safetensors", "[]"]


def test_what_huggingface_hub_downloaded(hub, pull, environment, folder):
    code = "import huggingface_hub as h, sys; print(h.snapshot_download(sys.argv[1], token=False))"
    theirs = environment | {"HF_HUB_DISABLE_XET": "1"}
    path = subprocess.run([sys.executable, "-c", code, MODEL], check=True, capture_output=True, text=True,
                          env=theirs).stdout.strip()
    hub.requests.clear()
    answer = json.loads(pull(MODEL, "--json").stdout)
    assert answer["path"] == path and answer["downloaded_bytes"] == 0
    hub.repositories[MODEL] = fake_hub.Repository(FILES | {"config.json": b'{"new": 1}'})  # blobs are found by their tags
    answer = json.loads(pull(MODEL, "--json").stdout)
    assert {f["name"] for f in answer["files"] if f["source"] != "cached"} == {"config.json"}
    shutil.rmtree(folder)
    files = {p.name: p.read_bytes() for p in TINY.iterdir() if p.is_file()}
    hub.repositories[MODEL] = fake_hub.Repository(files, lfs_from=1_000_000)
    subprocess.run([sys.executable, "-c", code, MODEL], check=True, capture_output=True, env=theirs)
    done = subprocess.run([TANDEM, "tokenize", MODEL, "-p", "Hello"], check=True, capture_output=True, text=True,
                          env=environment)
    assert done.stdout == subprocess.run([TANDEM, "tokenize", TINY, "-p", "Hello"], check=True, capture_output=True,
                                         text=True).stdout


# ---- Interruptions ---------------------------------------------------------------------------------------------------

def test_cut_connections_go_on(hub, pull, folder):
    key = "GET", hub.repositories[MODEL].etag("model.safetensors")
    hub.faults[key] = ["cut 100000", "cut 0", "status 503", "cut 50000"]
    done = pull(MODEL)
    assert done.stderr.count("trying again") == 4
    ranges = [headers.get("Range") for method, path, headers in hub.requests if method == "GET" and key[1] in path]
    assert ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=100000-", "bytes=150000-"]
    assert blob(folder, hub, "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_retry_after_is_kept(hub, pull):
    hub.faults["GET", "/api/models"] = [("status 429", {"Retry_After": "2"})]
    start = time.monotonic()
    assert "status 429; trying again in 2.0 s" in pull(MODEL).stderr
    assert time.monotonic() - start >= 2


@pytest.mark.parametrize("status, words", [(500, "status 500"), (429, "too many requests")])
def test_giving_up(hub, pull, folder, status, words):
    hub.faults["GET", "/api/models"] = [f"status {status}"] * 5
    assert words in pull(MODEL, status=1).stderr
    assert not folder.exists()


def test_interrupt_keeps_what_came(hub, pull, environment, folder):
    large = hub.repositories[MODEL].etag("model.safetensors")
    hub.faults["GET", large] = ["cut 120000 stall"]
    partial = blob(folder, hub, "model.safetensors").with_suffix(".incomplete")
    process = subprocess.Popen([TANDEM, "pull", MODEL], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)
    end = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size == 120000) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and "interrupted" in err and out == ""
    assert partial.stat().st_size == 120000 and not (folder / "refs").exists()
    for name in names_in(folder / "snapshots"):
        assert (folder / "snapshots" / name).exists(), "a link to nothing"
    refused = subprocess.run([TANDEM, "inspect", MODEL], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "tandem pull" in refused.stderr
    answer = json.loads(pull(MODEL, "--json").stdout)
    assert {f["name"]: f["source"] for f in answer["files"]}["model.safetensors"] == "resumed"
    assert answer["downloaded_bytes"] <= 180000 + 5000
    assert blob(folder, hub, "model.safetensors").read_bytes() == FILES["model.safetensors"] and not partial.exists()


@pytest.mark.parametrize("left, fault", [(b"other" * 1000, None), (FILES["model.safetensors"][:5000], "whole"),
                                         (b"x" * 300_000, None), (b"x" * 300_001, None), (FILES["model.safetensors"], None)],
                         ids=["wrong", "no ranges", "wrong and whole", "too long", "whole"])
def test_what_an_earlier_call_left(hub, pull, folder, left, fault):
    """A wrong beginning is found by its checksum and downloaded anew; a server without ranges sends all; too long is cut."""
    hub.faults["GET", hub.repositories[MODEL].etag("model.safetensors")] = [fault] if fault else []
    path = blob(folder, hub, "model.safetensors")
    path.parent.mkdir(parents=True)
    path.with_suffix(".incomplete").write_bytes(left)
    pull(MODEL)
    assert path.read_bytes() == FILES["model.safetensors"] and not path.with_suffix(".incomplete").exists()


def test_a_stalled_connection_is_cut(hub, pull):
    hub.faults["GET", hub.repositories[MODEL].etag("model.safetensors")] = ["cut 1000 stall"]
    assert "trying again" in pull(MODEL, HF_HUB_DOWNLOAD_TIMEOUT="1").stderr


def test_two_at_once(hub, environment, folder):
    hub.faults["GET", hub.repositories[MODEL].etag("model.safetensors")] = ["cut 100000"]
    two = [subprocess.Popen([TANDEM, "pull", MODEL], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True) for _ in range(2)]
    for process in two:
        assert process.communicate(timeout=120)[1] is not None and process.returncode == 0
    assert blob(folder, hub, "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert not any(name.endswith(".incomplete") for name in names_in(folder))
    large = [p for method, p, _ in hub.requests if method == "GET" and hub.repositories[MODEL].etag("model.safetensors") in p]
    assert len(large) == 2  # the cut one and its rest


# ---- What is refused ---------------------------------------------------------------------------------------------------

def test_wrong_bytes_are_discarded(hub, pull, folder):
    for name, part in [("config.json", "/config.json"), ("model.safetensors", hub.repositories[MODEL].etag("model.safetensors"))]:
        hub.faults["GET", part] = ["wrong"]
        assert "checksum" in pull(MODEL, status=1).stderr
        assert not blob(folder, hub, name).exists() and not blob(folder, hub, name).with_suffix(".incomplete").exists()
        assert not (folder / "refs/main").exists()
    pull(MODEL)


def test_another_length_is_refused(hub, pull):
    hub.faults["HEAD", "model.safetensors"] = ["size 1234", "size 300005"]
    assert "more than the 1234 bytes" in pull(MODEL, status=1).stderr
    hub.faults["GET", hub.repositories[MODEL].etag("model.safetensors")] = []
    assert "300005" in pull(MODEL, status=1).stderr


def test_access(hub, pull, tmp_path):
    hub.repositories["Own/Private"] = fake_hub.Repository(dict(FILES), private=True)
    hub.repositories["Own/Gated"] = fake_hub.Repository(dict(FILES), gated=True)
    for model in ("Own/Private", "Own/Nothing"):
        said = pull(model, status=1).stderr
        assert "HF_TOKEN" in said and "401" in said and model in said
    assert "restricted" in (said := pull("Own/Gated", status=1).stderr) and f"{hub.url}/Own/Gated" in said
    assert "refuses the token" in pull("Own/Private", status=1, HF_TOKEN="hf_wrong").stderr
    assert "404" in pull("Own/Nothing", status=1, HF_TOKEN=hub.TOKEN).stderr
    hub.requests.clear()
    pull("Own/Private", HF_TOKEN=hub.TOKEN)
    (tmp_path / "home/token").write_text(hub.TOKEN + "\n")
    pull("Own/Gated")
    with_token = {"localhost" in headers["Host"] for _, _, headers in hub.requests if "Authorization" in headers}
    without = {"localhost" in headers["Host"] for _, _, headers in hub.requests if "Authorization" not in headers}
    assert with_token == {False} and without == {True}  # the token stays with the hub
    assert "control character" in pull(MODEL, status=1, HF_TOKEN="a\r\nX-Evil: 1").stderr


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "a//x", "x\n", ".", "a/.", "n" * 300])
def test_hostile_names(hub, pull, tmp_path, name):
    hub.repositories[MODEL].info = {"siblings": [{"rfilename": n} for n in (*FILES, name)]}
    before = names_in(tmp_path)
    assert "leads out of its folder" in pull(MODEL, "--include", "*", status=1).stderr
    assert names_in(tmp_path) == before
    pull(MODEL)  # which has no use for that file


@pytest.mark.parametrize("etag", ["../../evil", "a/b", ".hidden", "x" * 150, ""])
def test_hostile_tags(hub, pull, etag):
    hub.repositories[MODEL].etag = lambda name: etag
    assert "ETag" in pull(MODEL, status=1).stderr


@pytest.mark.parametrize("info, words", [
    ({"sha": "../../x"}, "commit"), ({"sha": None}, "commit"), ({"siblings": 3}, "list of files"),
    ({"siblings": [{"rfilename": 3}]}, "list of files"), ({"siblings": []}, "no model"), ({"pad": "x" * (17 << 20)}, "longer"),
], ids=["a path as commit", "no commit", "a number", "a number as name", "empty", "17 MB"])
def test_hostile_descriptions(hub, pull, info, words):
    hub.repositories[MODEL].info = info
    assert words in pull(MODEL, status=1).stderr


def test_huge_listing(hub, pull):
    hub.repositories[MODEL].info = {"siblings": [{"rfilename": n} for n in (*(f"data/{i}.bin" for i in range(100_000)), *FILES)]}
    assert names_in(pathlib.Path(pull(MODEL).stdout.strip())) == WANTED


def test_no_space(hub, pull, folder):
    hub.faults["HEAD", "model.safetensors"] = [f"size {10**17}"]
    assert "not enough space" in pull(MODEL, status=1).stderr
    assert names_in(folder) == set()


def test_a_full_disk_keeps_what_came(hub, pull, folder):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    said = pull(MODEL, status=1, before=limit).stderr
    assert "cannot write" in said and "goes on" in said
    assert blob(folder, hub, "model.safetensors").with_suffix(".incomplete").stat().st_size > 0
    answer = json.loads(pull(MODEL, "--json").stdout)
    assert {f["name"]: f["source"] for f in answer["files"]}["model.safetensors"] == "resumed"


@pytest.mark.parametrize("variables, words", [
    ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "cannot reach 127.0.0.1:1"),
    ({"HF_ENDPOINT": "http://nowhere.invalid"}, "cannot reach nowhere.invalid"),
    ({"HF_ENDPOINT": "file:///etc"}, "HF_ENDPOINT"),
    ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    ({"http_proxy": "http://127.0.0.1:1"}, "127.0.0.1"),
    ({"HF_HOME": "/dev/null"}, "/dev/null"),
    ({"HF_HOME": "", "HOME": ""}, "HF_HOME"),
])
def test_surroundings(pull, variables, words):
    start = time.monotonic()
    assert words in pull(MODEL, status=1, **variables).stderr
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("args", [[], ["name"], ["a/b/c"], ["../x"], [MODEL, "more"], [MODEL, "--include", ""], [MODEL, "--what"]])
def test_usage(pull, args):
    assert "tandem: pull: " in pull(*args, status=2).stderr


def test_cache_places(hub, pull, tmp_path):
    for variables, place in [({"HF_HUB_CACHE": str(tmp_path / "a")}, "a"), ({"HF_HOME": "~/b", "HOME": str(tmp_path)}, "b/hub"),
                             ({"HF_HOME": "", "XDG_CACHE_HOME": str(tmp_path / "c")}, "c/huggingface/hub"),
                             ({"HF_HOME": "", "HOME": str(tmp_path / "d")}, "d/.cache/huggingface/hub")]:
        assert pull(MODEL, **variables).stdout.startswith(str(tmp_path / place / "models--Own--Na.me_1/snapshots/"))
