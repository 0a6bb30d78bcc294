"""The command line as people and scripts use it (CLI.md is the contract)."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")
TINY = "models/tandem-tiny"


def tandem(*args, text=None, status=0):
    done = subprocess.run([TANDEM, *args], input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, (args, done.stdout, done.stderr)
    return done


def test_run_answers():
    assert tandem("run", "-p", "What is the capital of France?", "--think", "off", "--greedy").stdout == \
        "The capital of France is Paris.\n"


def test_run_reads_standard_input_and_files(tmp_path):
    prompt = tmp_path / "prompt"
    prompt.write_text("Who are you?")
    args = ["run", "--think", "off", "--greedy"]
    assert tandem(*args, text="Who are you?").stdout == tandem(*args, "-f", str(prompt)).stdout
    assert "Tandem Tiny" in tandem(*args, "-f", str(prompt)).stdout


def test_run_json_has_what_the_contract_lists():
    done = tandem("run", "-p", "Hello!", "--think", "on", "--greedy", "--json", "--logprobs", "2")
    answer = json.loads(done.stdout)
    assert {"text", "reasoning", "tokens", "prompt_tokens", "finish_reason", "usage", "timings", "logits_hash", "logprobs",
            "sampling", "device", "fusion"} <= set(answer)
    assert answer["finish_reason"] == "stop"
    assert answer["reasoning"] and answer["text"] and "<think>" not in answer["text"]
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_tokens"])
    assert answer["usage"]["completion_tokens"] == len(answer["tokens"]) == len(answer["logprobs"])
    for entry in answer["logprobs"]:
        assert len(entry["top"]) == 2 and entry["top"][0]["id"] == entry["id"]  # greedy
        assert entry["top"][0]["logprob"] >= entry["top"][1]["logprob"]
    assert answer["sampling"]["temperature"] == {"value": 0.0, "source": "--greedy"}
    assert answer["sampling"]["top_k"]["source"] == "generation_config.json"


def test_presets_follow_the_mode():
    off = json.loads(tandem("run", "-p", "Hi", "--think", "off", "-n", "1", "--json").stdout)["sampling"]
    on = json.loads(tandem("run", "-p", "Hi", "-n", "1", "--json").stdout)["sampling"]
    assert (off["temperature"]["value"], off["top_p"]["value"]) == (0.7, 0.8)
    assert (on["temperature"]["value"], on["top_p"]["value"]) == (0.6, 0.95)


def test_presets_follow_the_documents_mode(tmp_path):
    path = tmp_path / "messages.json"
    for mode, options, temperature in [(False, [], 0.7), (True, [], 0.6), (False, ["--think", "on"], 0.6),
                                       (False, ["--temp", "0.3"], 0.3)]:
        path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}], "enable_thinking": mode}))
        out = tandem("run", "--messages", str(path), "-n", "1", "--json", *options).stdout
        assert json.loads(out)["sampling"]["temperature"]["value"] == temperature, (mode, options)


@pytest.mark.parametrize("template, think, warns", [
    ("qwen3-thinking-2507", "off", True), ("qwen3-thinking-2507", "on", False), ("qwen2.5", "on", True),
    ("qwen2.5", "off", False), ("qwen3", "off", False), ("qwen3", "on", False)])
def test_a_switch_that_a_template_lacks_is_told(template, think, warns):
    done = tandem("run", "-p", "Hi", "-n", "1", "--template", template, "--think", think)
    assert ("warning: --think" in done.stderr) == warns, done.stderr


@pytest.mark.parametrize("template, values", [
    ("qwen3", (0.6, 0.95, 20)), ("qwen3-instruct-2507", (0.7, 0.8, 20)), ("qwen3-instruct-reasoning", (0.7, 0.8, 20)),
    ("qwen3-thinking-2507", (0.6, 0.95, 20)), ("qwen2.5", (1, 1, 0))])
def test_presets_where_there_is_no_generation_config(template, values, tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(pathlib.Path(TINY).resolve() / name)
    out = tandem("run", str(tmp_path), "-p", "Hi", "-n", "1", "--json", "--template", template).stdout
    sampling = json.loads(out)["sampling"]
    assert tuple(sampling[name]["value"] for name in ("temperature", "top_p", "top_k")) == values


def test_stop_and_length():
    base = ["run", "-p", "What is the capital of France?", "--think", "off", "--greedy", "--json"]
    stopped = json.loads(tandem(*base, "--stop", "is Pa").stdout)
    assert stopped["text"] == "The capital of France " and stopped["finish_reason"] == "stop"
    short = json.loads(tandem(*base, "-n", "3").stdout)
    assert short["finish_reason"] == "length" and len(short["tokens"]) == 3


def test_stop_ids():
    """They end an answer as the model's end tokens do: in the ids, not in the text, and in no turn that follows."""
    base = ["run", "-p", "What is the capital of France?", "--think", "off", "--greedy", "--json"]
    whole = json.loads(tandem(*base).stdout)["tokens"]
    stopped = json.loads(tandem(*base, "--stop-id", "8000", "--stop-id", str(whole[3])).stdout)
    assert stopped["tokens"] == whole[:4] and stopped["finish_reason"] == "stop" and stopped["text"] == "The capital of"
    assert "8192" in tandem(*base, "--stop-id", "8192", status=1).stderr
    assert "--stop-id" in tandem(*base, "--stop-id", "x", status=2).stderr
    done = tandem("chat", "--think", "off", "--greedy", "--stop-id", str(whole[3]),
                  text="What is the capital of France?\n/save /dev/stdout\n")
    assert done.stdout.startswith("The capital of\n") and '"content": "The capital of"}' in done.stdout


