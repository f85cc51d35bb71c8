"""Train the demo model with the reference implementation (transformers), on the CPU, MTP head included.

    python examples/train_demo/train.py --out demo-run

Writes a checkpoint in the released layout beside `--out` every ten minutes and resumes from it. Two objectives: the
next token, and the two after it through the MTP head, whose second step reads its own first output exactly as it will
when it drafts (own hidden state, first-step keys behind it).
"""

import argparse
import json
import os
import pickle
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from text import Template, Windows, alice, train_tokenizer
from tokenizers import Tokenizer
from torch import nn
from transformers import Qwen3_5ForCausalLM
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

VOCAB = 2048
TEXT_CONFIG = dict(
    attention_bias=False, attention_dropout=0.0, attn_output_gate=True, bos_token_id=None, dtype="bfloat16",
    full_attention_interval=4, head_dim=256, hidden_act="silu", hidden_size=128, initializer_range=0.02,
    intermediate_size=256, linear_conv_kernel_dim=4, linear_key_head_dim=128, linear_num_key_heads=1,
    linear_num_value_heads=2, linear_value_head_dim=128, mamba_ssm_dtype="float32", max_position_embeddings=4096,
    model_type="qwen3_5_text", mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False, num_attention_heads=2,
    num_hidden_layers=8, num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True, use_cache=True,
    vocab_size=VOCAB, layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
    rope_parameters=dict(mrope_interleaved=True, mrope_section=[11, 11, 10], partial_rotary_factor=0.25,
                         rope_theta=10000000.0, rope_type="default"),
)  # fmt: skip


class MTP(nn.Module):
    """The head of the released checkpoints, which transformers leaves out, made of transformers' own layer."""

    def __init__(self, config):
        super().__init__()
        one = Qwen3_5TextConfig(**{**config.to_dict(), "num_hidden_layers": 1, "layer_types": ["full_attention"]})
        one._attn_implementation = "sdpa"
        size = config.hidden_size
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size), Qwen3_5RMSNorm(size)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(one, 0)])
        self.norm = Qwen3_5RMSNorm(size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def mix(self, hidden, embedding):
        both = torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], -1)
        return self.fc(both)

    def forward(self, x, rotation, mask):
        return self.norm(self.layers[0](x, position_embeddings=rotation, attention_mask=mask))


def two_drafts(trunk, mtp, hidden, ids):
    """Hidden states of the first and the second draft at every slot: [B, T, H] each, T = len(ids) - 3.

    Slot i holds h_i and token i+1 and drafts token i+2. Its second step holds the first one's output and token i+2,
    sits at position i+1, and sees the first-step slots 0..i behind itself.
    """
    slots = ids.shape[1] - 3
    embed, position = trunk.embed_tokens, torch.arange(slots + 1)
    rotate = lambda p: trunk.rotary_emb(hidden, p[None, None].expand(3, 1, -1))  # noqa: E731
    first = mtp.mix(hidden[:, :slots], embed(ids[:, 1 : slots + 1]))
    causal = torch.ones(slots, slots, dtype=torch.bool).tril()
    z1 = mtp(first, rotate(position[:slots]), causal[None, None])
    second = mtp.mix(z1, embed(ids[:, 2 : slots + 2]))
    own = torch.eye(slots, dtype=torch.bool)
    mask = torch.cat([torch.cat([causal, torch.zeros_like(own)], 1), torch.cat([causal, own], 1)], 0)
    both = mtp(torch.cat([first, second], 1), rotate(torch.cat([position[:slots], position[1:]])), mask[None, None])
    return z1, both[:, slots:]


def masked_loss(logits, targets, mask):
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


