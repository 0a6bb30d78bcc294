"""How the program ends when its surroundings fail: full disks, closed pipes, Ctrl-C, odd terminals, odd files."""
import json
import os
import pathlib
import pty
import select
import signal
import subprocess
import time

import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = "models/tandem-tiny"
ANSWER = ["run", "-p", "What is the capital of France?", "--think", "off", "--greedy"]
BENCH = ["bench", "--synthetic", "tiny-qwen3", "--prefill", "8", "--repeat", "1"]
MESSAGES = '[{"role":"user","content":"a"}]'
# Everything that prints, and what it reads from stdin.
PRINTING = {
    "help": (["help"], ""), "version": (["--version"], ""), "run --help": (["run", "--help"], ""), "run": (ANSWER, ""),
    "run --json": ([*ANSWER, "--json"], ""), "tokenize": (["tokenize"], "Hello"), "decode": (["tokenize", "-d"], "1 2 3"),
    "template": (["template"], MESSAGES), "inspect": (["inspect"], ""), "inspect --json": (["inspect", "--json"], ""),
    "check": (["check", "--synthetic", "tiny-qwen3", "--stage", "weights"], ""), "bench": (BENCH, ""),
    "bench --csv": ([*BENCH, "--csv"], ""), "bench --json": ([*BENCH, "--json"], ""), "chat": (["chat", "-n", "2"], "Hi\nHi\n"),
    "perplexity": (["perplexity", "-f", "README.md", "--chunk", "64"], ""),
}


def start(*args, **kwargs):
    return subprocess.Popen([TANDEM, *map(str, args)], text=True, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE,
                                                                     "stderr": subprocess.PIPE} | kwargs)


def tandem(*args, text="", status=0, **kwargs):
    done = subprocess.run([TANDEM, *map(str, args)], input=text, text=True, timeout=100, check=False,
                          **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs)
    assert done.returncode == status, (args, done.returncode, done.stdout, done.stderr)
    return done


@pytest.mark.skipif(not pathlib.Path("/dev/full").is_char_device(), reason="no /dev/full")
@pytest.mark.parametrize("what", PRINTING)
def test_a_full_disk_is_said_once(what):
    args, text = PRINTING[what]
    with open("/dev/full", "w") as full:
        said = tandem(*args, text=text, status=1, stdout=full).stderr
    assert said.count("cannot write to standard output: No space left on device") == 1


@pytest.mark.parametrize("what", PRINTING)
def test_a_reader_that_leaves_is_no_news(what):
    """As in `tandem ... | head -1`."""
    args, text = PRINTING[what]
    read, write = os.pipe()
    os.close(read)
    said = tandem(*args, text=text, status=1, stdout=write).stderr
    os.close(write)
    assert "standard output" not in said and "Broken pipe" not in said


def test_a_long_answer_ends_with_its_reader():
    run = start("run", "-p", "Tell me a story.", "--think", "off", "--ignore-eos", "--ctx", "2048")
    run.stdout.read(1)
    run.stdout.close()
    assert run.wait(timeout=60) == 1
    assert run.stderr.read() == ""


# ---- Files -----------------------------------------------------------------------------------------------------------

def writers(folder):
    """Every subcommand that writes a file: its arguments, the name of the file last."""
    trace = folder / "trace.safetensors"
    tandem("trace", "--ids", "1,2", "-o", trace)
    return [["trace", "--ids", "1,2,3,4", "--tensors", "*", "-o"], ["perplexity", "-f", "README.md", "--chunk", "64", "--save-logits"],
            ["diff", trace, trace, "--report"], ["run", "--ids", "1", "-n", "1", "--manifest"],
            ["quantize", TINY, "--type", "q8_0", "--force"]]


