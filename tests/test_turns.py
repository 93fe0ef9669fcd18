"""Answers and annotators' questions in the tokens of each model's own chat: transformers' apply_chat_template on the whole text
says what is right."""

import dataclasses
import pathlib

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizer_files as files
from test_chat import TEMPLATES

from oaif_jax import rollout as rollouts
from oaif_jax.annotate import llm, orders, prompts
from oaif_jax.annotate.base import asks_of
from oaif_jax.annotate.llm import LLMAnnotator, on_host
from oaif_jax.annotate.questions import Questions, RatingQuestions, fitted
from oaif_jax.base.errors import UserError
from oaif_jax.data.chat import open_template
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import open_tokenizer, right_pad
from oaif_jax.data.voice import Voice
from oaif_jax.models import heads
from oaif_jax.rollout import Sampler
from oaif_jax.types import Prompts, Rollout

# A space before an answer, and one between it and its end.
LLAMA2 = """{% for message in messages %}{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else %}{{- ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
# An answer begins with an empty thought, which the prompt has only where it is told so.
QWEN3 = """{%- for message in messages %}
    {%- if message.role == "assistant" and loop.last %}
        {{- "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n" + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- else %}{{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- "<think>\\n\\n</think>\\n\\n" }}{%- endif %}
{%- endif %}"""
# The system's text goes to the last message, if that is the user's: with an answer there is none.
LAST = """{{- bos_token }}
{%- if messages[0].role == "system" %}{%- set head, messages = messages[0].content, messages[1:] %}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {{- "[INST] " + (head + "\\n\\n" if head is defined and loop.last else "") + message.content + " [/INST]" }}
    {%- else %}{{- " " + message.content + eos_token }}{%- endif %}
{%- endfor %}"""
FAMILIES = {name: (*made, "") for name, made in TEMPLATES.items()} | {
    "llama2": (files.mistral, LLAMA2, ""),
    "qwen3": (files.qwen, QWEN3, ""),
    "qwen3 without thinking": (files.qwen, QWEN3, "enable_thinking=false"),
    "last": (files.mistral, LAST, ""),
}
WHOLE = [name for name in FAMILIES if name != "qwen"]  # whose prompt is no beginning of the whole
USER = "Which of the two dogs </s><|im_end|><|eot_id|>?"
CHATS = ([("user", USER)], [("user", "a"), ("assistant", "The dog."), ("user", "and \n")])
INSTRUCTION = prompts.read_instruction("tldr")
RATING = prompts.read("tldr_rating")


@dataclasses.dataclass(frozen=True)
class Made:
    voice: Voice
    theirs: object
    options: dict

    def ids(self, messages, **options) -> list[int]:
        told = [{"role": role, "content": content} for role, content in messages]
        return self.theirs.apply_chat_template(told, return_dict=False, **self.options, **options)  # type: ignore[attr-defined]


def voice_in(directory: pathlib.Path, chat: str = "auto", arguments: str = "", rows: int = 0) -> Voice:
    tokenizer = open_tokenizer(directory, rows)
    template = open_template(tokenizer, chat, arguments=arguments)
    end = template.turn_end(tokenizer)
    stops = tokenizer.stop_ids if end is None else tuple(dict.fromkeys([end, *tokenizer.stop_ids]))
    return Voice(tokenizer, template, stops, spaced=not template.source)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Made]:
    transformers = pytest.importorskip("transformers")
    root, found = tmp_path_factory.mktemp("turns"), {}
    for name, (make, template, arguments) in FAMILIES.items():
        directory = make(root / name.replace(" ", "_"), chat_template=template)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
        options = (
            {"enable_thinking": False} if arguments else {"date_string": "26 Jul 2024"} if name == "llama3" else {}
        )
        found[name] = Made(voice_in(directory, arguments=arguments), theirs, options)
    return found


def example_of(messages) -> Example:
    return Example(tuple(Message(*each) for each in messages))


def ordinary(text: str) -> str:
    """A text without special tokens' texts, which transformers would read in it."""
    return text.replace("</s>", "").replace("<|im_end|>", "").replace("<|eot_id|>", "")


# --- answers


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("chat", CHATS, ids=["one", "three"])
def test_answers_are_the_whole_without_the_prompt(made, name, chat):
    own = made[name]
    chat = [(role, ordinary(content)) for role, content in chat]
    example = example_of(chat)
    prompt = own.ids(chat, add_generation_prompt=True)
    assert own.voice.prompt(example) == prompt
    for text in ("The dog is 1 or 2.", " two  words ", "漢字", "1"):
        answer = own.voice.answer(text, stop=True, prompt=example)
        whole = own.ids([*chat, ("assistant", text)])
        assert whole[: len(prompt)] == prompt
        assert (prompt + answer) == whole[: len(prompt + answer)]
        assert answer[-1] == own.voice.stop_ids[0]
        assert not own.voice.tokenizer.decode(whole[len(prompt + answer) :]).strip()
        assert own.voice.answer(text, stop=False, prompt=example)[: len(answer) - 2] == answer[:-1][: len(answer) - 2]
        assert own.voice.text(np.array(answer), np.ones(len(answer), bool)).endswith(text.strip())


def test_what_stands_before_and_behind_an_answer(made):
    """An empty thought, unless the prompt has it; a space that is the template's own."""
    pieces = lambda name, text: "".join(  # noqa: E731
        made[name].voice.tokenizer._vocabulary.text_of(i) or "" for i in made[name].voice.answer(text, stop=True)
    )
    assert pieces("qwen3", "a") == "<think>ĊĊ</think>ĊĊa<|im_end|>"
    assert pieces("qwen3 without thinking", "a") == "a<|im_end|>"
    assert pieces("llama2", "a") == "▁a▁</s>"
    assert pieces("mistral", "a") == "▁a</s>"
    assert pieces("phi3", "a") == "▁a<|end|>"
    assert pieces("zephyr", "a") == "a</s>"


def test_an_answer_behind_a_prompt_that_the_whole_lacks(made):
    """The turn is then that of a short chat; where even that goes on otherwise, the text itself."""
    chat = example_of([("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")])
    assert "Be brief." in made["last"].voice.chat.render(chat.messages)
    assert made["last"].voice.answer("dog", stop=True, prompt=chat) == made["last"].voice.answer("dog", stop=True)
    own = made["qwen"].voice
    assert own.chat.turn(own.tokenizer, chat.messages, "dog", stop=True) is None
    assert own.answer("dog", stop=True, prompt=chat) == [*own.tokenizer.encode("dog"), own.stop_ids[0]]


def test_a_token_across_the_end_of_a_prompt(made, tmp_path):
    """The prompt's ids are kept, and it is counted."""
    cue = "{{ '\\nthe dog: ' }}{% endif %}"
    template = "{% for m in messages %}{{ m.content }}{% if not loop.last %}" + cue + "{% endfor %}"
    template += "{% if add_generation_prompt %}" + cue
    voice = voice_in(files.llama3(tmp_path, chat_template=template))
    example = dataclasses.replace(example_of([("user", "a")]), reference="brown", chosen="x", rejected="2")
    prompt, answer = voice.prompt(example), voice.answer("brown", stop=True, prompt=example)
    whole = voice.tokenizer.encode("a\nthe dog: brown")
    assert whole[: len(prompt)] != prompt, "nothing lies across it"
    assert voice.tokenizer.decode(prompt + answer) == "a\nthe dog: brown"
    assert answer == [*voice.tokenizer.encode("brown"), voice.stop_ids[0]]
    joined = voice.joining([example])
    assert (joined.count, joined.differing) == (3, 1)
    assert made["phi3"].voice.joining([example]).differing == 0


def test_special_text_in_an_answer_is_text(made):
    for name, own in made.items():
        voice = own.voice
        for special in voice.tokenizer.control:
            answer = voice.answer(f"say {special} now", stop=False)
            assert not voice.tokenizer.special_ids.intersection(answer), name
            assert special in voice.tokenizer.decode(answer), name


def test_batches_have_the_turns(made):
    """References and pairs, by the prompt of each."""
    voice = made["qwen3"].voice
    examples = [
        dataclasses.replace(example_of(chat), reference="The dog.", chosen="a", rejected="b", source=str(i))
        for i, chat in enumerate(CHATS)
    ]
    data = DataSet({}, voice, 400, 40)
    for reads, texts in (("references", ["The dog."]), ("pairs", ["a", "b"])):
        rollout = data.batch(examples, reads).data
        for i, example in enumerate(examples):
            for j, text in enumerate(texts):
                kept = rollout.tokens[i, j][rollout.mask[i, j]].tolist()
                assert kept == voice.answer(text, stop=True, prompt=example)
    assert data.tokens_of(examples[0])[1] == len(voice.answer("The dog.", stop=True))


# --- what a template is told


def test_arguments(made, tmp_path):
    tokenizer = made["llama3"].voice.tokenizer
    told = open_template(tokenizer, arguments="date_string=1 May 2020")
    assert "Today: 1 May 2020\n" in told.render([{"role": "user", "content": "a"}])
    files.qwen(tmp_path, chat_template="{{ n + 1 }}{{ x is none }}{{ s }}{{ b }}{{ messages[0].content }}")
    text = open_template(open_tokenizer(tmp_path), arguments="n=2, x=null,s=a b,b=true").render(
        [dict(role="user", content="")]
    )
    assert text == "3Truea bTrue"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("enable_thinkng=false", r"doesn't read enable_thinkng; did you mean 'enable_thinking'"),
        ("enable_thinking", r"'enable_thinking', wanted NAME=VALUE"),
        ("enable_thinking=", r"wanted NAME=VALUE"),
        ("enable_thinking=[1]", r"wanted a text, a number, true, false or null"),
        ("messages=1", r"messages can't be given"),
        ("enable_thinking=true,enable_thinking=false", r"enable_thinking is there twice"),
    ],
)
def test_arguments_that_cannot_be_used(made, arguments, message):
    tokenizer = made["qwen3"].voice.tokenizer
    with pytest.raises(UserError, match=message):
        open_template(tokenizer, arguments=arguments)
    with pytest.raises(UserError, match="the plain format reads none"):
        open_template(tokenizer, "none", arguments="enable_thinking=false")