def test_messages_and_ids_agree_with_the_template(tmp_path):
    messages = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Hi <|im_end|>"}]
    path = tmp_path / "messages.json"
    path.write_text(json.dumps({"messages": messages, "enable_thinking": False}))
    answer = json.loads(tandem("run", "--messages", str(path), "--greedy", "-n", "5", "--json").stdout)
    text = tandem("template", text=path.read_text()).stdout
    assert text.startswith("<|im_start|>system\nYou are a pirate.<|im_end|>\n") and text.endswith("</think>\n\n")
    decoded = tandem("tokenize", "--decode", text=" ".join(map(str, answer["prompt_tokens"]))).stdout
    assert decoded == text + "\n"
    im_end = json.loads(tandem("tokenize", "-p", "<|im_end|>", "--special", "--json").stdout)["ids"]
    assert len(im_end) == 1 and answer["prompt_tokens"].count(im_end[0]) == 2  # the user's own is plain text
    ids = ",".join(map(str, answer["prompt_tokens"]))
    assert json.loads(tandem("run", "--ids", ids, "--greedy", "-n", "5", "--json").stdout)["tokens"] == answer["tokens"]


def test_chat_by_pipe_remembers_and_reuses():
    done = tandem("chat", "--think", "off", "--greedy", text="My name is Mia.\nWhat is my name?\n/stats\n")
    assert "Your name is Mia" in done.stdout
    reused = int(done.stdout.split("tokens, ")[1].split(" reused")[0])
    assert reused > 0


def test_chat_commands(tmp_path):
    saved = tmp_path / "talk.json"
    done = tandem("chat", "--think", "off", "--greedy",
                  text=f"/system You are a pirate.\nHello!\n/regen\n/think on\nHello!\n/save {saved}\n/clear\n/help\n/exit\nnot reached\n")
    document = json.loads(saved.read_text())
    messages = document["messages"] if isinstance(document, dict) else document
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert "/regen" in done.stdout and "[system prompt set]" in done.stderr and "system prompt stays" in done.stderr
    assert tandem("chat", "--think", "off", "--load", str(saved), text="/exit\n").stdout == ""
    tandem("chat", text="/nonsense\n", status=1)
    tandem("chat", text="/load /no/such/file\n", status=1)


def test_chat_takes_a_pipe_as_a_conversation_and_no_nul(tmp_path):
    messages = [{"role": "user", "content": "My name is Mia."}, {"role": "assistant", "content": "Hello Mia!"}]
    os.mkfifo(tmp_path / "fifo")
    with subprocess.Popen(["sh", "-c", f"echo '{json.dumps(messages)}' > {tmp_path}/fifo"]):
        done = tandem("chat", "--think", "off", "--greedy", "--load", str(tmp_path / "fifo"), text="What is my name?\n")
    assert "Mia" in done.stdout and "loaded 2 messages" in done.stderr
    done = tandem("chat", "--think", "off", "--greedy", text="half a \0 question\nWhat is the capital of France?\n", status=1)
    assert done.stdout == "The capital of France is Paris.\n" and "NUL" in done.stderr


def test_chat_recomputes_what_follows_a_thinking_that_goes(tmp_path):
    """Reuse is the longest common beginning of what was computed and of the next prompt, to the token."""
    turns, reply_of = ["What is 23 + 48?", "And what is the capital of France?"], ["--think", "on", "--greedy", "--json"]
    done = tandem("chat", "--think", "on", "--greedy", text="\n".join(turns) + f"\n/stats\n/save {tmp_path}/talk.json\n")
    first = json.loads(tandem("run", "-p", turns[0], *reply_of).stdout)
    assert first["reasoning"]
    held = first["prompt_tokens"] + first["tokens"]
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert messages[1]["reasoning_content"] == first["reasoning"]
    (tmp_path / "next.json").write_text(json.dumps(messages[:3]))
    second = json.loads(tandem("run", "--messages", str(tmp_path / "next.json"), *reply_of).stdout)
    prompt = second["prompt_tokens"]
    common = next(i for i, (a, b) in enumerate(zip(held, prompt)) if a != b)
    assert 0 < common < len(first["prompt_tokens"]) + 4  # the <think> goes
    assert f"{len(prompt)} tokens, {common} reused, {len(prompt) - common} computed" in done.stdout
    assert messages[3]["content"] == second["text"]  # and what was recomputed is what a fresh run computes


