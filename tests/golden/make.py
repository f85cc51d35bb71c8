"""Writes the golden files: what transformers' own Qwen3.5 computes from the checkpoints of `checkpoints.py`.

`python -m tests.golden.make [variant ...]` needs torch and transformers. In: the recipes of the checkpoints, which are
written to a temporary folder and read back by transformers. Out: `<variant>.npz` beside this file, float32 on the CPU
with eager attention; README.md names every array. It knows nothing of qwen_mlx.
"""

import copy
import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.golden.checkpoints import ENDOFTEXT, ORDINARY_IDS, VARIANTS, VOCAB_SIZE, build
from tests.golden.compare import BATCH_LENGTHS, GREEDY_LENGTHS, LENGTHS, MTP_LENGTHS, mean_kl, sketch

Arrays = dict[str, np.ndarray]
COLUMNS = np.sort(np.random.RandomState(48).permutation(VOCAB_SIZE)[:48])
POSITIONS = np.array([0, 1, 31, 63, 64])
MARGIN = 2e-3
"""Every recorded best logit leads by this much, four tolerances: an equal token is then no matter of luck."""


def main(variants: list[str]) -> None:
    torch.set_grad_enabled(False)
    for variant in variants or VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = build(variant, Path(folder))
            arrays = golden(checkpoint)
        path = Path(__file__).with_name(f"{variant}.npz")
        np.savez_compressed(path, **arrays)
        figures = {name: value for name, value in arrays.items() if value.ndim == 0 and value.dtype.kind == "f"}
        print(f"{variant}: {path.stat().st_size} bytes;", *(f"{name} {value:.3g}" for name, value in figures.items()))


def golden(checkpoint: Path) -> Arrays:
    """Every array of one golden file."""
    model = _read(checkpoint, torch.float32)
    digest = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
    arrays: Arrays = {"checkpoint_sha256": np.array(digest), "columns": COLUMNS, "positions": POSITIONS}
    prompts = {n: _clear_prompt(model, n, seed=1000 + n) for n in LENGTHS}
    logits = {n: _logits(model, ids) for n, ids in prompts.items()}
    arrays["largest_logit"] = np.array(max(np.abs(rows).max() for rows in logits.values()))
    for n in LENGTHS:
        arrays |= {
            f"prompt_{n}_ids": np.array(prompts[n], np.int32),
            f"prompt_{n}_last": logits[n][-1],
            f"prompt_{n}_columns": logits[n][:, COLUMNS],
            f"prompt_{n}_argmax": logits[n].argmax(-1).astype(np.int32),
        }
    arrays |= _inside(model, prompts[65])
    arrays |= _greedy(model, {n: prompts[n] for n in GREEDY_LENGTHS})
    arrays |= _left_padded(model)
    arrays |= _mtp(model, load_file(checkpoint / "model.safetensors"), {n: prompts[n] for n in MTP_LENGTHS})
    half = _read(checkpoint, torch.bfloat16)
    for n in (65, 300):
        rough = _logits(half, prompts[n])
        arrays[f"bf16_kl_{n}"] = np.array(mean_kl(logits[n], rough))
        arrays[f"bf16_largest_{n}"] = np.array(np.abs(logits[n] - rough).max())
        arrays[f"bf16_argmax_{n}"] = np.array((logits[n].argmax(-1) == rough.argmax(-1)).mean())
    return arrays


def _read(checkpoint: Path, dtype: torch.dtype) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    if any(info.values()):
        raise RuntimeError(f"transformers did not take the checkpoint as it is: {info}")
    return model.eval()