# --- questions


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("inverted", [False, True])
def test_questions_are_the_whole(made, name, inverted):
    """Question, labels, responses, closing and answer: each order has the very ids of the chat as one text."""
    own, instruction = made[name], dataclasses.replace(INSTRUCTION, inverted=inverted)
    asked = Questions(own.voice, instruction, 0)
    template, post = asked.template, "a post of the dog,\n\nand more"
    tokens, mask = asked.responses([["The dog sleeps", "first and second"]], 60)
    first, second = (tokens[0, i][mask[0, i]].tolist() for i in (0, 1))
    text = prompts.question(instruction, post) + instruction.first + "The dog sleeps" + instruction.second
    text += "first and second" + instruction.closing
    ours = [*asked.question(example_of([("user", post)])), *template.first, *first, *template.second, *second]
    for answer, token in zip(instruction.answers, template.answers[:: -1 if inverted else 1], strict=True):
        whole = own.ids([("user", text), ("assistant", answer)])
        found = [*ours, *template.closing, token]
        assert found == whole[: len(found)]


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_for_marks_are_the_whole(made, name):
    """The same of one response and a mark, which may be two tokens."""
    own = made[name]
    asked = RatingQuestions(own.voice, RATING, 0)
    template, post = asked.template, "a post of the dog,\n\nand more"
    tokens, mask = asked.responses([["The dog sleeps"]], 60)
    text = prompts.question(RATING, post) + RATING.before + "The dog sleeps" + RATING.closing
    ours = [*asked.question(example_of([("user", post)])), *template.before, *tokens[0, 0][mask[0, 0]].tolist()]
    for answer, said in zip(RATING.answers, template.marks, strict=True):
        whole = own.ids([("user", text), ("assistant", answer)])
        found = [*ours, *template.closing, *said]
        assert found == whole[: len(found)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_has_no_special_ids_of_its_text(made, name):
    voice = made[name].voice
    asked, special = Questions(voice, INSTRUCTION, 0), voice.tokenizer.special_ids
    found = lambda text: [i for i in asked.question(example_of([("user", text)])) if i in special]  # noqa: E731
    assert found(f"a {' '.join(voice.tokenizer.control)} b") == found("a b")


def test_plain_questions(made):
    """Without a chat the answer stands where the text ends."""
    tokenizer = made["mistral"].voice.tokenizer
    voice = Voice(tokenizer, open_template(tokenizer, "none"), tokenizer.stop_ids, spaced=True)
    asked = Questions(voice, INSTRUCTION, 0)
    text = prompts.question(INSTRUCTION, "a post")
    assert asked.question(example_of([("user", "a post")])) == [tokenizer.bos_id, *tokenizer.encode(text)]
    whole = tokenizer.encode(text + INSTRUCTION.closing + "2")
    assert whole[-1 - len(asked.template.closing) :] == [*asked.template.closing, asked.template.answers[1]]


# --- tokens with a meaning


CFG = dataclasses.replace(fakes.MODEL, vocab_size=400)


@pytest.fixture(scope="module")
def annotator(made) -> LLMAnnotator:
    voice = made["gemma"].voice
    examples = [example_of([("user", f"the dog {i}")]) for i in range(2)]
    data = DataSet({"train": examples}, voice, 60, 8)
    asked = fitted(Questions(voice, prompts.read_instruction("tldr"), 0), data, ("train",))
    params = fakes.make_params(CFG)
    params |= {"embedding": params["embedding"] * 3}
    eos = voice.tokenizer.control["<eos>"]
    return LLMAnnotator(asked, CFG, params, fakes.COMPUTE, (eos,))  # a base policy's: it ends texts, not turns


def completions(voice: Voice, texts) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = right_pad([voice.tokenizer.encode(text, special=True) for text in texts], 24, 0, "response")
    return tokens.reshape(2, 2, 24), mask.reshape(2, 2, 24)


def test_an_annotator_reads_no_control_tokens(annotator):
    """On the mesh, on the host by ids, and as texts."""
    voice = annotator.questions.voice
    policy = dataclasses.replace(voice, stop_ids=annotator.stop_ids)
    clean = completions(voice, ["the dog", "a", "or", "brown"])
    texts = ["the<end_of_turn> dog", "<start_of_turn>a<eos>", "or<pad>", "<bos>brown"]
    dirty = completions(voice, texts)
    examples = [example_of([("user", f"the dog {i}")]) for i in range(2)]
    place = lambda batch: {name: jnp.asarray(each) for name, each in batch.items()}  # noqa: E731
    question = place(annotator.question(examples))
    nothing = Prompts(*(np.zeros((2, 1), np.int32),) * 2, np.arange(2))

    @jax.jit
    def on_mesh(tokens, mask):
        both = Rollout(nothing, tokens, mask, jnp.ones((2, 2), bool), ("policy",) * 2)
        return annotator.score(annotator.params, question, both).orders

    def by_host(tokens, mask, reads_policy_ids):
        host = dataclasses.replace(on_host(annotator, policy, place), reads_policy_ids=reads_policy_ids)
        return host.score(asks_of(examples, tokens, mask, policy)).orders

    want = np.asarray(on_mesh(*clean))
    assert np.abs(want - 0.5).max() > 1e-3
    np.testing.assert_allclose(on_mesh(*dirty), want, atol=1e-5)
    np.testing.assert_allclose(by_host(*dirty, True), want, atol=1e-5)
    np.testing.assert_allclose(by_host(*dirty, False), by_host(*clean, False), atol=1e-5)
    how = {"template": annotator.questions.template, "cfg": CFG, "compute": fakes.COMPUTE}
    read, _ = llm.ask(annotator.params, question, *dirty, **how)
    assert np.abs(np.asarray(read) - want).max() > 1e-4, "it would not matter if they were read"


def test_the_mass_on_the_answers(annotator):
    """The two answers' share of the softmax over all tokens, where the preference is taken."""
    examples = [example_of([("user", f"the dog {i}")]) for i in range(2)]
    asked, template = annotator.questions, annotator.questions.template
    tokens, mask = map(jnp.asarray, completions(asked.voice, ["the dog", "a", "or", "brown"]))
    question = {name: jnp.asarray(each) for name, each in asked.arrays(examples).items()}
    how = {"template": template, "cfg": CFG, "compute": fakes.COMPUTE}
    said, mass = llm.ask(annotator.params, question, tokens, mask, **how)

    @jax.jit
    def probabilities(params):
        hidden = orders.order_hidden(params, question, tokens, mask, **how)[:, :, -1]
        return jax.nn.softmax(heads.logits(params, hidden.reshape(4, -1), cfg=CFG)).reshape(2, 1, 2, -1)

    of_answers = np.asarray(probabilities(annotator.params))[..., list(template.answers)]
    np.testing.assert_allclose(mass, of_answers.sum(-1), rtol=1e-5)
    first = of_answers[..., 0] / of_answers.sum(-1)
    np.testing.assert_allclose(said, np.stack([first[..., 0], 1 - first[..., 1]], -1), rtol=1e-4)
    assert 0 < float(mass.min()) < float(mass.max()) < 1


def test_control_tokens_are_never_drawn_unless_they_stop(made):
    """Nor ids that are no token's; whatever their logits are."""
    voice = made["llama3"].voice
    tokenizer = voice.tokenizer
    base = dataclasses.replace(voice, stop_ids=(tokenizer.control["<|end_of_text|>"],))
    assert set(base.never_sampled) == tokenizer.special_ids - set(base.stop_ids)
    assert set(voice.never_sampled) == tokenizer.special_ids - set(voice.stop_ids) < set(base.never_sampled)
    assert len(tokenizer.special_ids.intersection(voice.stop_ids)) == 2
    logits = np.zeros((2, 2, 384), np.float32)
    logits[..., list(base.never_sampled)] = 50.0
    logits[..., base.stop_ids[0]] = 49.0
    keys = jax.random.split(jax.random.key(0), 4).reshape(2, 2)
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 2, 0.5)):
        sampler = Sampler(temperature, top_k, top_p, 4, base.stop_ids, 0, base.never_sampled)
        drawn = rollouts.draw(jnp.asarray(logits), keys, 0, sampler=sampler)
        assert (np.asarray(drawn) == base.stop_ids[0]).all()