@pytest.mark.parametrize("args, status, words", [
    ([], 2, "usage"),
    (["nonsense"], 2, "unknown subcommand"),
    (["run", "--nonsense"], 2, "--nonsense"),
    (["run", "-p", "x", "--temp", "-1"], 2, "--temp"),
    (["run", "-p", "x", "--top-k", "abc"], 2, "--top-k"),
    (["run", "-p", "x", "--think", "maybe"], 2, "on or off"),
    (["run", "-p", "x", "-f", "y"], 2, "one of"),
    (["run", "no/such/model/here", "-p", "x"], 1, "no/such/model/here"),
    (["run", "owner/name", "-p", "x"], 1, "owner/name"),
    (["run", "--ids", "1,99999999"], 1, "99999999"),
    (["run", "--ids", "1,x"], 1, "x"),
    (["run", "--raw", "-p", ""], 1, "empty"),
    (["run", "-p", "word " * 3000], 1, "context"),
    (["run", "-p", "x", "--ctx", "100000"], 1, "2048"),
    (["run", "-p", "x", "--fusion", "what"], 1, "norm_qkv"),
    (["run", "-p", "x", "--kv-type", "q4_0"], 1, "q8_0"),
    (["run", "-p", "x", "--isa", "z80"], 1, "portable"),
    (["run", "-p", "x", "--template", "what"], 2, "qwen3"),
    (["run", "-p", "x", "--logit-bias", "5"], 2, "ID:NUMBER"),
    (["trace", "-p", "x"], 2, "-o"),
    (["trace", "-p", "x", "--tensors", "nothing", "-o", "x"], 1, "nothing"),
    (["trace", "-p", "x", "--path", "t", "-o", "x"], 2, "fused, standard, T or H"),
    (["trace", "--ids", "1,2", "--path", "T", "--positions", "0,2", "-o", "x"], 1, "below 2"),
    (["trace", "--ids", "1,2", "--path", "H", "--positions", "1-0", "-o", "x"], 1, "--positions"),
    (["trace", "--ids", "1,8192", "--path", "T", "-o", "x"], 1, "8192"),
    (["diff", "x"], 2, "two arguments"),
    (["diff", "x", "y", "z"], 2, "\"z\""),
])
def test_errors_name_the_thing(args, status, words):
    done = tandem(*args, text="", status=status)
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("name", ["chat", "run", "tokenize", "template", "inspect", "trace", "diff"])
def test_help(name):
    done = tandem(name, "--help")
    assert done.stdout.startswith(f"usage: tandem {name}") and "--help" in done.stdout


def test_trace_tells_of_a_pattern_that_matches_nothing(tmp_path):
    done = tandem("trace", "--ids", "1,2", "--tensors", "embed,final_norm", "-o", str(tmp_path / "t.safetensors"))
    assert "wrote 1 tensors" in done.stderr and '"final_norm"; a fused op' in done.stderr and '"embed"' not in done.stderr


def test_documents_separated_by_nul():
    good = '[{"role":"user","content":"a"}]'
    two = tandem("template", "-0", text=good + "\0" + good).stdout
    assert two.count("\0") == 2
    bad = tandem("template", "-0", text=good + "\0[]\0" + good, status=1)
    assert bad.stdout.count("\0") == 1 and "document 2" in bad.stderr
    lines = tandem("tokenize", "-0", text="Hello\0\0world\0").stdout.splitlines()
    assert len(lines) == 3 and json.loads(lines[1]) == []


def test_tokenizer_folder_is_enough_for_text(tmp_path):
    for name in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(f"{TINY}/{name}", tmp_path)
    assert tandem("tokenize", str(tmp_path), "-p", "Hello").stdout == tandem("tokenize", "-p", "Hello").stdout
    assert "<|im_start|>" in tandem("template", str(tmp_path), text='[{"role":"user","content":"a"}]').stdout


def test_inspect():
    model = json.loads(tandem("inspect", "--json", "--stats", "--tensors").stdout)
    assert model["architecture"] == "qwen3" and model["chat_template"] == "qwen3" and len(model["tensors"]) == 90
    assert len(model["qk_norms"]) == 8
    assert "KV" in tandem("inspect").stdout
    assert "portable" in tandem("inspect", "--machine").stdout or "cpu/" in tandem("inspect", "--machine").stdout


def test_interrupt_ends_a_run_within_a_step(tmp_path):
    """--json prints what came until then. The prompt comes by a pipe: who opens it has the model loaded."""
    pipe = tmp_path / "prompt"
    os.mkfifo(pipe)
    run = subprocess.Popen([TANDEM, "run", "-f", pipe, "--think", "off", "--ignore-eos", "--json"], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)

    def seconds():
        return sum(map(int, open(f"/proc/{run.pid}/stat").read().rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK")
    pipe.write_text("Tell me a story.")
    before, end = seconds(), time.monotonic() + 60
    while seconds() < before + 0.5 and time.monotonic() < end:  # of which the prompt takes little
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == -signal.SIGINT, err
    assert len(json.loads(out)["tokens"]) > 0
