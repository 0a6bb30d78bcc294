"""Help, man page, completion and README name the same subcommands and options."""
import os
import pathlib
import re
import shutil
import subprocess

import pytest

TANDEM = os.environ.get("TANDEM", "build/tandem")


def output(*args):
    return subprocess.run([TANDEM, *args], check=True, capture_output=True, text=True).stdout


COMMANDS = re.findall(r"^  ([a-z]+) +\S", output("help"), re.M)


def options(command):
    return re.findall(r"^  (?:-., |    )(--[a-z-]+)", output(command, "--help"), re.M)


def man_page():
    return pathlib.Path("packaging/tandem.1").read_text(encoding="utf-8").replace("\\-", "-")


def complete(*words):
    """What bash offers for the last word."""
    script = ('PATH=$1:$PATH; source packaging/tandem.bash; shift; COMP_WORDS=(tandem "$@"); COMP_CWORD=$#; _tandem; '
              'printf "%s\\n" "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", script, "bash", pathlib.Path(TANDEM).resolve().parent, *words], check=True,
                          capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_table_is_whole():
    assert set(COMMANDS) == {"chat", "run", "serve", "tokenize", "template", "inspect", "check", "trace", "diff", "bench",
                             "replay", "perplexity", "quantize", "pull"}
    assert output("--help") == output("help") == output("-h")


@pytest.mark.parametrize("command", COMMANDS)
def test_subcommand(command):
    text = output(command, "--help")
    assert text.startswith(f"usage: tandem {command} ") and "--help" in options(command)
    assert output(command, "-h") == output("help", command) == text
    assert max(map(len, text.splitlines())) <= 132
    assert re.search(rf"^\.B {command}$", man_page(), re.M), "not in the man page"
    missing = [o for o in options(command) if not re.search(rf"{o}(?![a-z-])", man_page()) and o != "--help"]
    assert not missing, f"not in the man page: {missing}"
    assert f"`tandem {command}" in pathlib.Path("README.md").read_text(encoding="utf-8")
    assert set(options(command)) <= set(complete(command, "--"))


def test_completion():
    assert set(COMMANDS) <= set(complete(""))
    assert complete("perp") == ["perplexity"]
    assert complete("run", "--think", "") == ["on", "off"]
    assert complete("run", "models/tandem-ti") == ["models/tandem-tiny"]
    assert "--include" in complete("pull", "--i") and "--include" not in complete("run", "--i")


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
def test_man_page_has_no_warnings():
    done = subprocess.run(["groff", "-man", "-ww", "-Tutf8", "packaging/tandem.1"], check=True, capture_output=True, text=True)
    assert done.stderr == "" and "--device" in re.sub("\x1b\\[[0-9;]*m|.\b", "", done.stdout)


DOCS = [p for p in (pathlib.Path("README.md"), *sorted(pathlib.Path("docs").glob("*.md")), pathlib.Path("CONTRIBUTING.md"))]


@pytest.mark.parametrize("path", DOCS, ids=str)
def test_documents_show_what_there_is(path):
    """Every command line of tandem's, in a block or between backquotes: its subcommand and its options exist."""
    text = path.read_text(encoding="utf-8")
    lines = re.findall(r"^ {4,}(?:\$ )?((?:build/)?tandem [^\n]*)", text, re.M) + re.findall(r"`((?:build/)?tandem [^`]*)`", text)
    for line in lines:
        words = re.split(r"\s+[|#>]|\s{3,}", line)[0].split()[1:]
        if not words or not re.fullmatch(r"[a-z]+", words[0]):
            continue  # SUBCOMMAND, --version
        assert words[0] in COMMANDS or words[0] == "help", line
        known = options(words[0])
        unknown = [w for w in words[1:] if re.match(r"--[a-z]", w) and re.match(r"--[a-z-]+", w)[0] not in known]
        assert not unknown, (line, unknown)
    for target in re.findall(r"^ {4}make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{target}:|^\.PHONY:.*\b{target}\b", pathlib.Path("Makefile").read_text(encoding="utf-8"), re.M), target


@pytest.mark.parametrize("path", DOCS, ids=str)
def test_documents_name_files_that_exist(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / name).exists(), name
    for name in re.findall(r"`((?:src|tests|tools|docs|include|examples|models|packaging)/[\w./-]+)`", text):
        assert pathlib.Path(name.rstrip(".")).exists(), name