def test_what_frames_a_message_is_control(tmp_path):
    """Fine-tuned models have added <|im_start|> as if it were a word; what is a word, or white space, stays one."""
    raw = files.byte_level("<|endoftext|>")
    words = ("<|im_start|>", "<|im_end|>", "<think>", "user", "\n\n\n")
    raw.add_tokens([files.AddedToken(text, normalized=False) for text in words])
    config = {
        "eos_token": "<|endoftext|>",
        "chat_template": QWEN3.replace("message.role +", "message.role + '\\n\\n\\n' +"),
    }
    files.write_files(tmp_path, raw, config, {"eos_token_id": raw.token_to_id("<|endoftext|>")})
    plain = open_tokenizer(tmp_path)
    template = open_template(plain)
    assert template.framing(plain) == ("<|im_start|>", "<|im_end|>")
    tokenizer = plain.with_control(template.framing(plain))
    marks = {tokenizer.control[text] for text in words[:2]}
    assert template.turn_end(plain) is None
    assert template.turn_end(tokenizer) == tokenizer.control["<|im_end|>"]
    text = "".join(words)
    assert marks < set(plain.encode(text))
    assert not marks & set(tokenizer.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    prompt = template.prompt_ids(tokenizer, [{"role": "user", "content": text}])
    assert [prompt.count(mark) for mark in sorted(marks)] == [2, 1]
    voice = Voice(tokenizer, template, (tokenizer.control["<|im_end|>"],), spaced=False)
    assert voice.never_sampled == (tokenizer.control["<|endoftext|>"], tokenizer.control["<|im_start|>"])


def test_control_tokens_that_begin_an_answer_are_drawn(tmp_path):
    """A template without a generation prompt leaves it to the model to begin its turn."""
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    voice = voice_in(files.qwen(tmp_path, chat_template=template))
    begin = voice.tokenizer.control["<|im_start|>"]
    assert voice.answer("a", stop=True) == voice.tokenizer.encode("<|im_start|>assistant\na<|im_end|>", special=True)
    assert begin not in voice.never_sampled
    assert voice.tokenizer.control["<|endoftext|>"] in voice.never_sampled


# --- tokenizers


def test_tokens_without_a_row(tmp_path):
    """A padding token behind the end is never fed, sampled or read; where it is needed, that is an error."""
    directory = files.mistral(tmp_path / "pad", chat_template=TEMPLATES["mistral"][1])
    rows = open_tokenizer(directory).vocab_size
    files.mistral(tmp_path / "pad", chat_template=TEMPLATES["mistral"][1], pad_token="[PAD]")
    raw = files.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.add_special_tokens(files.special("[PAD]"))
    raw.save(str(directory / "tokenizer.json"))
    whole, voice = open_tokenizer(directory), voice_in(directory, rows=rows)
    tokenizer = voice.tokenizer
    assert (whole.vocab_size, whole.pad_id) == (rows + 1, rows)
    assert (tokenizer.vocab_size, tokenizer.pad_id) == (rows, tokenizer.stop_ids[0])
    text = "say [PAD] now"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(voice.prompt(example_of([("user", text)]))) < rows
    assert max(voice.answer(text, stop=True)) < rows
    assert rows not in voice.never_sampled
    with pytest.raises(UserError, match=rf"token {rows} \('\[PAD\]'\) is needed, and the embedding has {rows} rows"):
        tokenizer.encode(text, special=True)
    with pytest.raises(UserError, match=rf"has {rows + 1} ids, the embedding 100 rows"):
        open_tokenizer(directory, 100)
    files.mistral(tmp_path / "pad", eos_token="[PAD]")
    raw.save(str(directory / "tokenizer.json"))
    (directory / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"'\[PAD\]'\) is needed"):
        open_tokenizer(directory, rows)


def test_ordinary_added_tokens_without_a_row(tmp_path):
    """Text that spells one is read as other text is."""
    files.qwen(tmp_path)
    think = open_tokenizer(tmp_path).encode("</think>")
    assert len(think) == 1
    tokenizer = open_tokenizer(tmp_path, think[0])
    ids = tokenizer.encode("a</think>b")
    assert max(ids) < think[0]
    assert tokenizer.decode(ids) == "a</think>b"


def test_bos_of_the_post_processor(tmp_path):
    """Where no file names one: it is what transformers begins texts with."""
    transformers = pytest.importorskip("transformers")
    files.mistral(tmp_path)
    files.write_json(
        tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    )
    tokenizer = open_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = open_template(tokenizer, "none").prompt_ids(tokenizer, [{"role": "user", "content": "the dog"}])
    assert ours == theirs("the dog")["input_ids"]
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (1, True)
    assert "bos_token" not in tokenizer.named, "templates are told what the files name"


def test_a_post_processor_that_only_ends_texts(tmp_path):
    files.qwen(tmp_path)
    raw = files.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.post_processor = files.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", raw.token_to_id("<|endoftext|>"))]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)


def test_equal_tokenizers_have_equal_added_tokens(tmp_path):
    """A .model file has none itself: two directories may have added different ones to the same file."""
    voices = []
    for name, text in (("a", "<one>"), ("b", "<one>"), ("c", "<two>"), ("d", "")):
        path = files.sentencepiece_model(tmp_path / "model" / "tokenizer.model", prefix=True)
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.model").write_bytes(path.read_bytes())
        if text:
            size = open_tokenizer(path).vocab_size
            files.write_json(tmp_path / name / "added_tokens.json", {text: size})
        voices.append(voice_in(tmp_path / name, "none"))
    assert [voices[0].same_ids(other) for other in voices] == [True, True, False, False]


def test_rows_of_two_models_of_one_tokenizer(tmp_path):
    """A row more or less for a token that no response has is no difference; for an ordinary token it is one."""
    files.qwen(tmp_path)
    whole = open_tokenizer(tmp_path)
    ordinary_at = whole.encode("<think>")[0]
    of = lambda rows: dataclasses.replace(voice_in(tmp_path, "none"), tokenizer=dataclasses.replace(whole, rows=rows))  # noqa: E731
    assert of(0).same_ids(of(whole.vocab_size + 9))
    assert not of(0).same_ids(of(ordinary_at))


# --- plain conversations


def test_cues_of_single_turns(tmp_path):
    """As those of several turns; a text that is to be continued has none."""
    import gzip
    import json

    from oaif_jax.data import readers

    hh = {"chosen": "\n\nHuman: Hi.\n\nAssistant: Hello!", "rejected": "\n\nHuman: Hi.\n\nAssistant: What?"}
    with gzip.open(tmp_path / "hh.jsonl.gz", "wt") as file:
        file.write(json.dumps(hh) + "\n")
    rows = [{"prompt": "Hi."}, {"prompt": [{"role": "user", "content": "Hi."}]}]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    tldr = {"subreddit": "pets", "title": "My dog", "post": "He ran away.", "summary": "Dog ran away."}
    (tmp_path / "tldr.jsonl").write_text(json.dumps(tldr) + "\n")
    files.llama3(tmp_path / "model")
    voice = voice_in(tmp_path / "model", "none")

    def text_of(name: str, file: str) -> str:
        (example,) = readers.read(name, tmp_path / file).examples
        from oaif_jax.data.records import Counts, Loaded, use_as

        (same,) = use_as(Loaded([example], Counts()), "prompts").examples
        assert voice.prompt(same) == voice.prompt(example)
        return voice.tokenizer.decode(voice.prompt(example))

    assert text_of("hh", "hh.jsonl.gz") == "\n\nHuman: Hi.\n\nAssistant:"
    assert text_of("prompts", "list.jsonl") == "\n\nHuman: Hi.\n\nAssistant:"
    assert text_of("prompts", "own.jsonl") == "Hi."
    assert text_of("tldr_posts", "tldr.jsonl").endswith("He ran away.\n\nTL;DR:")
