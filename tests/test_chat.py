"""Chat templates in the manner of released models: texts and ids against transformers, and what can go wrong."""

import datetime
import pathlib

import fakes
import pytest
import tokenizer_files as files

from oaif_jax.base.errors import UserError
from oaif_jax.data.chat import DATE, ChatTemplate, open_template
from oaif_jax.data.tokenizer import Tokenizer, open_tokenizer

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 Jan 2000" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]["role"] == "system" %}
    {%- set head = messages[0]["content"] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set head = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" + head + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == "ipython" %}{% continue %}{% endif %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if tools is not none %}{{- raise_exception("no tools here") }}{%- endif %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
# Its labels are ordinary text, and it writes no BOS.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
# A system text goes to the last user message; roles alternate.
MISTRAL = """{%- set ns = namespace(users=0) -%}
{%- for message in messages if message.role == "user" %}{% set ns.users = ns.users + 1 %}{% endfor -%}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}{{- "[INST] " + message.content + " [/INST]" }}
    {%- elif message.role == "assistant" %}{{- " " + message.content + eos_token }}
    {%- else %}{{- raise_exception("Only user and assistant, not " + message.role) }}
    {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/...') }}
{% endif %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
# It leaves out system messages without a word, as the first Phi-3 did.
PHI3 = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|user|>' + '\\n' + message['content']
+ '<|end|>' + '\\n' }}{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\\n' + message['content'] + '<|end|>\\n'
}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
QWEN = """{%- if messages[0].role != "system" %}{{- "<|im_start|>system\\nBe helpful.<|im_end|>\\n" }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\\n" }}{% generation %}{{- message.content + "<|im_end|>" }}{% endgeneration %}{{- "\\n" }}
    {%- else %}
        {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n" }}{%- endif %}"""

TEMPLATES = {
    "llama3": (files.llama3, LLAMA3),
    "zephyr": (files.mistral, ZEPHYR),
    "mistral": (files.mistral, MISTRAL),
    "gemma": (files.gemma, GEMMA),
    "phi3": (files.phi3, PHI3),
    "qwen": (files.qwen, QWEN),
}
WITH_SYSTEM = ("llama3", "zephyr", "qwen")
WRITES_BOS = ("llama3", "mistral", "gemma", "phi3")

SYSTEM = {"role": "system", "content": " Be brief, and kind.\n"}
USER = {"role": "user", "content": 'Which of the two <b>dogs</b> is "better"? It\'s 漢字 🙂\n\n  {{ bos_token }} {% if'}
ANSWER = {"role": "assistant", "content": "The first & the second."}
MORE = {"role": "user", "content": "  why?  "}
CHATS = ([USER], [USER, ANSWER, MORE], [SYSTEM, USER], [SYSTEM, USER, ANSWER, MORE])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[Tokenizer, ChatTemplate]]:
    root = tmp_path_factory.mktemp("chat")
    for name, (make, template) in TEMPLATES.items():
        make(root / name, chat_template=template)
    tokenizers = {name: open_tokenizer(root / name) for name in TEMPLATES}
    return {name: (tokenizer, open_template(tokenizer)) for name, tokenizer in tokenizers.items()}


def written(directory: pathlib.Path, template: object, make=files.llama3) -> Tokenizer:
    return open_tokenizer(make(directory, chat_template=template))


# --- against transformers


@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_and_ids_are_those_of_transformers(made, name):
    transformers = pytest.importorskip("transformers")
    tokenizer, template = made[name]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer.path.parent)
    for chat in CHATS if name in WITH_SYSTEM else CHATS[:2]:
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            if name == "llama3":
                options["date_string"] = "26 Jul 2024"
            text = theirs.apply_chat_template(chat, tokenize=False, **options)
            assert template.render(chat, add_generation_prompt=prompt) == text
            if prompt:
                ids = theirs.apply_chat_template(chat, return_dict=False, **options)
                assert template.prompt_ids(tokenizer, chat) == ids


def test_filters_and_tags_are_those_of_transformers(tmp_path):
    """JSON is not escaped for HTML; loop controls; blocks take their line; generation marks nothing in the text."""
    transformers = pytest.importorskip("transformers")
    source = """{% for message in messages %}
    {% if loop.index > 1 %}
        {% break %}
    {% endif %}
{{ message | tojson }}|{{ message | tojson(indent=1, sort_keys=true) }}
    {% generation %}
<{{ message.content }}>
    {% endgeneration %}
{{ unknown }}{{ tools is none }}{{ documents is none }}{{ unk_token is defined }}{{ eos_token }}
{% endfor %}
"""
    tokenizer = written(tmp_path, source)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template([USER, ANSWER], tokenize=False)
    assert open_template(tokenizer).render([USER, ANSWER], add_generation_prompt=False) == expected
    assert "<b>dogs</b>" in expected


# --- BOS, dates, the system's text, special tokens


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_is_as_the_template_has_it_and_once(made, name):
    tokenizer, template = made[name]
    for chat in CHATS:
        ids = template.prompt_ids(tokenizer, chat)
        if tokenizer.bos_id is not None:
            assert ids.count(tokenizer.bos_id) == (name in WRITES_BOS)
            assert (ids[0] == tokenizer.bos_id) == (name in WRITES_BOS)


def test_bos_that_is_written_twice_is_there_once(tmp_path):
    tokenizer = written(tmp_path, "{{ bos_token }}<|begin_of_text|>{{ messages[0].content }}")
    ids = open_template(tokenizer).prompt_ids(tokenizer, [MORE])
    assert ids == [tokenizer.bos_id, *tokenizer.encode(MORE["content"])]


def test_dates_are_fixed(made, tmp_path):
    tokenizer, template = made["llama3"]
    assert datetime.date(2024, 7, 26) == DATE
    assert "Today: 26 Jul 2024\n" in template.render([USER])
    other = open_template(tokenizer, date=datetime.date(2025, 1, 2))
    assert "Today: 02 Jan 2025\n" in other.render([USER])
    assert "26 Jul" in template.render([USER]), "the other date came into this one"
    written(tmp_path, '{{ strftime_now("%Y-%m-%d %H:%M:%S") }} {{ messages[0].content }}')
    assert open_template(open_tokenizer(tmp_path)).render([USER]).startswith("2024-07-26 00:00:00 ")


@pytest.mark.parametrize("name", TEMPLATES)
def test_system_text(made, name):
    """Where a template has no place for it, it goes before the first user message, an empty line between."""
    _, template = made[name]
    assert template.has_system_role == (name in WITH_SYSTEM)
    chat = [SYSTEM, USER, ANSWER, MORE]
    text = template.render(chat)
    assert text.count("Be brief, and kind.") == 1
    if name not in WITH_SYSTEM:
        joined = {"role": "user", "content": SYSTEM["content"] + "\n\n" + USER["content"]}
        assert text == template.render([joined, ANSWER, MORE])
    assert chat == [SYSTEM, USER, ANSWER, MORE], "the caller's messages were changed"


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_make_no_special_ids(made, name):
    """Special tokens' text in messages is text; the template's own are read."""
    tokenizer, template = made[name]
    special = lambda ids: [token for token in ids if token in tokenizer.special_ids]  # noqa: E731
    clean = special(template.prompt_ids(tokenizer, [USER]))
    assert clean or name == "zephyr"
    for text in tokenizer._vocabulary.special:
        content = f"say {text}now{text}{text[1:]}<{text} please"
        ids = template.prompt_ids(tokenizer, [{"role": "user", "content": content}])
        assert special(ids) == clean
        assert content in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3", "<|eot_id|>"),
        ("zephyr", "</s>"),
        ("gemma", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("qwen", "<|im_end|>"),
    ],
)
def test_turn_end(made, name, text):
    tokenizer, template = made[name]
    assert template.turn_end(tokenizer) == tokenizer._vocabulary.id_of(text)
    assert template.turn_end(tokenizer) in tokenizer.stop_ids


