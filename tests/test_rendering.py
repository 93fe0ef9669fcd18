"""Chat templates as strangers' programs: what would hang or fill the memory ends within bounds, and in one line."""

import datetime
import os
import re
import resource
import signal
import threading

import pytest
import tokenizer_files as files

from oaif_jax.base.errors import UserError
from oaif_jax.data import rendering
from oaif_jax.data.chat import DATE, ChatTemplate, open_template
from oaif_jax.data.rendering import RenderError
from oaif_jax.data.tokenizer import open_tokenizer

SAYS = "{{ messages[0].content }}"
ASKED = [{"role": "user", "content": "why?"}]
VARIABLES = {"messages": ASKED, "add_generation_prompt": True}
GROWS = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"

SLOW = {
    "loops in loops": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "calls in calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a filter": "{{ lipsum(n=10 ** 9) | length }}",
}
LARGE = {
    "a text that doubles": GROWS.replace("START", "'x'").replace("STEP", "n.x ~ n.x"),
    "a block that doubles": "{% set n = namespace(x='x') %}{% for i in range(60) %}"
    "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
    "a list that doubles": GROWS.replace("START", "[1]").replace("STEP", "n.x + n.x"),
    "one product": "{{ 'x' * 10 ** 11 }}",
    "one filter": "{{ 'x' | center(10 ** 11) }}",
    "one format": "{{ '{:>99999999999}'.format(1) }}",
    "a width of JSON": "{{ messages | tojson(indent=10 ** 11) }}",
}
OTHER = {
    "calls without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    "brackets": ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "maximum recursion depth exceeded"),
    "what is written": ("{{ 'x' * (2 ** 25 + 1) }}", "writes 33,554,433 characters, wanted at most 33,554,432"),
}


@pytest.fixture(autouse=True)
def bounds(monkeypatch, request):
    """The child reads its bounds when it starts: here they are lower, so that they are soon reached."""
    seconds = 20 if "patient" in request.fixturenames else 0.4
    tight = f"rendering.SECONDS = {seconds}; rendering.MEMORY = 2 ** 28; rendering.serve()"
    rendering._of_this_process().stop()
    monkeypatch.setattr(rendering, "CHILD", rendering.CHILD.replace("rendering.serve()", tight))
    yield
    rendering._of_this_process().stop()


@pytest.fixture
def patient():
    """With time enough to reach the other bounds."""


def said(source: str) -> str:
    with pytest.raises(RenderError) as caught:
        rendering.render(source, DATE, VARIABLES)
    return str(caught.value)


@pytest.mark.parametrize("name", SLOW)
def test_time_is_bounded(name):
    assert said(SLOW[name]) == "takes more than 5 seconds"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("name", LARGE)
def test_memory_is_bounded(name):
    """And it is the child's memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert said(LARGE[name]) == "takes more than 0.25 GiB of memory"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e5, "kB of this process"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("name", OTHER)
def test_other_ends(name):
    source, message = OTHER[name]
    assert message in said(source)


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''['__class__'] }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ messages|map(attribute='__class__')|list }}",
    "{% for m in messages|groupby('__class__') %}{{ m }}{% endfor %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ messages.clear() }}{{ messages }}",
    "{{ (messages|selectattr('__class__')|list).__reduce__ }}",
]


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out(source):
    """A template reaches neither Python's objects nor files: an error, or nothing where the object would be."""
    try:
        text = rendering.render(source, DATE, VARIABLES)
    except RenderError:
        text = ""
    assert not re.search(r"class|object|module|function|environment|uid=", text), text
    assert rendering.render(SAYS, DATE, VARIABLES) == "why?"


def test_a_bound_is_one_line_with_the_templates_path(tmp_path):
    for name, source in (("slow", SLOW["loops in loops"]), ("large", LARGE["one product"])):
        tokenizer = open_tokenizer(files.llama3(tmp_path / name, chat_template=SAYS + source))
        with pytest.raises(UserError, match="takes more than") as caught:
            open_template(tokenizer)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name / "tokenizer_config.json") in str(caught.value)


def test_a_template_that_is_slow_for_some_messages(tmp_path):
    """It passes when it is opened, and the prompt that it hangs on ends the run in one line."""
    source = SAYS + "{% if 'why' in messages[0].content %}" + SLOW["loops in loops"] + "{% endif %}"
    tokenizer = open_tokenizer(files.llama3(tmp_path, chat_template=source))
    template = open_template(tokenizer)
    with pytest.raises(UserError, match="takes more than"):
        template.prompt_ids(tokenizer, ASKED)
    assert template.render([{"role": "user", "content": "how?"}]) == "how?"


def test_the_next_render_is_as_if_nothing_had_been():
    for source in (SLOW["loops in loops"], LARGE["one product"], "{% if %}", "{{ 1 / 0 }}"):
        assert rendering.render(SAYS, DATE, VARIABLES) == "why?"
        assert said(source)
        assert said(source), "the same again"
        assert rendering.render(SAYS, DATE, VARIABLES) == "why?"


def test_a_child_that_is_killed():
    child = rendering._of_this_process()
    assert rendering.render(SAYS, DATE, VARIABLES) == "why?"
    os.kill(child._process.pid, signal.SIGKILL)
    assert said(SAYS) == "ended the process that renders it (SIGKILL)"
    assert rendering.render(SAYS, DATE, VARIABLES) == "why?"


def test_many_templates():
    """More than the child keeps; and a date is a part of a template."""
    for _ in range(2):
        for number in range(rendering.TEMPLATES + 3):
            assert rendering.render(f"{number}{SAYS}", DATE, VARIABLES) == f"{number}why?"
    days = [datetime.date(2024, 1, day) for day in (1, 2)]
    assert [rendering.render("{{ strftime_now('%d') }}", day, VARIABLES) for day in days] == ["01", "02"]


def test_threads_take_turns():
    found = {}

    def ask(number: int) -> None:
        for i in range(30):
            text = f"{number}.{i} é 🙂 \x00\n"
            found[number, i] = text == rendering.render(SAYS, DATE, {"messages": [{"role": "user", "content": text}]})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120
    assert all(found.values())


def test_both_ways_give_the_same_text():
    source = "{% for m in messages %}<{{ m.role }}>{{ m | tojson }}{{ m.content | trim }}{% endfor %}{{ strftime_now('%Y') }}"
    assert rendering.render(source, DATE, VARIABLES) == rendering.render_here(source, DATE, VARIABLES)
    half = {"messages": [{"role": "user", "content": "\ud800"}]}
    for render in (rendering.render, rendering.render_here):
        with pytest.raises(RenderError, match="surrogates not allowed"):
            render(SAYS, DATE, half)


def test_a_template_of_this_package_needs_no_child(tmp_path):
    template = ChatTemplate(tmp_path / "ours.jinja", SAYS, is_ours=True)
    assert template.render(ASKED) == "why?"
    assert rendering._of_this_process()._process is None
