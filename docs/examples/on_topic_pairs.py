"""Labelled pairs to try the training of an annotator with: a reply to the prompt is chosen, and one to another prompt rejected.

python docs/examples/on_topic_pairs.py

It writes on_topic.jsonl (480 pairs of 240 prompts) and on_topic.txt, the instruction.
"""

import json
import pathlib
import random

THINGS = (
    "a bicycle", "an old piano", "a tomato plant", "a camera", "a kitchen knife", "a wool coat", "a sailing boat",
    "a leaking tap", "a puppy", "a chess set", "a sourdough loaf", "a violin", "a stone wall", "a laptop", "a garden pond",
    "a telescope", "a tent", "a wooden table", "a goldfish", "a motorbike", "a sewing machine", "a rose bush",
    "a coffee machine", "a pair of skis", "a canoe", "a parrot", "a candle", "a bookshelf", "a lawn mower", "a pocket watch",
    "a beehive", "a swimming pool", "a fireplace", "a cactus", "a printer", "a guitar", "a fridge", "a horse", "a kite",
    "a vineyard",
)  # fmt: skip
# What is asked about a thing, and two replies.
ASKED = {
    "How do I clean {}?": (
        "Wipe {} gently with a damp cloth and let it dry.",
        "For {}, warm water and a little soap are enough; rinse well.",
    ),
    "I would like to buy {}. Any advice?": (
        "Before you pay for {}, compare three sellers and ask about its age.",
        "A used one is cheaper: look for {} in the local paper first.",
    ),
    "How do I keep {} safe in winter?": (
        "Cover {} well and keep it away from frost and wind.",
        "When it gets cold, bring {} under a roof and check on it each week.",
    ),
    "How can I explain {} to a child?": (
        "Say in plain words what {} does, and let the child touch it.",
        "Tell a short story in which {} plays a part; children like that.",
    ),
    "What is a good way to photograph {}?": (
        "Put {} near a window and use soft light from the side.",
        "Step back, hold still, and take several shots of {} from below.",
    ),
    "I want to give away {}. How?": (
        "Offer {} to a neighbour or a charity, and say what state it is in.",
        "Wrap {} nicely and write a short card to go with it.",
    ),
}
QUESTION = "Which reply is about what was asked?"
INSTRUCTION = f"""inverted: false
answers: 1, 2
---
{QUESTION}
{{context}}
Reply 1:
{{first}}
Reply 2:
{{second}}
{QUESTION} Answer 1 or 2.
"""


def main() -> None:
    """Writes both files into the current directory."""
    rng = random.Random(0)
    every = [(thing, ask) for thing in THINGS for ask in ASKED]
    rng.shuffle(every)

    def reply(thing: str, ask: str) -> str:
        return rng.choice(ASKED[ask]).format("the " + thing.split(" ", 1)[1])

    lines = []
    for thing, ask in every:
        for _ in range(2):
            other = rng.choice([(t, a) for t, a in every if t != thing and a != ask])
            lines.append({"prompt": ask.format(thing), "chosen": reply(thing, ask), "rejected": reply(*other)})
    pathlib.Path("on_topic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pathlib.Path("on_topic.txt").write_text(INSTRUCTION)


if __name__ == "__main__":
    main()
