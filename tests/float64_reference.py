"""The Qwen3.5 text model in float64 NumPy, from the formulas alone: the number the float32 implementations should give.

In: a checkpoint folder in the released layout and token ids of one sequence. Out: logits, hidden states, drafts of the
MTP head, and on request every state on the way. No cache, no batch, no speed, and no code shared with qwen_mlx or
transformers.

Shapes: T tokens, D hidden, V vocabulary, Hq/Hkv attention heads, Hk/Hv delta-rule heads of sizes Dk/Dv, K taps. Linear
layers are y = x Wᵀ. Gated delta rule: arXiv 2412.06464, eq. 10. Rotary embedding: arXiv 2104.09864, eq. 34.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

TRUNK = "model.language_model."


def logits(folder: Path, ids: list[int]) -> np.ndarray:
    """Next-token logits [T, V] after each of `ids`."""
    return Reference(folder).logits(ids)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit_rms(x: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps)"""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def unit_length(x: np.ndarray) -> np.ndarray:
    """x / sqrt(sum(x²) + 1e-6)"""
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a bfloat16 or float32 file as float64. Format: header length, JSON header, raw values."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = content[start + first : start + last]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, {"F32": np.float32}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors


class Reference:
    """One checkpoint; every method takes a single whole sequence.

    `trace`, where given, is filled with `layers`, `mixers`, `mlps` (lists of [T, D]) and, per layer i, `recurrent_i`
    [Hv, Dk, Dv] and `conv_i` [channels, K-1], or `keys_i` and `values_i` [Hkv, T, head_dim].
    """

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())["text_config"]
        self.weights = read_safetensors(folder / "model.safetensors")
        self.embedding = self.weights[TRUNK + "embed_tokens.weight"]
        self.head = self.embedding if self.config["tie_word_embeddings"] else self.weights["lm_head.weight"]

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T] -> [T, V]"""
        return self.hidden(ids) @ self.head.T

    def hidden(self, ids: list[int], trace: dict[str, Any] | None = None) -> np.ndarray:
        """[T] -> [T, D], after the final norm: what the head and the MTP head see."""
        trace = {} if trace is None else trace
        trace |= {"layers": [], "mixers": [], "mlps": []}
        x = self.embedding[ids]
        for i, kind in enumerate(self.config["layer_types"]):
            x = self.layer(f"{TRUNK}layers.{i}.", kind, x, trace, i)
        return self.norm(x, TRUNK + "norm")

    def mtp(self, hidden: np.ndarray, next_ids: list[int]) -> np.ndarray:
        """Hidden states [T, D] of the trunk (further slots: of this head) and the token after each -> [T, D]; times the
        head's matrix these are logits for the token after the next."""
        embedded = self.norm(self.embedding[next_ids], "mtp.pre_fc_norm_embedding")
        both = np.concatenate([embedded, self.norm(hidden, "mtp.pre_fc_norm_hidden")], -1)
        trace: dict[str, Any] = {"layers": [], "mixers": [], "mlps": []}
        x = self.layer("mtp.layers.0.", "full_attention", self.linear(both, "mtp.fc"), trace, 0)
        return self.norm(x, "mtp.norm")

    def drafts(self, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
        """Greedy drafts for the tokens after the next one, and the logits [count, V] they were taken from."""
        hidden = self.hidden(ids)
        tokens, rows = [*ids[1:], int((hidden[-1] @ self.head.T).argmax())], []
        for _ in range(count):
            last = self.mtp(hidden, tokens)[-1:]
            rows.append((last @ self.head.T)[0])
            tokens.append(int(rows[-1].argmax()))
            hidden = np.concatenate([hidden, last])
        return tokens[-count:], np.stack(rows)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """RMSNorm with a zero-centred gain."""
        return unit_rms(x, self.config["rms_norm_eps"]) * (1 + self.weights[name + ".weight"])

    def layer(self, prefix: str, kind: str, x: np.ndarray, trace: dict[str, Any], index: int) -> np.ndarray:
        h = self.norm(x, prefix + "input_layernorm")
        if kind == "full_attention":
            mixed = self.attention(prefix + "self_attn.", h, trace, index)
        else:
            mixed = self.gated_deltanet(prefix + "linear_attn.", h, trace, index)
        x = x + mixed
        h = self.norm(x, prefix + "post_attention_layernorm")
        feed = self.mixture if "num_experts" in self.config else self.mlp
        fed = feed(prefix + "mlp.", h)
        x = x + fed
        for name, values in (("layers", x), ("mixers", mixed), ("mlps", fed)):
            trace[name].append(values)
        return x

    def attention(self, prefix: str, x: np.ndarray, trace: dict[str, Any], index: int) -> np.ndarray:
        """Causal attention whose output is gated per head and channel by sigmoid of the second half of q_proj."""
        c, length = self.config, len(x)
        heads, kv_heads, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        q, gate = np.split(self.linear(x, prefix + "q_proj").reshape(length, heads, 2 * size), 2, -1)
        k = self.linear(x, prefix + "k_proj").reshape(length, kv_heads, size)
        v = self.linear(x, prefix + "v_proj").reshape(length, kv_heads, size)
        q, k = self.rotate(self.norm(q, prefix + "q_norm")), self.rotate(self.norm(k, prefix + "k_norm"))
        trace |= {f"keys_{index}": k.swapaxes(0, 1), f"values_{index}": v.swapaxes(0, 1)}
        k, v = (np.repeat(y, heads // kv_heads, 1) for y in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        out = np.einsum("hts,shd->thd", softmax(scores), v) * sigmoid(gate)
        return self.linear(out.reshape(length, -1), prefix + "o_proj")

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of x [T, H, head_dim] at positions 0..T-1: pairs (j, j + R/2) of the first R channels.

        In text the three position axes are equal, so that their interleaving does not show.
        """
        rotary = int(x.shape[-1] * self.config["rope_parameters"]["partial_rotary_factor"])
        frequencies = self.config["rope_parameters"]["rope_theta"] ** (-np.arange(0, rotary, 2) / rotary)
        angle = (np.arange(len(x))[:, None] * frequencies)[:, None]
        a, b = np.split(x[..., :rotary], 2, -1)
        turned = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
        return np.concatenate([*turned, x[..., rotary:]], -1)

    def gated_deltanet(self, prefix: str, x: np.ndarray, trace: dict[str, Any], index: int) -> np.ndarray:
        """Per head, with S [Dk, Dv] from 0: S ← alpha S; S ← S + k (beta (v - Sᵀk))ᵀ; o = Sᵀq; then norm and gate."""
        c, w, length = self.config, self.weights, len(x)
        key_heads, heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
        key_size, size, taps = c["linear_key_head_dim"], c["linear_value_head_dim"], c["linear_conv_kernel_dim"]
        qkv = self.linear(x, prefix + "in_proj_qkv")
        padded = np.concatenate([np.zeros((taps - 1, qkv.shape[1])), qkv])
        kernel = w[prefix + "conv1d.weight"][:, 0]
        mixed = silu(sum(padded[i : i + length] * kernel[:, i] for i in range(taps)))
        q, k, v = np.split(mixed, [key_heads * key_size, 2 * key_heads * key_size], -1)
        q, k = (unit_length(y.reshape(length, key_heads, key_size)) for y in (q, k))
        q, k = (np.repeat(y, heads // key_heads, 1) for y in (q / math.sqrt(key_size), k))
        v = v.reshape(length, heads, size)
        beta = sigmoid(self.linear(x, prefix + "in_proj_b"))
        step = np.logaddexp(0, self.linear(x, prefix + "in_proj_a") + w[prefix + "dt_bias"])
        alpha = np.exp(-np.exp(w[prefix + "A_log"]) * step)
        state = np.zeros((heads, key_size, size))
        out = np.empty((length, heads, size))
        for t in range(length):
            state = alpha[t][:, None, None] * state
            delta = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t][:, :, None] * delta[:, None, :]
            out[t] = np.einsum("hkv,hk->hv", state, q[t])
        trace |= {f"recurrent_{index}": state, f"conv_{index}": padded[1 - taps :].T}
        z = self.linear(x, prefix + "in_proj_z").reshape(length, heads, size)
        out = unit_rms(out, c["rms_norm_eps"]) * w[prefix + "norm.weight"] * silu(z)
        return self.linear(out.reshape(length, -1), prefix + "out_proj")

    def mlp(self, prefix: str, x: np.ndarray) -> np.ndarray:
        hidden = silu(self.linear(x, prefix + "gate_proj")) * self.linear(x, prefix + "up_proj")
        return self.linear(hidden, prefix + "down_proj")

    def mixture(self, prefix: str, x: np.ndarray) -> np.ndarray:
        """The k most probable experts, weights renormalised to 1, plus a shared expert under a gate of its own."""
        probabilities = softmax(self.linear(x, prefix + "gate"))
        chosen = np.argsort(-probabilities, -1, kind="stable")[:, : self.config["num_experts_per_tok"]]
        weights = np.zeros_like(probabilities)
        np.put_along_axis(weights, chosen, np.take_along_axis(probabilities, chosen, -1), -1)
        weights /= weights.sum(-1, keepdims=True)
        out = sigmoid(self.linear(x, prefix + "shared_expert_gate")) * self.mlp(prefix + "shared_expert.", x)
        gate_up, down = (self.weights[f"{prefix}experts.{name}"] for name in ("gate_up_proj", "down_proj"))
        for expert in range(len(down)):
            gate, up = np.split(x @ gate_up[expert].T, 2, -1)
            out = out + weights[:, expert, None] * ((silu(gate) * up) @ down[expert].T)
        return out
