"""tools/gpu-kernels: a table of what Nsight Compute says; here a script in its place."""
import subprocess

HEADER = '"ID","Process ID","Process Name","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"'
ROWS = [
    '"0","1","tandem","k_pack_rows(__nv_bfloat16 *, unsigned long)","(12, 1, 1)","gpu__time_duration.sum","ns","9,000,000"',
    '"1","1","tandem","void k_tile<bf16_weights, 3, 2, 4>(product_args, int)","(96, 2, 1)","gpu__time_duration.sum","ns","28,000"',
    '"2","1","tandem","void k_tile<bf16_weights, 3, 2, 4>(product_args, int)","(96, 2, 1)","gpu__time_duration.sum","us","30"',
    '"3","1","tandem","k_store(int)","(1, 1, 1)","gpu__time_duration.sum","ns","2,000"',
]


def run(tmp_path, rows, status=0):
    fake = tmp_path / "ncu"
    lines = ["==PROF== Connected", HEADER, *rows, "decode 16   1,000.0"]
    fake.write_text("#!/bin/sh\necho \"$@\" > \"$0.args\"\ncat <<'END'\n" + "\n".join(lines) + f"\nEND\nexit {status}\n")
    fake.chmod(0o755)
    return subprocess.run(["tools/gpu-kernels", "--ncu", str(fake), "--tandem", "some/tandem", "--decode", "--batch", "32"],
                          capture_output=True, text=True, check=False), fake


def test_the_table(tmp_path):
    done, fake = run(tmp_path, ROWS)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "ncu.args").read_text()
    assert "some/tandem bench --device cuda" in asked and asked.rstrip().endswith("--decode --batch 32"), (asked, fake)
    lines = [line.split(None, 3) for line in done.stdout.splitlines()[1:]]
    assert lines == [["2", "29.0", "96.7%", "k_tile<bf16_weights, 3, 2, 4> (96,2,1)"], ["1", "2.0", "3.3%", "k_store (1,1,1)"]]


def test_nothing_measured_is_an_error(tmp_path):
    done, _ = run(tmp_path, [], status=1)
    assert done.returncode == 1 and "status 1, 0 kernels" in done.stderr and "==PROF== Connected" in done.stdout
    done, _ = run(tmp_path, ROWS, status=3)
    assert done.returncode == 1 and "status 3" in done.stderr
    missing = subprocess.run(["tools/gpu-kernels", "--ncu", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert missing.returncode == 1 and "Nsight Compute" in missing.stderr
