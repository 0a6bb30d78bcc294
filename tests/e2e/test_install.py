"""make install into a folder: what arrives, whether it runs, and whether a program builds against both libraries."""
import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

TURNS = "What is the capital of France?\nWho are you?\n"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """make with the objects of this build in another folder: another PREFIX changes the program, which others are using."""
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree("build/src", folder / "src")
    return lambda *args: subprocess.run(["make", "-s", f"BUILD={folder}", *args], check=True)


@pytest.fixture(scope="module")
def prefix(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("install")
    make("install", f"DESTDIR={folder}", "PREFIX=/usr")
    return folder / "usr"


def test_files(prefix):
    for name in ["bin/tandem", "lib/libtandem.a", "lib/libtandem.so", "include/tandem.h", "lib/pkgconfig/tandem.pc",
                 "share/man/man1/tandem.1", "share/bash-completion/completions/tandem",
                 "share/tandem/models/tandem-tiny/model.safetensors"]:
        assert (prefix / name).exists(), name
    assert not (prefix / "share/tandem/models/tandem-tiny/golden").exists()
    assert not (prefix / "share/tandem/models/tandem-tiny/training").exists()


def test_exported_symbols(prefix):
    """Both libraries show the public names and no others."""
    for options, name in [(["-g"], "libtandem.a"), (["-D"], "libtandem.so")]:
        output = subprocess.run(["nm", *options, "--defined-only", prefix / "lib" / name], check=True,
                                capture_output=True, text=True).stdout
        symbols = {line.split()[2] for line in output.splitlines() if len(line.split()) == 3}
        assert "tandem_open" in symbols and all(s.startswith("tandem_") for s in symbols), sorted(symbols)[:5]


def test_the_library_brings_no_server(prefix):
    """Who embeds the engine needs neither the HTTP server's library nor the downloader's."""
    output = subprocess.run(["readelf", "-d", prefix / "lib/libtandem.so"], check=True, capture_output=True, text=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line]
    private = (prefix / "lib/pkgconfig/tandem.pc").read_text()
    assert any(name.startswith("libjansson") for name in needed)
    for name in ("curl", "microhttpd"):
        assert not [n for n in needed if name in n] and name not in private, name


def test_the_program_finds_its_model(prefix, tmp_path):
    done = subprocess.run([prefix / "bin/tandem", "run", "--greedy", "--think", "off", "-p",
                           "What is the capital of France?"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "Paris" in done.stdout


@pytest.mark.parametrize("static", [True, False], ids=["static", "shared"])
def test_example(prefix, tmp_path, static):
    env = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib/pkgconfig"), "LD_LIBRARY_PATH": str(prefix / "lib")}
    command = ["pkg-config", f"--define-variable=prefix={prefix}", "--cflags", "--libs", "tandem"]
    flags = shlex.split(subprocess.run(command + ["--static"] * static, env=env, check=True, capture_output=True,
                                       text=True).stdout)
    if static:
        flags = ["-l:libtandem.a" if flag == "-ltandem" else flag for flag in flags]
    program = tmp_path / "chat"
    subprocess.run(["gcc", "-std=c17", "-Wall", "-Wextra", "-Werror", "examples/chat.c", "-o", program, *flags], check=True)
    model = pathlib.Path("models/tandem-tiny").resolve()
    done = subprocess.run([program, model], input=TURNS, env=env, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and "Paris" in lines[0] and "Tandem Tiny" in lines[1]


def test_uninstall(make, tmp_path):
    for verb in ("install", "uninstall"):
        make(verb, f"DESTDIR={tmp_path}", "PREFIX=/opt/tandem")
    assert [p for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink()] == []


def test_no_function_takes_the_place_of_a_librarys():
    """A global name that a linked library has, too, would be called by whoever means the library's."""
    def names(*command):
        output = subprocess.run(["nm", *command], check=True, capture_output=True, text=True).stdout
        return {line.split()[2].split("@")[0] for line in output.splitlines() if len(line.split()) == 3}
    program = os.environ.get("TANDEM", "build/tandem")
    ours = names("-g", "--defined-only", "build/libtandem_all.a")
    assert "tandem_open" in ours
    needed = subprocess.run(["readelf", "-d", program], check=True, capture_output=True, text=True).stdout
    loaded = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    paths = [line.split()[2] for line in loaded.splitlines() if "=>" in line and f"[{line.split()[0]}]" in needed]
    assert any("jansson" in p for p in paths) and any("libc.so" in p for p in paths)
    for path in paths:
        assert not ours & names("-D", "-g", "--defined-only", path), path
