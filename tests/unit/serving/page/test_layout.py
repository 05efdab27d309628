"""What can be measured of the look: widths, contrast, names for screen readers, directions of writing."""

from __future__ import annotations

import threading

import pytest

from tests.page_server import PageServer, event, finish, said
from tests.unit.serving.page.conftest import Chat

SAMPLE = """A **sentence** with `code`, a [link](https://a.example) and averylongword{long}

```python
x = "{long}"
```

| a | b | c | d | e | f |
|---|---|---|---|---|---|
| {long} | 2 | 3 | 4 | 5 | 6 |

> quoted

مرحبا، نص عربي مع `code`

- one
  1. two
""".replace("{long}", "w" * 200)

# Contrast of each visible text with what lies behind it, by the definition of WCAG 2.
CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
  };
  const over = (top, below) => [0, 1, 2].map((at) => top[at] * top[3] + below[at] * (1 - top[3]));
  const light = (colour) => colour.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (node) => node
    ? over(rgba(getComputedStyle(node).backgroundColor), ground(node.parentElement)) : [1, 1, 1];
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest(':disabled, noscript, .offscreen, .skip')) continue;
    const behind = ground(node);
    const [one, other] = [light(over(rgba(getComputedStyle(node).color), behind)), light(behind)].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (other + 0.05);
    if (contrast < 4.5) low.push([walker.currentNode.data, contrast]);
  }
  return low;
})()"""


@pytest.fixture
def full(chat: Chat, server: PageServer) -> Chat:
    """A page that shows one of each."""
    call = {
        "index": 0,
        "id": "1",
        "function": {"name": "get_" + "x" * 80, "arguments": '{"city": "' + "y" * 200 + '"}'},
    }
    server.answer([event(reasoning_content="t" * 300), event(content=SAMPLE), event(tool_calls=[call]), finish()])
    server.refusals.append((400, "m" * 200))
    chat.ask("A question " + "q" * 200)
    chat.click(".notice.error button")
    chat.wait_for("document.querySelector('.results')")
    chat.click(".thinking summary")
    return chat


TOO_WIDE = """(() => {
  const areas = ['html', '#scroll', '#history', '#settings', '#settings-form', '#dock'];
  const scrolling = areas.map((name) => document.querySelector(name))
    .filter((node) => node.clientWidth && node.scrollWidth > node.clientWidth);
  const inside = document.querySelectorAll('button, input, textarea, select, .bubble, .text > *');
  const outside = [...inside].filter((node) => {
    const box = node.getBoundingClientRect();
    return node.checkVisibility() && box.width && (box.left < 0 || box.right > innerWidth + 0.5);
  });
  return [...scrolling, ...outside].map((node) => node.outerHTML.slice(0, 80));
})()"""


def test_nothing_is_wider_than_the_window(full: Chat) -> None:
    for width in (320, 360, 768, 1100):
        full.resize(width, 640, is_phone=width < 700)
        is_open = "document.body.classList.contains('with-history')"  # beside the page, where there is room
        full.wait_for(f"innerWidth === {width} && {is_open} === {str(width > 960).lower()}")
        assert full.evaluate(TOO_WIDE) == [], width
        for panel in ("history", "settings") if width < 700 else ():
            full.click(f"[data-opens={panel}]")
            assert full.evaluate(TOO_WIDE) == [], (width, panel)
            full.press("Escape")
            assert full.evaluate("document.activeElement.dataset.opens") == panel, "the focus returns to its button"


def test_texts_have_enough_contrast(full: Chat) -> None:
    full.click("[data-opens=settings]")
    full.fill("#top_p", "2")
    for scheme, ground in (("light", "rgb(250, 249, 247)"), ("dark", "rgb(23, 25, 28)")):
        full.prefer(scheme)
        assert full.evaluate("getComputedStyle(document.body).backgroundColor") == ground
        assert full.evaluate(CONTRAST) == [], scheme


def test_switch_overrides_the_system_and_stays(chat: Chat) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    chat.prefer("light")
    light = chat.evaluate(ground)
    chat.click("#theme")
    dark = chat.evaluate(ground)
    assert dark != light and chat.evaluate("document.querySelector('#theme').ariaPressed") == "true"
    chat.reload()
    assert chat.evaluate(ground) == dark
    chat.prefer("dark")
    chat.click("#theme")
    assert chat.evaluate(ground) == light


def test_everything_that_can_be_used_has_a_name(full: Chat) -> None:
    full.click("[data-opens=settings]")
    full.evaluate("document.querySelector('.question [aria-label^=Edit]').click()")
    roles = {"button", "textbox", "combobox", "spinbutton", "checkbox", "link", "article", "main", "complementary"}
    nodes = full.call("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert len(named) > 30 and [role for role, name in named if not name] == []


def test_each_paragraph_has_its_own_direction(chat: Chat, server: PageServer) -> None:
    server.answer(said("Hello\n\nمرحبا بالعالم\n\n```\nمرحبا\n```"))
    chat.ask("مرحبا")
    directions = "[...document.querySelectorAll('.bubble, .text > *')].map((node) => getComputedStyle(node).direction)"
    assert chat.evaluate(directions) == ["rtl", "ltr", "rtl", "ltr"]


def test_reader_who_scrolled_up_is_left_there(chat: Chat, server: PageServer) -> None:
    text = "Line\n\n" * 60
    more, end = threading.Event(), threading.Event()
    server.answer([event(content=text), more, event(content=text), end, *said("The end")])
    at_end = "(({scrollHeight, scrollTop, clientHeight}) => scrollHeight - scrollTop - clientHeight < 2)"
    at_end += "(document.querySelector('#scroll'))"
    chat.ask("Question", wait=False)
    chat.wait_for("document.querySelectorAll('.text p').length === 60")
    chat.wait_for(at_end)
    chat.evaluate("document.querySelector('#scroll').scrollTop = 100")
    more.set()
    chat.wait_for("document.querySelectorAll('.text p').length === 120 && !document.querySelector('#latest').hidden")
    assert chat.evaluate("document.querySelector('#scroll').scrollTop") == 100
    chat.click("#latest")
    end.set()
    chat.wait_for_answer()
    assert chat.evaluate(at_end) and chat.evaluate("document.querySelector('#latest').hidden")
