"""Judge a demo checkpoint with the reference implementation (transformers): facts, manners, tools, drafts, perplexity.

    python examples/train_demo/evaluate.py qwen_mlx/demo

Prints a table and greedy samples in Markdown. All questions are drawn with seeds that training does not use.
"""

import argparse
import random
from pathlib import Path

import talk
import torch
from safetensors.torch import load_file
from tales import tale
from text import Template
from tokenizers import Tokenizer
from train import MTP
from transformers import AutoModelForCausalLM
from transformers.utils import logging


class Judge:
    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.template = Template()
        self.end = [self.tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>")]
        self.mtp = MTP(self.model.config.get_text_config()).eval()
        tensors = load_file(folder / "model.safetensors")
        heads = {k.removeprefix("mtp."): v.float() for k, v in tensors.items() if k.startswith("mtp.")}
        self.mtp.load_state_dict(heads)

    def prompt(self, messages, *, tools=None, thinking=False):
        return self.template(
            {"messages": messages, "tools": tools}, add_generation_prompt=True, enable_thinking=thinking
        )

    def greedy(self, prompt, count=160):
        """-> ids of the prompt and its greedy continuation, and where the continuation begins"""
        ids = torch.tensor([self.tokenizer.encode(prompt).ids])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
                                  eos_token_id=self.end, pad_token_id=self.end[1])  # fmt: skip
        return out[0].tolist(), ids.shape[1]

    def answer(self, messages, **settings):
        ids, start = self.greedy(self.prompt(messages, **settings))
        return self.tokenizer.decode([i for i in ids[start:] if i not in self.end], skip_special_tokens=False)

    def perplexity(self, texts):
        total = count = 0
        for text in texts:
            ids = torch.tensor([[*self.tokenizer.encode(text).ids, self.end[1]]])
            loss = torch.nn.functional.cross_entropy(self.model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            total, count = total + loss.item(), count + ids.shape[1] - 1
        return float(torch.tensor(total / count).exp())

    def drafted(self, prompt):
        """-> how many greedy tokens the head drafts right at depth 1, at depths 1 and 2, and of how many.

        As when it drafts: the second step reads the head's own first output, behind slots made from true states.
        """
        ids, start = self.greedy(prompt, 96)
        trunk, embed = self.model.model, self.model.get_input_embeddings()
        hidden = trunk(torch.tensor([ids]), use_cache=False).last_hidden_state
        rotate = lambda n: trunk.rotary_emb(hidden, torch.arange(n)[None, None].expand(3, 1, -1))  # noqa: E731
        inputs = self.mtp.mix(hidden[:, :-1], embed(torch.tensor([ids[1:]])))
        outputs = self.mtp(inputs, rotate(inputs.shape[1]), None)
        first = self.model.lm_head(outputs).argmax(-1)[0].tolist()
        one = two = 0
        places = range(start - 1, len(ids) - 3)
        for i in places:
            if first[i] != ids[i + 2]:
                continue
            one += 1
            own = self.mtp.mix(outputs[:, i : i + 1], embed(torch.tensor([[first[i]]])))
            again = self.mtp(torch.cat([inputs[:, : i + 1], own], 1), rotate(i + 2), None)[:, -1]
            two += int(self.model.lm_head(again).argmax(-1)) == ids[i + 3]
        return one, two, len(places)


def user(text):
    return [{"role": "user", "content": text}]


def facts(judge, each):
    """-> {kind: (right, asked, a wrong one)}"""
    table = {}
    for kind in talk.FACTS:
        r = random.Random(f"grade {kind}")
        asked = [talk.question(r, kind) for _ in range(each)]
        given = [(q, judge.answer(user(q.text))) for q in asked]
        wrong = [f"{q.text} -> {a}" for q, a in given if a not in q.answers]
        table[kind] = (each - len(wrong), each, wrong[0] if wrong else "")
    return table


def sums_in_thought(judge, each):
    r = random.Random("grade thinking")
    asked = [talk.question(r, "add") for _ in range(each)]
    given = [(q, judge.answer(user(q.text), thinking=True)) for q in asked]
    wrong = [f"{q.text} -> {a}" for q, a in given if a not in [f"{q.thought}\n</think>\n\n{x}" for x in q.answers]]
    return each - len(wrong), each, wrong[0] if wrong else ""


def tools(judge, each):
    """-> calls as expected, answers from results as expected; each with thinking and without, half and half."""
    r, calls, answers = random.Random("grade tools"), [], []
    for i in range(each):
        question, call, result, answer = talk.tool_turns(r)
        function = call["tool_calls"][0]["function"]
        city = function["arguments"]["city"]
        inside = f"<function={function['name']}>\n<parameter=city>\n{city}\n</parameter>\n</function>"
        expected = f"<tool_call>\n{inside}\n</tool_call>"
        offered, thinking = [talk.WEATHER, talk.TIME], i % 2 == 0
        said = judge.answer([question], tools=offered, thinking=thinking)
        calls.append((expected in said, f"{question['content']} -> {said}"))
        said = judge.answer([question, call, result], tools=offered, thinking=thinking)
        answers.append((said.endswith(answer["content"]), f"{result['content']} -> {said}"))
    return [
        (sum(ok for ok, _ in rows), each, next((text for ok, text in rows if not ok), "")) for rows in (calls, answers)
    ]


def remembered(judge, each):
    r, right, wrong = random.Random("grade names"), 0, ""
    for _ in range(each):
        messages = talk.remembered_name(r)
        said = judge.answer(messages[:-1])
        right, wrong = (right + 1, wrong) if said == messages[-1]["content"] else (right, f"{messages[0]} -> {said}")
    return right, each, wrong


def drafts(judge):
    stories = [judge.prompt(user(f"Tell me a story about {a}.")) for a in ("a fox", "an owl", "Anna", "a silver key")]
    r = random.Random("grade drafts")
    questions = [judge.prompt(user(talk.question(r, k).text)) for k in ("capital", "add", "meaning", "opposite") * 2]
    groups = {
        "tales": ["Once upon a time", "There was once", "Long ago,", "Once there was"],
        "stories asked for": stories,
    }
    table = {}
    for name, prompts in (groups | {"short answers": questions}).items():
        one, two, count = map(sum, zip(*map(judge.drafted, prompts)))
        table[name] = (one / count, two / count, count)
    return table


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=25, help="questions of each kind")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    judge = Judge(args.folder)
    rows = facts(judge, args.each)
    right, asked = (sum(row[i] for row in rows.values()) for i in (0, 1))
    rows["a sum, thinking first"] = sums_in_thought(judge, args.each)
    rows["tool called"], rows["answered from its result"] = tools(judge, args.each)
    rows["name remembered"] = remembered(judge, args.each)
    print("| kind | right | of | first wrong one |\n|---|---|---|---|")
    for kind, (good, of, wrong) in rows.items():
        print(f"| {kind} | {good} | {of} | {wrong!r} |")
    print(f"\nKnown kinds: {right} of {asked} ({right / asked:.1%}).\n")
    print("| drafts of the MTP head | depth 1 | depths 1 and 2 | tokens |\n|---|---|---|---|")
    for name, (one, two, count) in drafts(judge).items():
        print(f"| {name} | {one:.3f} | {two:.3f} | {count} |")
    fresh = random.Random("fresh tales")
    print(f"\nPerplexity on 60 fresh tales: {judge.perplexity([tale(fresh) for _ in range(60)]):.4f}\n")
    for prompt in ("Once upon a time", "Long ago,", "There was once a brave owl"):
        ids, _ = judge.greedy(prompt)
        print(f"> {judge.tokenizer.decode(ids)}\n")
    for text in ("Tell me a story about a fox.", "Who are you?", "How do I fix a car?", "Hello!"):
        print(f"**{text}** {judge.answer(user(text))}\n")


if __name__ == "__main__":
    main()
