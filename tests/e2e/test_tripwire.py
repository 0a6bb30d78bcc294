"""NaN and Inf in logits, through the program: nothing is sampled, and the first op that went bad is named."""
import json
import os
import subprocess

import numpy as np
import pytest

from test_model_files import CONFIG, make_model

TANDEM = os.environ.get("TANDEM", "build/tandem")

# Weights that are finite, and overflow where they act: tensor, layer, what the error names.
FINITE = {
    "self_attn.q_proj": ("matmul (the q projection)", "of q"),
    "mlp.gate_proj": ("matmul (the gate projection)", "of gate"),
    "mlp.down_proj": ("matmul (the down projection)", "channel 5 of mlp_out"),
}


@pytest.mark.parametrize("fusion", ["on", "off"])
@pytest.mark.parametrize("name", FINITE)
def test_the_first_op_is_named(tmp_path, name, fusion):
    def spoil(tensors):
        tensors[f"model.layers.1.{name}.weight"][5] = 3e38

    folder, _ = make_model(tmp_path / "m", CONFIG, change=spoil)
    done = subprocess.run([TANDEM, "run", folder, "--ids", "5,6,7", "-n", "4", "--greedy", "--json", "--fusion", fusion],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["finish_reason"] == "error" and answer["tokens"] == []
    op, where = FINITE[name]
    for text in (answer["error"], done.stderr):
        assert "nothing was sampled" in text and "in layer 1 " in text and op in text and where in text, text
