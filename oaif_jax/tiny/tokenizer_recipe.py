"""Trains the tiny world's sentencepiece tokenizer on the world itself."""

import io
import pathlib
import re
import string

import sentencepiece

from oaif_jax.tiny import templates, world, writers

VOCAB_SIZE = 512  # an upper limit: the world has fewer pieces
POSTS = 4000
STYLE = writers.Style(keep=0.72, repeat=0.07, invent=0.09, chatter=0.10)  # its own: references may change, ids must not


def corpus(seed: int = 0):
    """Sentences in the forms that the models will read: posts, summaries after their cue, instructions."""
    for index in range(POSTS):
        post = world.post(seed, "train", index)
        summary = world.join(writers.write(world.generator(seed, "train", index, purpose=1), post.topics, STYLE))
        yield templates.prompt(post.text) + " " + summary
    for instruction in templates.INSTRUCTIONS:
        yield templates.instruction(instruction)


def whole_words() -> list[str]:
    """Each word of the world as one piece with its space before it, so that a summary's words are its tokens."""
    texts = [*world.FACTS, *world.SMALL_TALK, *(templates.instruction(name) for name in templates.INSTRUCTIONS)]
    found = {word for text in texts for word in re.findall("[a-z]+", text)}
    return ["\u2581" + word for word in sorted(found | set(world.TOPICS) | set(world.CHATTER) | {"yes", "no"})]


def train(path: pathlib.Path) -> None:
    """Writes `path` (a sentencepiece .model file). Pieces join back to the text exactly: no space is added or lost."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        model_type="unigram",
        vocab_size=VOCAB_SIZE,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        pad_id=0, unk_id=3, bos_id=1, eos_id=2,
        user_defined_symbols=["\n", *templates.MARKS, *whole_words()],
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