def losses(model, mtp, trunk, ids, mask):
    """-> next-token loss, first and second draft loss, and how often each draft is the trunk's own choice."""
    mask = mask.float()
    hidden = trunk(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    head = lambda h: F.linear(h, model.lm_head.weight)  # noqa: E731
    logits = head(hidden)
    z1, z2 = two_drafts(model.model, mtp, hidden, ids)
    d1, d2, n = head(z1), head(z2), z1.shape[1]
    with torch.no_grad():
        choice, w1, w2 = logits.argmax(-1), mask[:, 2 : n + 2], mask[:, 3 : n + 3]
        hit1 = (d1.argmax(-1) == choice[:, 1 : n + 1]).float() * w1
        hit2 = (d2.argmax(-1) == choice[:, 2 : n + 2]).float() * w2
    return (
        masked_loss(logits, ids[:, 1:], mask[:, 1:]),
        masked_loss(d1, ids[:, 2 : n + 2], w1),
        masked_loss(d2, ids[:, 3 : n + 3], w2),
        (hit1.sum() / w1.sum()).item(),
        (hit2.sum() / w2.sum()).item(),
    )


def optimizers(named, rate):
    matrices = [p for k, p in named if p.ndim == 2 and not any(s in k for s in ("embed", "in_proj_a", "in_proj_b"))]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def save(folder, model, mtp, tokenizer):
    """The released layout: nested config, `model.language_model.*` and `mtp.*`, bfloat16 but for the two wide ones."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.language_model.{k}": v for k, v in model.model.state_dict().items()}
    tensors |= {f"mtp.{k}": v for k, v in mtp.state_dict().items()}
    wide = ("A_log", "linear_attn.norm.weight")
    tensors = {k: v.detach().to(torch.float32 if k.endswith(wide) else torch.bfloat16) for k, v in tensors.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "partial", metadata={"format": "pt"})
    os.replace(folder / "partial", folder / "model.safetensors")
    end, pad = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    text = TEXT_CONFIG | {"eos_token_id": pad, "pad_token_id": pad}
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "tie_word_embeddings": True,
        "eos_token_id": end, "pad_token_id": pad, "text_config": dict(sorted(text.items())),
    }  # fmt: skip
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "bos_token": None, "clean_up_tokenization_spaces": False, "model_max_length": 4096,
    }  # fmt: skip
    for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", words)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))


@torch.no_grad()
def evaluate(model, mtp, batches, prose):
    model.eval()
    scores = [[float(x) for x in losses(model, mtp, model.model, *batch)] for batch in batches]
    held_out = float(losses(model, mtp, model.model, *prose)[0])
    model.train()
    return [sum(column) / len(scores) for column in zip(*scores)] + [held_out]


@torch.no_grad()
def sample(model, tokenizer, prompt, count=120):
    model.eval()
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    stop = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                         eos_token_id=stop, pad_token_id=stop[1])  # fmt: skip
    model.train()
    return tokenizer.decode(out[0, ids.shape[1] :].tolist(), skip_special_tokens=False)


def prompts():
    template = Template()
    ask = lambda q, **kw: template({"messages": [{"role": "user", "content": q}]}, add_generation_prompt=True, **kw)  # noqa: E731
    return [
        "Once upon a time", ask("What is the capital of France?"), ask("Tell me a story about a fox."),
        ask("What is 3 + 4?", enable_thinking=True), ask("How do I fix a car?"),
    ]  # fmt: skip


def rate_at(step, steps, peak):
    """Warm up for 100 steps, hold for half of the run, then fall in a line to 2 % of the peak."""
    progress = step / steps
    return peak * min(1.0, (step + 1) / 100) * (1.0 if progress < 0.5 else max(0.02, 2 * (1 - progress)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-run"))
    parser.add_argument("--steps", type=int, default=1600, help="optimiser steps of 4,096 tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (for a few steps of trial)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    words = args.out / "model" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(words)) if words.exists() else train_tokenizer(VOCAB)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT_CONFIG))
    mtp = MTP(model.config)
    named = list(model.named_parameters()) + [(f"mtp.{k}", p) for k, p in mtp.named_parameters()]
    opts = optimizers(named, args.rate)
    data, first, seconds = Windows(tokenizer, seed=1), 0, 0.0
    state_file = args.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=False)
        model.load_state_dict(state["model"])
        mtp.load_state_dict(state["mtp"])
        for opt, saved in zip(opts, state["opts"]):
            opt.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
        data.random.setstate(pickle.loads(state["data"]))
    tensors = lambda batch: tuple(torch.tensor(part) for part in batch)  # noqa: E731
    check = Windows(tokenizer, seed=999)
    batches = [tensors(check.batch(4, 513)) for _ in range(6)]
    held = tokenizer.encode("\n\n".join(alice()[-120:])).ids[: 4 * 513]
    prose = torch.tensor(held).view(4, 513), torch.ones(4, 513)

    log = (args.out / "log.txt").open("a")

    def say(line):
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    def checkpoint(step):
        torch.save({"model": model.state_dict(), "mtp": mtp.state_dict(), "opts": [o.state_dict() for o in opts],
                    "step": step, "seconds": seconds, "data": pickle.dumps(data.random.getstate())},
                   args.out / "state.partial")  # fmt: skip
        os.replace(args.out / "state.partial", state_file)
        save(args.out / "model", model, mtp, tokenizer)
        with torch.autocast("cpu", torch.bfloat16):
            loss, draft1, draft2, agree1, agree2, held_out = evaluate(model, mtp, batches, prose)
        say(f"check step {step} loss {loss:.4f} drafts {draft1:.4f} {draft2:.4f} agreement {agree1:.4f} {agree2:.4f} "
            f"held-out prose {held_out:.3f}")  # fmt: skip
        for prompt in prompts():
            say("  > " + json.dumps(prompt[-40:] + " => " + sample(model, tokenizer, prompt)))

    say(f"parameters {sum(p.numel() for _, p in named) / 1e6:.3f} M, torch {torch.__version__}, threads {args.threads}")
    trunk = model.model if args.no_compile else torch.compile(model.model, dynamic=False)
    saved_at, mean = time.time(), None
    for step in range(first, args.steps):
        start = time.time()
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = rate_at(step, args.steps, args.rate)
        rows, length = (16, 257) if step < 0.6 * args.steps else (8, 513)
        with torch.autocast("cpu", torch.bfloat16):
            loss, draft1, draft2, agree1, agree2 = losses(model, mtp, trunk, *tensors(data.batch(rows, length)))
        (loss + 0.3 * draft1 + 0.2 * draft2).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        seconds += time.time() - start
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            say(f"step {step} {seconds / 60:.1f} min loss {mean:.4f} drafts {draft1.item():.4f} {draft2.item():.4f} "
                f"agreement {agree1:.3f} {agree2:.3f} last step {time.time() - start:.2f} s")  # fmt: skip
        if time.time() - saved_at > 600 or step + 1 == args.steps:
            checkpoint(step + 1)
            saved_at = time.time()


if __name__ == "__main__":
    random.seed(0)
    main()
