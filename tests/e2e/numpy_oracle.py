"""A decoder-only transformer in NumPy float64, from the formulas of the papers. It shares no code with the engine.

RMSNorm: Zhang and Sennrich 2019. RoPE: Su et al. 2021, in the half-split pairing of Hugging Face. Grouped-query attention:
Ainslie et al. 2023. SwiGLU: Shazeer 2020. `weights` maps Hugging Face's tensor names to float64 arrays.
"""
import numpy as np


def rmsnorm(x, w, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * w


def rope(x, theta):
    """x: [T, heads, dim]; position t is row t."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    lo, hi = x[..., :half], x[..., half:]
    return np.concatenate([lo * cos - hi * sin, hi * cos + lo * sin], axis=-1)


def attention(q, k, v):
    """q: [T, heads, dim], k, v: [T, kv_heads, dim]; causal."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    s = np.einsum("thd,uhd->htu", q, k) / np.sqrt(q.shape[-1])
    s = np.where(np.tril(np.ones(s.shape[1:], bool)), s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return np.einsum("htu,uhd->thd", p, v).reshape(len(q), -1)


def forward(weights, ids, *, n_layers, n_heads, n_kv_heads, head_dim, eps, theta):
    """Logits [T, vocabulary] of one sequence. q/k norms and biases are applied where the weights have them."""
    w = weights
    embed = w["model.embed_tokens.weight"]
    x = embed[ids]
    for i in range(n_layers):
        p = f"model.layers.{i}."
        h = rmsnorm(x, w[p + "input_layernorm.weight"], eps)

        def project(name, heads):
            y = h @ w[p + f"self_attn.{name}_proj.weight"].T + w.get(p + f"self_attn.{name}_proj.bias", 0)
            y = y.reshape(len(ids), heads, head_dim)
            norm = w.get(p + f"self_attn.{name}_norm.weight")
            return y if norm is None else rmsnorm(y, norm, eps)

        q, k, v = rope(project("q", n_heads), theta), rope(project("k", n_kv_heads), theta), project("v", n_kv_heads)
        x = x + attention(q, k, v) @ w[p + "self_attn.o_proj.weight"].T
        h = rmsnorm(x, w[p + "post_attention_layernorm.weight"], eps)
        gate = h @ w[p + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
    return rmsnorm(x, w["model.norm.weight"], eps) @ w.get("lm_head.weight", embed).T