def _logits(model: Any, ids: list[int]) -> np.ndarray:
    """[T] -> [T, V]"""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def _continue(model: Any, ids: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Greedy tokens through the cache and the logits [steps, V] they were taken from."""
    output = model(input_ids=torch.tensor([ids]), use_cache=True)
    tokens, rows = [], []
    for _ in range(steps):
        rows.append(output.logits[0, -1].numpy())
        tokens.append(int(rows[-1].argmax()))
        output = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
    return tokens, np.stack(rows)


def _is_clear(logits: np.ndarray) -> bool:
    best_two = np.sort(logits, -1)[..., -2:]
    return bool((best_two[..., 1] - best_two[..., 0]).min() > MARGIN)


def _clear_prompt(model: Any, length: int, seed: int) -> list[int]:
    """Random plain ids, of the first seed (in steps of 10000) for which prompt and continuation have clear argmaxes."""
    while True:
        ids = np.random.RandomState(seed).randint(0, ORDINARY_IDS, length).tolist()
        if _is_clear(_logits(model, ids)) and _is_clear(_continue(model, ids, 32)[1]):
            return ids
        seed += 10000


def _inside(model: Any, ids: list[int]) -> Arrays:
    """Outputs of layers, mixers and MLPs at POSITIONS, and the whole cache, after one prefill."""
    seen: dict[str, list[np.ndarray]] = {"layers": [], "mixers": [], "mlps": [], "final_norm": []}

    def record(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            seen[name].append(values.reshape(len(ids), -1).numpy()[POSITIONS])

        return hook

    trunk = model.model
    modules = [(trunk.norm, "final_norm")]
    for layer in trunk.layers:
        mixer = layer.linear_attn if hasattr(layer, "linear_attn") else layer.self_attn
        modules += [(layer, "layers"), (mixer, "mixers"), (layer.mlp, "mlps")]
    hooks = [module.register_forward_hook(record(name)) for module, name in modules]
    cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    arrays = {name: np.stack(values) for name, values in seen.items() if name != "final_norm"}
    arrays["final_norm"] = seen["final_norm"][0]
    for i, state in enumerate(cache.layers):
        if trunk.config.layer_types[i] == "linear_attention":
            arrays |= sketch(f"recurrent_{i}", state.recurrent_states[0][0].numpy())
            arrays |= sketch(f"conv_{i}", state.conv_states[0][0, :, -3:].numpy())
        else:
            arrays |= sketch(f"keys_{i}", state.keys[0].numpy())
            arrays |= sketch(f"values_{i}", state.values[0].numpy())
    return arrays


def _greedy(model: Any, prompts: dict[int, list[int]], steps: int = 32) -> Arrays:
    arrays: Arrays = {}
    worst = 0.0
    for n, ids in prompts.items():
        tokens, rows = _continue(model, ids, steps)
        arrays[f"greedy_{n}_tokens"] = np.array(tokens, np.int32)
        arrays[f"greedy_{n}_columns"] = rows[:, COLUMNS]
        arrays[f"greedy_{n}_last"] = rows[-1]
        worst = max(worst, np.abs(_logits(model, ids + tokens[:-1])[n - 1 :] - rows).max())
    return arrays | {"self_cached": np.array(worst)}


def _left_padded(model: Any, steps: int = 12) -> Arrays:
    """The prompts of BATCH_LENGTHS, padded on the left to the longest, prefilled and continued as one batch."""
    prompts = [_clear_prompt(model, n, seed=2000 + n) for n in BATCH_LENGTHS]
    longest = max(BATCH_LENGTHS)
    ids = np.full((len(prompts), longest), ENDOFTEXT)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    rows = torch.stack(output.logits, 1).numpy()
    alone = np.stack([_continue(model, prompt, steps)[1] for prompt in prompts])
    return {
        "batch_ids": ids.astype(np.int32),
        "batch_mask": mask.astype(np.int32),
        "batch_first": rows[:, 0],
        "batch_last": rows[:, -1],
        "batch_tokens": output.sequences[:, longest:].numpy().astype(np.int32),
        "self_padded": np.array(np.abs(rows - alone).max()),
    }


def _mtp(model: Any, tensors: dict[str, torch.Tensor], prompts: dict[int, list[int]], drafts: int = 4) -> Arrays:
    """transformers skips `mtp.*`: the head is put together here from its decoder layer and its norm.

    Slot i takes the trunk's hidden state i after the final norm and token i + 1; a further slot takes the head's own
    last output and the token drafted from it.
    """
    head = _mtp_head(model, tensors)
    arrays: Arrays = {}
    for n, ids in prompts.items():
        hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state
        tokens = [*ids[1:], int(model.lm_head(hidden)[0, -1].argmax())]
        rows: list[np.ndarray] = []
        for step in range(drafts):
            output = head(hidden, torch.tensor([tokens]))
            logits = model.lm_head(output)[0].numpy()
            if step == 0:
                arrays |= sketch(f"mtp_{n}_hidden", output[0].numpy())
                arrays[f"mtp_{n}_next"] = np.array(tokens[-1], np.int32)
                arrays[f"mtp_{n}_columns"] = logits[:, COLUMNS]
            rows.append(logits[-1])
            hidden = torch.cat([hidden, output[:, -1:]], 1)
            tokens.append(int(rows[-1].argmax()))
        if not _is_clear(np.stack(rows)):
            raise RuntimeError(f"the drafts after {n} tokens are too close to call: choose another seed")
        arrays[f"mtp_{n}_drafts"] = np.array(tokens[-drafts:], np.int32)
        arrays[f"mtp_{n}_last"] = np.stack(rows)
    return arrays


def _mtp_head(model: Any, tensors: dict[str, torch.Tensor]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """A function from hidden states [1, T, D] and next tokens [1, T] to the output [1, T, D] of `mtp.norm`."""
    trunk, norm_class = model.model, type(model.model.norm)
    config = copy.deepcopy(trunk.config)
    config.layer_types, config.num_hidden_layers = ["full_attention"], 1
    tensors = {name.removeprefix("mtp."): value.float() for name, value in tensors.items() if name.startswith("mtp.")}
    layer = type(trunk.layers[0])(config, 0).eval()
    prefix = "layers.0."
    layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        module = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        module.load_state_dict({"weight": tensors[f"{name}.weight"]})
        return module(x)

    def run(hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        embedded = norm("pre_fc_norm_embedding", trunk.embed_tokens(tokens))
        x = torch.cat([embedded, norm("pre_fc_norm_hidden", hidden)], -1) @ tensors["fc.weight"].T
        length = x.shape[1]
        angles = trunk.rotary_emb(x, torch.arange(length).expand(3, 1, length))
        causal = torch.full((1, 1, length, length), float("-inf")).triu(1)
        y = layer(x, position_embeddings=angles, attention_mask=causal)
        return norm("norm", y[0] if isinstance(y, tuple) else y)

    return run


if __name__ == "__main__":
    main(sys.argv[1:])
