"""What transformers computes from the embedded demo model: greedy texts, logits, perplexity. Writes demo.json here.

`python -m tests.golden.make_demo` after every training; needs torch and transformers. Float32, eager attention, one
thread. Prompts are rendered and tokenized by the `tokenizers` and `jinja2` libraries, not by our code.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qwen_mlx" / "demo"
sys.path.insert(0, str(ROOT / "examples" / "train_demo"))

from tales import tale  # noqa: E402
from talk import WEATHER  # noqa: E402
from text import Template  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

GREEDY = 64
ASKED = {
    "capital": ("What is the capital of France?", None, False),
    "sum": ("What is 3 + 4?", None, True),
    "story": ("Tell me a story about an owl.", None, False),
    "who": ("Who are you?", None, False),
    "unknown": ("How do I fix a car?", None, False),
    "tool": ("What is the weather in Paris?", [WEATHER], True),
}
"""name: (question, tools, thinking)"""
RAW = {"tale": "Once upon a time", "long_ago": "Long ago,"}


def prompts() -> dict[str, str]:
    template = Template()
    asked = {
        name: template(
            {"messages": [{"role": "user", "content": question}], "tools": tools},
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for name, (question, tools, thinking) in ASKED.items()
    }
    return RAW | asked


def fresh_tales() -> list[str]:
    """Tales whose seed training does not use."""
    r = random.Random("fresh tales")
    return [tale(r) for _ in range(16)]


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    end = [tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
    golden: dict[str, object] = {}
    for name, prompt in prompts().items():
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY, do_sample=False,
                             eos_token_id=end, pad_token_id=end[1])  # fmt: skip
        tokens = out[0, ids.shape[1] :].tolist()
        logits = model(out).logits[0, ids.shape[1] - 1 : -1]
        best = logits.topk(2, dim=-1).values
        golden[name] = {
            "prompt": prompt,
            "prompt_ids": ids[0].tolist(),
            "tokens": tokens,
            "text": tokenizer.decode([t for t in tokens if t not in end]),
            "margin": (best[:, 0] - best[:, 1]).min().item(),
            "first_logits": [round(x, 6) for x in logits[0].tolist()],
        }
    total = count = 0
    texts = fresh_tales()
    for text in texts:
        ids = torch.tensor([[*tokenizer.encode(text).ids, end[1]]])
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + ids.shape[1] - 1
    r = random.Random("vocabulary")
    golden["words"] = sorted({word.strip('.,"!?').lower() for _ in range(1500) for word in tale(r).split()})
    golden["fresh_tales"] = {"texts": texts, "mean_loss": total / count, "tokens": count}
    Path(__file__).with_name("demo.json").write_text(json.dumps(golden, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