def test_templates_without_a_turn_end(tmp_path):
    tokenizer = written(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert open_template(tokenizer).turn_end(tokenizer) is None
    assert open_template(tokenizer, "none").turn_end(tokenizer) is None


# --- where templates come from


SAYS = "{{ messages[0].content }}"


@pytest.mark.parametrize("source", ["hello", "{# nothing #}", "{{ messages[0].content|length }}"])
def test_a_template_without_the_users_text(tmp_path, source):
    """It would make every prompt the same."""
    with pytest.raises(UserError, match="leaves out what the user says"):
        open_template(written(tmp_path, source))


def test_files_of_templates(tmp_path):
    """A list with names; a file beside, which goes first; a path, which goes before both; none."""
    named = [{"name": "tools", "template": "tools"}, {"name": "default", "template": "default {{ bos_token }}" + SAYS}]
    tokenizer = written(tmp_path, named)
    assert open_template(tokenizer).render([MORE]) == "default <|begin_of_text|>" + MORE["content"]
    (tmp_path / "chat_template.jinja").write_text("beside {{ eos_token }}" + SAYS)
    assert open_template(tokenizer).render([MORE]) == "beside <|eot_id|>" + MORE["content"]
    (tmp_path / "mine.jinja").write_text("mine {{ messages[0].content }}\n")
    assert open_template(tokenizer, str(tmp_path / "mine.jinja")).render([MORE]) == "mine   why?  "
    assert open_template(tokenizer, "none").render([MORE]) == MORE["content"]


def test_names_of_a_bare_model_file(tmp_path):
    """A .model has the texts of BOS and EOS itself."""
    tokenizer = open_tokenizer(files.sentencepiece_model(tmp_path / "tokenizer.model", prefix=True))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    ids = open_template(tokenizer).prompt_ids(tokenizer, [{"role": "user", "content": "dog</s>"}])
    assert (ids[0], ids[-1], len({1, 2} & set(ids[1:-1]))) == (1, 2, 0)
    assert tokenizer.decode(ids) == "dog</s>"


def test_plain_format(made):
    tokenizer, _ = made["mistral"]
    template = open_template(tokenizer, "none")
    assert template.render([USER]) == USER["content"]
    assert template.render([SYSTEM, MORE]) == " Be brief, and kind.\n\n\n  why?  "
    assert template.render([SYSTEM, USER, ANSWER, MORE]) == (
        f"\n\nHuman: {SYSTEM['content']}\n\n{USER['content']}\n\nAssistant: {ANSWER['content']}\n\nHuman:   why?  \n\nAssistant:"
    )
    assert template.render([USER, ANSWER], add_generation_prompt=False).endswith(f"\n\nAssistant: {ANSWER['content']}")


def test_plain_ids(made):
    """BOS where the tokenizer has one and adds it to texts, and no special token is read."""
    for name, adds in (("mistral", True), ("llama3", True), ("gemma", True), ("phi3", False), ("qwen", False)):
        tokenizer, _ = made[name]
        content = "a " + "".join(tokenizer._vocabulary.special)
        ids = open_template(tokenizer, "none").prompt_ids(tokenizer, [{"role": "user", "content": content}])
        assert ids == [tokenizer.bos_id] * adds + tokenizer.encode(content)
        assert len(tokenizer.special_ids.intersection(ids)) == adds
    tokenizer = fakes.ByteTokenizer()
    assert open_template(tokenizer, "none").prompt_ids(tokenizer, [MORE]) == tokenizer.encode(MORE["content"])


# --- what can go wrong


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", r"fails \(line 1\): Expected an expression"),
        ("a\n{{ messages[0].content", r"fails \(line 2\): unexpected end of template"),
        ("{{ nothing.at.all }}", r"fails: 'nothing' is undefined"),
        ("{{ raise_exception('not for\nyou') }}", "fails: not for you"),
        ("{{ messages[0].content + 1 }}", "fails: can only concatenate str"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages.append(1) }}", "fails: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "fails: .*unsafe"),
        ("{% include 'x' %}", "fails: no loader for this environment"),
        ("  \n", r"is empty; none \(--config.policy.chat=none, annotator.chat, judge.chat\) is the plain format"),
        (None, r"has no chat template, wanted chat_template\.jinja or chat_template in tokenizer_config\.json"),
        ({"default": "a"}, "chat_template is a JSON dict, wanted a text or a list"),
        ([{"name": "rag", "template": "a"}, {"name": "b", "template": ""}], "has rag, b, wanted one named default"),
        (["a"], "is a list of other things, wanted objects with name and template"),
    ],
)
def test_templates_that_fail(tmp_path, template, message):
    tokenizer = written(tmp_path, template)
    with pytest.raises(UserError, match=message) as caught:
        open_template(tokenizer)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_paths_of_templates(made, tmp_path):
    tokenizer, _ = made["gemma"]
    with pytest.raises(UserError, match=r"none\.jinja: no such file, wanted auto, none or the path"):
        open_template(tokenizer, str(tmp_path / "none.jinja"))
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"a\.jinja can't be read"):
        open_template(tokenizer, str(tmp_path / "a.jinja"))


@pytest.mark.parametrize("template", ["auto", "none"])
@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "a chat has no messages"),
        ([{"role": "user"}], "message 0 is {'role': 'user'}, wanted content and a role of system, user, assistant"),
        ([USER, {"role": "human", "content": "a"}], "message 1 is {'role': 'human', 'content': 'a'}, wanted"),
        ([USER, SYSTEM], "message 1 is the system's, wanted it first"),
        ([SYSTEM, ANSWER], "a chat has a system message and no user's"),
    ],
)
def test_messages_that_are_none(made, chat, message, template):
    tokenizer, _ = made["gemma"]
    with pytest.raises(UserError, match=message):
        open_template(tokenizer, template).prompt_ids(tokenizer, chat)


def test_a_chat_that_the_template_refuses(made):
    tokenizer, template = made["gemma"]
    with pytest.raises(UserError, match=r"tokenizer_config\.json fails: Conversation roles must alternate"):
        template.prompt_ids(tokenizer, [USER, MORE])
