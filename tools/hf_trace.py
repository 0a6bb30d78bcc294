#!/usr/bin/env python3
"""Writes a trace of a Qwen3, Qwen2 or Llama model in transformers, under the names of `tandem trace`, so that `tandem diff`
says where the two part.

    python3 tools/hf_trace.py MODEL -p TEXT -o hf.safetensors
    tandem trace MODEL -p TEXT --tensors '*' --path standard -o mine.safetensors
    tandem diff hf.safetensors mine.safetensors --report diff.html

MODEL is a folder, or a name that transformers knows. The prompt is plain text in which special tokens count, as in
`tandem trace`. Needs torch, transformers and safetensors (tests/requirements-hf.txt). To trace another engine, write the
same names by your own means: a tensor [T, columns] each, `ids` [T] as int32; metadata "precision" (f64, f32, bf16, f16)
tells `tandem diff` how coarse its arithmetic is.
"""
import argparse
import fnmatch
import importlib
import sys

DTYPES = {"bf16": "bfloat16", "f32": "float32", "f16": "float16", "f64": "float64"}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL")
    prompt = p.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT")
    prompt.add_argument("--ids", metavar="1,2,3")
    prompt.add_argument("--ids-file", metavar="FILE")
    p.add_argument("-o", "--output", metavar="FILE", required=True)
    p.add_argument("--tensors", metavar="GLOB,...", default="*", help="which tensors (default: all)")
    p.add_argument("--positions", metavar="LIST", help="rows to write, as in 0,10-20,-1 (default: all)")
    p.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of weights and activations (default bf16)")
    p.add_argument("--attention", default="eager", metavar="NAME", help="eager (default), sdpa, flash_attention_2, ...")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    return p.parse_args()


def fail(message):
    sys.exit(f"hf_trace.py: {message}")


def select_positions(text, n):
    """"0,10-20,-1" to ascending positions below n; None: all."""
    if text is None:
        return list(range(n))
    chosen = set()
    for part in text.split(","):
        first, dash, last = part[1:].partition("-") if part.startswith("-") else part.partition("-")
        try:
            first = -int(first) if part.startswith("-") else int(first)
            last = int(last) if dash else first
        except ValueError:
            fail(f'--positions: expected a list like 0,10-20,-1, found "{text}"')
        first, last = (p + n if p < 0 else p for p in (first, last))
        if not 0 <= first <= last < n:
            fail(f"--positions: expected positions below {n}, found {part}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


class Recorder:
    """Hooks on a model's modules; keeps the rows [positions, columns] of every wanted tensor."""

    def __init__(self, model, globs, rows):
        self.globs, self.rows, self.tensors, self.layer = globs.split(","), rows, {}, None
        base = model.model
        self.after(base.embed_tokens, "embed")
        for i, layer in enumerate(base.layers):
            p = f"layers.{i}."
            attn, mlp = layer.self_attn, layer.mlp
            attn.register_forward_pre_hook(lambda *_, p=p, **__: setattr(self, "layer", p), with_kwargs=True)
            self.after(layer.input_layernorm, p + "attn_norm")
            for name in "qkv":
                self.after(getattr(attn, name + "_proj"), p + name)
            for name in ("q_norm", "k_norm"):
                if hasattr(attn, name):
                    self.after(getattr(attn, name), p + name)
            self.before(attn.o_proj, p + "attn")
            self.after(attn.o_proj, p + "attn_out")
            self.before(layer.post_attention_layernorm, p + "resid_mid")
            self.after(layer.post_attention_layernorm, p + "mlp_norm")
            self.after(mlp.gate_proj, p + "gate")
            self.after(mlp.up_proj, p + "up")
            self.before(mlp.down_proj, p + "act")
            self.after(mlp.down_proj, p + "mlp_out")
            self.after(layer, p + "resid")
        self.after(base.norm, "final_norm")
        self.watch_rope(importlib.import_module(type(base).__module__))

    def keep(self, name, value):
        """value: [1, T, ...]"""
        if any(fnmatch.fnmatchcase(name, g) for g in self.globs):
            value = value[0] if isinstance(value, tuple) else value
            self.tensors[name] = value[0].flatten(1)[self.rows].detach().to("cpu", copy=True).contiguous()

    def after(self, module, name):
        module.register_forward_hook(lambda _, __, out: self.keep(name, out))

    def before(self, module, name):
        module.register_forward_pre_hook(lambda _, args: self.keep(name, args[0]))

    def watch_rope(self, module):
        """q and k after RoPE come from a function of the model's module: [1, heads, T, head_dim]."""
        rotate = module.apply_rotary_pos_emb

        def watched(*args, **kwargs):
            q, k = rotate(*args, **kwargs)
            self.keep(self.layer + "q_rope", q.transpose(1, 2))
            self.keep(self.layer + "k_rope", k.transpose(1, 2))
            return q, k

        module.apply_rotary_pos_emb = watched


def main():
    options = arguments()
    try:
        import torch
        import transformers
        from safetensors.torch import save_file
    except ImportError as error:
        fail(f"{error}: pip install -r tests/requirements-hf.txt")
    if options.prompt is not None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        ids = tokenizer(options.prompt, add_special_tokens=False)["input_ids"]
    else:
        text = options.ids if options.ids is not None else open(options.ids_file, encoding="ascii").read()
        try:
            ids = [int(i) for i in text.replace(",", " ").split()]
        except ValueError:
            fail("expected token ids separated by commas or spaces")
    if not ids:
        fail("the prompt is empty: expected at least one token")
    rows = select_positions(options.positions, len(ids))

    dtype = getattr(torch, DTYPES[options.dtype])
    type_option = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, attn_implementation=options.attention, **{type_option: dtype})
    config = model.config
    if config.model_type not in ("qwen3", "qwen2", "llama"):
        fail(f"unsupported model_type {config.model_type}: expected qwen3, qwen2 or llama")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        fail(f"expected ids below {config.vocab_size}, found {min(ids)} to {max(ids)}")
    recorder = Recorder(model.to(options.device).eval(), options.tensors, rows)
    with torch.no_grad():
        logits = model(torch.tensor([ids], device=options.device), use_cache=False).logits
    recorder.keep("logits", logits)
    if not recorder.tensors:
        fail(f'no tensor matches "{options.tensors}"')

    tensors = {"ids": torch.tensor(ids, dtype=torch.int32)} | recorder.tensors
    if len(rows) < len(ids):
        tensors["positions"] = torch.tensor(rows, dtype=torch.int32)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # In float64, too, transformers computes norms, RoPE's angles and softmax in float32.
    precision = "f32" if options.dtype == "f64" else options.dtype
    save_file(tensors, options.output, {
        "producer": "transformers", "version": transformers.__version__, "path": f"{options.dtype}, {options.attention}",
        "precision": precision, "device": f"torch/{options.device}", "model": options.model,
        "n_heads": str(config.num_attention_heads), "n_kv_heads": str(config.num_key_value_heads),
        "head_dim": str(head_dim)})
    print(f"wrote {len(recorder.tensors)} tensors of {len(rows)} tokens to {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
