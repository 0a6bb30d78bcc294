"""tools/plot_bench.py: a picture of what `bench --json` prints."""
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

TANDEM = os.environ.get("TANDEM", "build/tandem")


def test_every_result_is_in_the_picture(tmp_path):
    done = subprocess.run([TANDEM, "bench", "--synthetic", "tiny-qwen3", "--type", "bf16,q8_0", "--prefill", "8,16", "--depth",
                           "0,40", "--batch", "1,3", "--repeat", "2", "--json"], capture_output=True, text=True, check=True)
    run, svg = tmp_path / "run.json", tmp_path / "out.svg"
    run.write_text(done.stdout)
    subprocess.run([sys.executable, "tools/plot_bench.py", str(svg), str(run)], check=True)
    root = ElementTree.parse(svg).getroot()
    titles = [t.text for t in root.iter("{http://www.w3.org/2000/svg}title")]
    results = json.loads(done.stdout)["results"]
    for r in results:
        shown = f"{r['tps']['median']:.4g} ({r['tps']['min']:.4g} to {r['tps']['max']:.4g})"
        if r["kind"] == "prefill" or r["batch"] == 1 or r["depth"] == 0:
            assert any(r["type"] in t and shown in t for t in titles), (r, titles)
    bad = subprocess.run([sys.executable, "tools/plot_bench.py", str(svg), "models/tandem-tiny/config.json"],
                         capture_output=True, text=True, check=False)
    assert bad.returncode != 0 and "tandem bench --json" in bad.stderr
