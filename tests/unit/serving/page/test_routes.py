"""What the server sends for the page: known files only, each under the policy, nothing from elsewhere."""

from __future__ import annotations

import re

from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving.page import page_files, page_routes

client = TestClient(Starlette(routes=page_routes()))


def test_page_and_its_files_are_sent_with_the_policy() -> None:
    assert "/" in page_files() and "/page/chat.js" in page_files() and not any(".py" in path for path in page_files())
    for path in page_files():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.content
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';") and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (client.head(path).content, client.head(path).headers["content-length"]) == (
            b"",
            str(len(answer.content)),
        )


def test_no_other_file_can_be_asked_for() -> None:
    for path in (
        "/page/__init__.py",
        "/page/../__init__.py",
        "/page/%2e%2e/engine.py",
        "/page/",
        "/page/nothing.js",
        "/index.html",
    ):
        assert client.get(path).status_code == 404, path
    assert client.post("/").status_code == 405


def test_page_names_no_other_server_and_has_no_inline_script_or_style() -> None:
    for path, file in page_files().items():
        text = file.body.decode()
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert [address for address in addresses if re.match(r"https?://\w", address)] == [], path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path
        )
    page = page_files()["/"].body.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)
    for path in re.findall(r"(?:src|href)=\"(/[^\"]*)\"", page):
        assert path in page_files()


def test_every_import_of_a_script_exists() -> None:
    for path, file in page_files().items():
        for name in re.findall(r"from \"\./([\w.]+)\"", file.body.decode()):
            assert f"/page/{name}" in page_files(), path
