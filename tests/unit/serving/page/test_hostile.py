"""Text of a model, a user or another server never becomes markup, never loads anything, and never stops the page."""

from __future__ import annotations

import json

from tests.page_server import PageServer, event, finish, said
from tests.unit.serving.page.conftest import Chat, OpenTab

MARKUP = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "<svg onload='window.hacked = 3'></svg><iframe srcdoc='<script>parent.hacked = 4</script>'></iframe>",
    "<a href='javascript:window.hacked = 5'>link</a><style>body { display: none }</style>",
    "</textarea></title></div><script>window.hacked = 6</script>",
]
LINKS = [
    "[a](javascript:alert(1))", "[b](JaVaScRiPt:alert(1))", "[c](data:text/html,<script>alert(1)</script>)",
    "[d](vbscript:x)", "[e](//other.example/x)", "[f](/v1/models)", "[g](java\tscript:alert(1))",
    "[h](\x01javascript:alert(1))", "[i](file:///etc/passwd)", "[j](<javascript:alert(1)>)",
]  # fmt: skip
FORBIDDEN = (
    "script, img, iframe, svg:not(.icon), style, object, embed, link, video, audio, [onload], [onerror], [onclick]"
)


def test_markup_of_the_model_is_shown_as_text(chat: Chat, server: PageServer) -> None:
    text = "\n\n".join(MARKUP)
    name = MARKUP[1]
    call = {"index": 0, "id": name, "function": {"name": name, "arguments": MARKUP[0]}}
    server.answer([event(reasoning_content=text), event(content=text), event(tool_calls=[call]), finish()])
    chat.ask(text)
    chat.click(".thinking summary")
    for selector in (".bubble", ".answer .text", ".thinking .fold-body", ".call pre"):
        assert MARKUP[0] in chat.text(selector), selector
    assert name in chat.text(".call-name") and chat.text("#title") == f"{MARKUP[0]}"
    assert chat.evaluate("window.hacked") is None
    assert chat.count(f":is(#messages, #conversations, header) :is({FORBIDDEN})") == 0


def test_markup_in_blocks_code_tables_and_names_is_text(server: PageServer, open_tab: OpenTab) -> None:
    server.models = [MARKUP[1]]
    blocks = [
        "```" + MARKUP[1],
        MARKUP[0],
        "```",
        f"| {MARKUP[1]} |",
        "|---|",
        f"| `{MARKUP[0]}` |",
        "",
        f"# {MARKUP[1]}",
    ]
    server.answer(
        said("\n".join([*blocks, f"- **{MARKUP[2]}**", f"> {MARKUP[3]}", f"[{MARKUP[0]}](https://a.example)"]))
    )
    chat = open_tab()
    chat.ask("Question")
    assert chat.evaluate("window.hacked") is None
    assert chat.count(f":is(#messages, header) :is({FORBIDDEN})") == 0
    assert [chat.count(f"#messages {tag}") for tag in ("pre", "table", "blockquote", "a")] == [1, 1, 1, 1]


def test_links_lead_to_web_addresses_only(chat: Chat, server: PageServer) -> None:
    good = ["https://a.example/x_(y)", "http://b.example/?q=1&r=2", "mailto:me@c.example"]
    quoting = '[q](https://d.example/"onmouseover="alert(1))'
    server.answer(
        said(
            "\n\n".join(
                [*LINKS, *(f"[good]({address})" for address in good), quoting, "![image](https://e.example/i.png)"]
            )
        )
    )
    chat.ask("Question")
    found = chat.evaluate("[...document.querySelectorAll('#messages a')].map((a) => [a.href, a.target, a.rel])")
    assert [href for href, _, _ in found] == [
        *good,
        "https://d.example/%22onmouseover=%22alert(1)",
        "https://e.example/i.png",
    ]
    assert {(target, rel) for _, target, rel in found} == {("_blank", "noopener noreferrer nofollow")}
    assert chat.count("#messages img") == 0 and "[a](javascript:alert(1))" in chat.text(".answer .text")


FORBIDDEN_CODE = [
    "document.body.innerHTML = '<b>x</b>'",
    "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 1'}))",
    "fetch('http://127.0.0.1:1/')",
    "new Promise((done, fail) => Object.assign(new Image(), {onload: done, onerror: fail, src: 'https://a.example/i'}))",
    "new Promise((done, fail) => { const frame = document.createElement('iframe'); frame.onload = done;"
    " frame.src = 'https://a.example'; document.body.append(frame); })",
]


def test_policy_forbids_markup_scripts_and_other_servers(server: PageServer, open_tab: OpenTab) -> None:
    chat = open_tab()
    chat.evaluate("document.addEventListener('securitypolicyviolation', () => (window.violations += 1))")
    for code in FORBIDDEN_CODE:
        chat.evaluate("window.violations = 0")
        chat.evaluate(f"(async () => {{ try {{ await ({code}); }} catch {{ }} }})()")
        chat.wait_for("window.violations > 0")
    assert chat.evaluate("window.hacked") is None
    assert chat.evaluate("fetch('/v1/models').then((response) => response.ok)") is True
    assert len(chat.faults()) >= len(FORBIDDEN_CODE)
    chat.browser.events.clear()  # expected here


def test_huge_answer_is_shown_whole(chat: Chat, server: PageServer) -> None:
    paragraph = "Words and **bold** words, `code`, 中文 🙂. " * 25 + "\n\n"
    server.answer([*(event(content=paragraph * 10) for _ in range(60)), *said("The end")])
    chat.ask("Question", wait=False)
    chat.wait_for("document.querySelector('.answer footer')?.children.length", 30)
    assert chat.count(".answer .text > p") == 601 and chat.evaluate(
        "document.querySelector('.answer .text').lastChild.innerText === 'The end'"
    )


HARD = {
    "stars": "*a " * 50_000,
    "mixed marks": "*_~~**__a" * 10_000,
    "run of marks": "_a" + "_" * 100_000 + "b",
    "brackets": "[" * 100_000,
    "links": "[a](" * 30_000,
    "backticks": " ".join("`" * length for length in range(1, 400)),
    "code": "`" + "a" * 100_000 + "`",
    "addresses": "http://" * 15_000 + "." * 100_000 + "a",
    "quotes": ">" * 100_000,
    "nested lists": "\n".join(" " * (2 * depth) + "- a" for depth in range(400)),
    "heading": "# " + "#" * 100_000 + "x",
    "table rule": "|a\n-" + " " * 100_000 + "x",
    "rule": "- " * 50_000 + "x",
    "spaces": " " * 200_000 + "x",
    "lines": "a\n" * 20_000,
    "blank lines": "- a" + "\n" * 100_000 + "b",
    "open fences": "```a\n~~~b\n" * 10_000,
}


def test_hard_texts_take_no_long_time(chat: Chat) -> None:
    """Each takes quadratic time where it is read in some obvious way: more than the browser's limit for an answer."""
    code = (
        "(async () => { const { MarkdownView } = await import('/page/markdown.js');"
        f"const texts = {json.dumps(HARD)}; const lengths = {{}};"
        "for (const [name, text] of Object.entries(texts)) {"
        "const place = document.createElement('div'); new MarkdownView(place).update(text);"
        "lengths[name] = place.textContent.length; } return lengths; })()"
    )
    lengths = chat.evaluate(code)
    whole = {"stars": 150_000, "brackets": 100_000, "links": 120_000, "code": 100_000, "lines": 20_000}
    assert whole.items() <= lengths.items()