def test_devices_are_written_not_replaced(tmp_path):
    device = tmp_path / "pipe"
    os.mkfifo(device)
    for args in writers(tmp_path):
        with open(tmp_path / "read", "wb") as read:
            reader = subprocess.Popen(["timeout", "100", "cat", device], stdout=read)
            tandem(*args, device)
            assert reader.wait(timeout=100) == 0
        written = (tmp_path / "read").read_bytes()
        assert len(written) > 100 and device.is_fifo(), args
        tandem(*args, tmp_path / "file")
        if args[0] != "run":  # whose record holds times
            assert (tmp_path / "file").read_bytes() == written


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    target = tmp_path / "real/file"
    target.write_bytes(b"old")
    link.symlink_to(target)
    for args in writers(tmp_path):
        target.write_bytes(b"old")
        tandem(*args, link)
        assert link.is_symlink() and target.read_bytes() != b"old", args
        assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_file_that_cannot_grow_stays_as_it_was(tmp_path):
    import resource
    (tmp_path / "out").mkdir()
    target = tmp_path / "out/file"
    for args in writers(tmp_path)[:2] + writers(tmp_path)[4:]:
        target.write_bytes(b"old")
        said = tandem(*args, target, status=1,
                      preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))).stderr
        assert f"cannot write {target}: File too large" in said
        assert target.read_bytes() == b"old" and [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("place, words", [("missing/file", "No such file or directory"), (".", "")])
def test_places_that_cannot_be_written(tmp_path, place, words):
    for args in writers(tmp_path):
        said = tandem(*args, tmp_path / place, status=1).stderr
        assert words in said and str(tmp_path / place) in said


@pytest.mark.parametrize("args, words", [
    (["run"], "prompt is empty"), (["run", "-f", "/dev/stdin"], "prompt is empty"), (["run", "-f", "/"], "regular file"),
    (["run", "--messages", "LICENSE"], "LICENSE: line 2"), (["chat", "--load", "LICENSE"], "LICENSE: line 2"),
    (["replay", "LICENSE"], "LICENSE: line 2"), (["diff", "LICENSE", "LICENSE"], "LICENSE"), (["inspect", "LICENSE"], "no GGUF"),
    (["inspect", "src"], "config.json"), (["perplexity", "-f", "/none"], "/none"), (["serve", "--api-key-file", "/none"], "/none"),
    (["trace", "--ids-file", "LICENSE", "-o", "/none/x"], "token ids"), (["quantize", "LICENSE", "/none/x", "--type", "q8_0"], "LICENSE"),
    (["perplexity", "-f", "LICENSE", "--kld", "LICENSE"], "LICENSE"), (["bench", "--synthetic", "none"], "tiny-qwen3"),
])
def test_odd_inputs(args, words):
    done = tandem(*args, status=1)
    assert words in done.stderr and done.stdout == "" and done.stderr.startswith(f"tandem: {args[0]}: ")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------

def wait_for(condition, process):
    end = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert process.poll() is None and condition(), process.communicate()


@pytest.mark.parametrize("args", [
    ["quantize", "synthetic:qwen3-0.6b", "OUT", "--type", "q2_k"],
    ["perplexity", TINY, "-f", "TEXT", "--chunk", "16", "--save-logits", "OUT"],
], ids=["quantize", "perplexity"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupt_leaves_nothing_behind(tmp_path, args, number):
    (tmp_path / "out").mkdir()
    (tmp_path / "text").write_text("A text of some words. " * 4000)
    process = start(*[{"OUT": tmp_path / "out/file", "TEXT": tmp_path / "text"}.get(a, a) for a in args])
    wait_for(lambda: list((tmp_path / "out").iterdir()), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -number, said  # which a shell reports as 128 + number, and which ends its loops
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_answer_keeps_what_came():
    run = start("run", "-p", "Tell me a story.", "--think", "off", "--ignore-eos")
    first = run.stdout.read(1)
    run.send_signal(signal.SIGINT)
    rest, said = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT and (first + rest).endswith("\n") and said == ""


@pytest.mark.parametrize("args", [["bench", "--synthetic", "tiny-qwen3", "--prefill", ",".join(["2048"] * 30)],
                                  ["check", TINY, "--thorough"]], ids=["bench", "check"])
def test_interrupt_ends_long_work(args):
    process = start(*args)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


def test_a_shell_sees_130():
    script = f"{TANDEM} run -p 'Tell me a story.' --think off --ignore-eos; echo status $?"
    shell = subprocess.Popen(["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert shell.stdout.read(1)
    child = pathlib.Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()[0]
    os.kill(int(child), signal.SIGINT)
    assert shell.communicate(timeout=60)[0].endswith("status 130\n")


def test_ignored_interrupts_stay_ignored():
    """As in a script's background job, which SIGINT is not meant for."""
    run = start(*ANSWER, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    run.send_signal(signal.SIGINT)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0 and "Paris" in out


# ---- Terminals -------------------------------------------------------------------------------------------------------

def on_terminal(args, text="", **variables):
    """Everything that a terminal shows of a run."""
    environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")} | variables
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(TANDEM, [TANDEM, *args], environment)
    os.write(fd, text.encode())
    shown, end = b"", time.monotonic() + 120
    while time.monotonic() < end and select.select([fd], [], [], 60)[0]:
        try:
            piece = os.read(fd, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, shown
    return shown


@pytest.mark.parametrize("variables, colored", [({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False),
                                                ({"TERM": "dumb"}, False), ({}, False)])
def test_colors_and_bars(variables, colored):
    shown = on_terminal(["check", "--synthetic", "tiny-qwen3", "--stage", "weights"], **variables)
    assert (b"\x1b[32m" in shown) == colored and b"verdict" in shown
    shown = on_terminal(["run", "-p", "Hello!", "--greedy", "-n", "20"], **variables)
    assert (b"\x1b[2m" in shown) == colored
    if variables.get("TERM") != "xterm":
        assert b"\x1b" not in shown
        assert b"\x1b" not in on_terminal(BENCH, **variables)


def test_a_prompt_from_the_terminal_is_asked_for():
    assert b"Ctrl-D" in on_terminal(["tokenize", "--json"], text="Hello\n\x04", TERM="xterm")


def test_a_turn_of_several_lines():
    """A backslash at the end of a line carries a turn on."""
    shown = on_terminal(["chat", "--think", "off", "--greedy"], TERM="xterm",
                        text="What is the capital \\\nof France?\n/save /dev/stdout\n/exit\n").decode()
    assert "Paris" in shown and '"What is the capital \\nof France?"' in shown


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "no-such"])
def test_what_is_typed_arrives_in_any_locale(locale):
    """A container has no locale: letters beyond ASCII were dropped there."""
    shown = on_terminal(["chat", "--think", "off", "--greedy", "-n", "4"], TERM="xterm", LC_ALL=locale,
                        text="Grüße 日本 😀\n/save /dev/stdout\n/exit\n").decode()
    assert '"content": "Grüße 日本 😀"' in shown


def test_chat_on_a_dumb_terminal():
    shown = on_terminal(["chat", "--think", "off", "--greedy"], text="What is the capital of France?\n/exit\n", TERM="dumb")
    assert b"Paris" in shown


def test_json_stays_json_on_a_terminal():
    lines = on_terminal([*ANSWER, "--json"], TERM="xterm").decode().strip().splitlines()
    assert "Paris" in json.loads(lines[-1].split("\x1b[K")[-1])["text"]
