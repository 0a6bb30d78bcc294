"""`tandem diff`: healthy pairs of traces are equal or within rounding, a wrong weight or number is found where it acts."""
import html.parser
import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest

from test_goldens import TANDEM, TINY, load
from test_model_files import write_safetensors

IDS = [int(i) for i in load(TINY / "golden/golden.safetensors")["t37.ids"]]


def run_trace(model, out, path, ids=IDS, tensors="*", *options):
    subprocess.run([TANDEM, "trace", str(model), "--ids", ",".join(map(str, ids)), "--tensors", tensors, "--path", path,
                    "-o", out, *options], check=True, capture_output=True)
    return out


def diff(a, b, *options):
    done = subprocess.run([TANDEM, "diff", a, b, "--json", *options], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    answer = json.loads(done.stdout)
    assert done.returncode == (answer["verdict"] == "diverged")
    return answer


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    return {path: run_trace(TINY, folder / f"{path}.safetensors", path) for path in ("fused", "standard", "T", "H")}


def test_paths_of_one_backend_are_equal(traces):
    answer = diff(traces["standard"], traces["fused"])
    assert answer["equal"] and answer["verdict"] == "equal" and answer["must_be_equal"] and answer["first"] is None
    assert answer["only_in_a"] == 65 and all(t["different"] == 0 for t in answer["tensors"])


@pytest.mark.parametrize("a, b", [("T", "H"), ("T", "standard"), ("T", "fused"), ("H", "standard")])
def test_rounding_is_no_divergence(traces, a, b):
    answer = diff(traces[a], traces[b])
    assert not answer["equal"] and answer["verdict"] == "rounding"
    x, y = load(traces[a]), load(traces[b])
    order = [t["name"] for t in answer["tensors"]]
    assert order[0] == "embed" and order[-1] == "logits" and order.index("layers.7.q") > order.index("layers.6.resid")
    for t in answer["tensors"]:
        d = y[t["name"]] - x[t["name"]]
        assert t["max_abs"] == pytest.approx(np.abs(d).max(), rel=1e-12)
        assert t["rms_relative"] == pytest.approx(np.sqrt((d**2).sum() / (x[t["name"]] ** 2).sum()), rel=1e-9)
        assert t["different"] == np.count_nonzero(d)
        if t["different"]:
            row, column = np.argwhere(d)[0]
            channel = t["first"]["channel"] + (128 * t["first"]["head"] if t["first"]["head"] is not None else 0)
            assert (t["first"]["position"], channel) == (row, column)


def patched(folder, edit=None, **config):
    """tandem-tiny with changed weights (edit: a function of a function from names to writable bf16 arrays) or config."""
    folder.mkdir()
    for f in TINY.iterdir():
        if f.is_file():
            shutil.copy(f, folder / f.name)
    (folder / "config.json").write_text(json.dumps(json.loads((TINY / "config.json").read_text()) | config))
    data = bytearray((folder / "model.safetensors").read_bytes())
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])

    def weight(name):
        t = header["model.layers." + name + ".weight"]
        begin, end = t["data_offsets"]
        return np.frombuffer(data, np.uint16, (end - begin) // 2, 8 + n + begin).reshape(t["shape"])

    if edit:
        edit(weight)
        (folder / "model.safetensors").write_bytes(data)
    return folder


def swap_gate_up(w):
    gate, up = w("3.mlp.gate_proj"), w("3.mlp.up_proj")
    gate[:], up[:] = up.copy(), gate.copy()


def repeat_head(w):
    q = w("2.self_attn.q_proj")
    q[128:256] = q[:128]


def negate_channel(w):
    w("5.self_attn.k_norm")[17] ^= 0x8000


def negate_row(w):
    w("4.mlp.down_proj")[100] ^= 0x8000


def other_layers_norm(w):
    w("6.input_layernorm")[:] = w("5.input_layernorm")


BUGS = {
    "theta": (dict(rope_theta=10000), "layers.0.q_rope", "rope", "every position from 1 on"),
    "eps": (dict(rms_norm_eps=0.01), "layers.0.attn_norm", "rmsnorm", "everywhere"),
    "gate and up": (dict(edit=swap_gate_up), "layers.3.gate", "matmul", "everywhere"),
    "one head": (dict(edit=repeat_head), "layers.2.q", "matmul", "head 1 alone"),
    "one channel": (dict(edit=negate_channel), "layers.5.k_norm", "head_rmsnorm", "columns 17, 145"),
    "one row": (dict(edit=negate_row), "layers.4.mlp_out", "matmul", "channel 100 alone"),
    "another layer's norm": (dict(edit=other_layers_norm), "layers.6.attn_norm", "rmsnorm", "channels"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_where_it_acts(traces, bug, tmp_path):
    change, tensor, op, where = BUGS[bug]
    wrong = run_trace(patched(tmp_path / "m", **change), tmp_path / "wrong.safetensors", "standard")
    first = diff(traces["H"], wrong)["first"]
    assert (first["tensor"], first["op"]) == (tensor, op)
    assert where in first["extent"]
    assert first["error"] > first["limit"] > first["input_error"]
    column = first["channel"] + (128 * first["head"] if first["head"] is not None else 0)
    assert first["expected"] == load(traces["H"])[tensor][first["position"], column]
    assert first["found"] == load(wrong)[tensor][first["position"], column]
    if bug == "one head":
        assert first["head"] == 1
    if bug == "one channel":
        assert first["channel"] == 17
    if bug == "one row":
        assert first["channel"] == 100


def copy_with(source, out, change):
    """A trace with changed tensors, its metadata kept."""
    raw = source.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + n]), bytearray(raw[8 + n :])

    def tensor(name):
        begin, end = header[name]["data_offsets"]
        kind = {"F32": np.float32, "I32": np.int32}[header[name]["dtype"]]
        return np.frombuffer(data, kind, (end - begin) // 4, begin).reshape(header[name]["shape"])

    change(tensor)
    out.write_bytes(raw[: 8 + n] + data)
    return out


def test_one_bit_counts_between_paths_of_one_backend(traces, tmp_path):
    def flip(tensor):
        tensor("layers.1.v").view(np.uint32)[20, 130] ^= 1

    answer = diff(traces["fused"], copy_with(traces["standard"], tmp_path / "x", flip))
    assert answer["verdict"] == "diverged"
    first = answer["first"]
    assert (first["tensor"], first["position"], first["head"], first["channel"]) == ("layers.1.v", 20, 1, 2)
    assert first["extent"] == "position 20 alone; head 1 alone; column 130 alone"
    # Against T, whose arithmetic is another, it is rounding.
    assert diff(traces["T"], tmp_path / "x")["verdict"] == "rounding"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf(traces, tmp_path, value):
    def poison(tensor):
        tensor("layers.1.gate")[5, 7] = value

    answer = diff(traces["T"], copy_with(traces["standard"], tmp_path / "x", poison))
    first = answer["first"]
    assert (first["tensor"], first["position"], first["channel"]) == ("layers.1.gate", 5, 7)
    assert first["found"] is None and first["error"] is None and first["expected"] is not None
    assert diff(tmp_path / "x", tmp_path / "x")["equal"]


def test_positions_in_common(tmp_path):
    some = run_trace(TINY, tmp_path / "a", "T", IDS, "layers.0.q,logits", "--positions", "3,10-12")
    others = run_trace(TINY, tmp_path / "b", "H", IDS, "layers.0.q,logits", "--positions", "0-10")
    answer = diff(some, others)
    assert answer["verdict"] == "rounding" and all(t["rows"] == 2 for t in answer["tensors"])
    assert answer["tensors"][0]["first"]["position"] == 3
    apart = run_trace(TINY, tmp_path / "c", "H", IDS, "logits", "--positions", "-1")
    refused(some, apart, "no position in common")


def refused(a, b, *words):
    done = subprocess.run([TANDEM, "diff", a, b], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("tandem: diff: ")
    for word in words:
        assert word in done.stderr, done.stderr


def test_what_cannot_be_compared(traces, tmp_path):
    other = run_trace(TINY, tmp_path / "other", "T", IDS[:5] + [IDS[5] + 1] + IDS[6:])
    refused(traces["T"], other, "position 5", str(IDS[5]))
    refused(traces["T"], run_trace(TINY, tmp_path / "short", "T", IDS[:5]), "has 37", "has 5")
    refused(traces["T"], tmp_path / "missing", "missing")
    write_safetensors(tmp_path / "no_ids", {"logits": np.zeros((2, 3), np.float32)})
    refused(traces["T"], tmp_path / "no_ids", "no tensor ids")
    ids = np.array([1, 2], np.int32)
    rows = {"ids": ids, "q": np.zeros((2, 3), np.float32)}
    write_safetensors(tmp_path / "a", rows | {"logits": np.zeros((2, 3), np.float32)})
    for name, change, words in [
        ("columns", {"logits": np.zeros((2, 4), np.float32)}, ["logits", "[2, 3]", "[2, 4]"]),
        ("rows", {"logits": np.zeros((1, 3), np.float32)}, ["logits", "1 rows", "2 positions"]),
        ("type", {"logits": np.zeros((2, 3), np.int32)}, ["logits", "I32"]),
        ("rank", {"logits": np.zeros((6,), np.float32)}, ["logits", "[6]"]),
        ("order", {"positions": np.array([1, 0], np.int32)}, ["positions", "ascending"]),
        ("beyond", {"positions": np.array([0, 2], np.int32)}, ["positions", "below 2"]),
        ("float ids", {"ids": np.zeros(2, np.float32)}, ["ids", "I32"]),
    ]:
        write_safetensors(tmp_path / name, rows | change)
        refused(tmp_path / "a", tmp_path / name, *words)
    write_safetensors(tmp_path / "nothing", {"ids": ids})
    refused(tmp_path / "a", tmp_path / "nothing", "no tensor in common")
    done = subprocess.run([TANDEM, "diff", tmp_path / "a"], capture_output=True, text=True)
    assert done.returncode == 2 and "A.safetensors B.safetensors" in done.stderr


def test_traces_without_metadata_and_with_unknown_tensors(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    base = {"ids": np.array([1, 2, 3], np.int32), "embed": x, "layers.0.attn_norm": x, "my.tensor": x}
    write_safetensors(tmp_path / "a", base)
    half = (x.view(np.uint32) >> 16).astype(np.uint16)  # BF16, truncated
    write_safetensors(tmp_path / "b", base | {"embed": half, "my.tensor": -x})
    answer = diff(tmp_path / "a", tmp_path / "b")
    assert answer["verdict"] == "rounding"  # what a tensor of another name should be, nobody can say
    assert [t["name"] for t in answer["tensors"]] == ["embed", "layers.0.attn_norm", "my.tensor"]
    assert answer["tensors"][2]["error"] > 1
    write_safetensors(tmp_path / "c", base | {"layers.0.attn_norm": 2 * x})
    assert diff(tmp_path / "a", tmp_path / "c")["first"]["tensor"] == "layers.0.attn_norm"


class Page(html.parser.HTMLParser):
    """Collects tags, attributes that would load something, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data):
        self.text += data


def test_report(traces, tmp_path):
    wrong = run_trace(patched(tmp_path / "m", edit=repeat_head), tmp_path / "<b>&.safetensors", "standard")
    diff(traces["H"], wrong, "--report", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert page.loads == [] and "script" not in page.tags and "url(" not in text and "@import" not in text
    assert page.tags.count("svg") >= 3 and "b" in page.tags and "<b>&" in page.text and "<b>&" not in text
    for word in ("Diverged at layers.2.q", "head 1 alone", "layer 7", "attn_norm", "Worst channels"):
        assert word in page.text
    assert text.count("class=first") == 1
    diff(traces["standard"], traces["fused"], "--report", tmp_path / "equal.html")
    assert "Equal, every element" in (tmp_path / "equal.html").read_text()
    diff(traces["T"], traces["H"], "--report", tmp_path / "rounding.html")
    text = (tmp_path / "rounding.html").read_text()
    assert "Equal within rounding (bf16)" in text and "class=first" not in text and "class=mark" not in text


def test_text(traces, tmp_path):
    wrong = run_trace(patched(tmp_path / "m", edit=negate_row), tmp_path / "wrong", "standard")
    done = subprocess.run([TANDEM, "diff", traces["H"], wrong], capture_output=True, text=True)
    assert done.returncode == 1
    for word in ("first divergence: layers.4.mlp_out (computed by matmul)", "channel 100", "verdict: diverged"):
        assert word in done.stdout
    plot = {line.split()[0]: line for line in done.stdout.splitlines() if "#" in line}
    assert plot["layers.4.resid"].count("#") > plot["layers.3.resid"].count("#") and " ! " in plot["layers.4.resid"]
    assert " ! " not in plot["layers.3.resid"]


def test_hf_trace_says_what_it_needs():
    """The tool for transformers, here without torch; `make test-hf` runs it."""
    script = [sys.executable, "tools/hf_trace.py"]
    done = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert "tandem diff" in done.stdout and "--positions" in done.stdout
    if importlib.util.find_spec("torch") is None:
        done = subprocess.run([*script, TINY, "--ids", "1", "-o", "x"], capture_output=True, text=True)
        assert done.returncode == 1 and "requirements-hf.txt" in done.stderr and "Traceback" not in done.stderr
