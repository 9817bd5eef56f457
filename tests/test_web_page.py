"""The web page of `gemloupe serve`, in a real browser without a window."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import soundfile
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from gemloupe import cli
from gemloupe.serving import command
from gemloupe.serving.command import Options
from gemloupe.serving.limits import Access, Limits
from serving import Server, endless, running, wait_until
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer

SUM = "What is 27 + 45?"
LEFT_OUT = "GEMLOUPE_TESTS_WITHOUT_BROWSER"
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium, which reaches no address but this machine's."""
    if os.environ.get(LEFT_OUT):
        pytest.skip(f"{LEFT_OUT} is set")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.fail(
            "the web page is tested in Chromium, which is not installed: apt-get install chromium, "
            f"or set {LEFT_OUT}=1 to leave these tests out"
        )
    rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=found, args=[rules]) as started:
            yield started


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    seeing = tmp_path_factory.mktemp("towers")
    vision = {"position_embedding_size": 64}
    save_tiny(make_tiny("e2b", towers="tiny", media_ids=True, vision=vision), seeing)
    save_tiny_tokenizer(seeing)
    limits = Limits(max_body=1 << 20)
    with running("demo:moe", Options(aliases={"seeing": str(seeing)}, limits=limits)) as started:
        yield started


@dataclass
class Watched:
    """A page, with what must not happen on it."""

    page: Page
    url: str
    console: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    """Statuses of 400 and more."""
    elsewhere: list[str] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)

    def watch(self) -> None:
        def message(entry: Any) -> None:
            # The browser's own line on a refused request, which `refused` has.
            if entry.type in ("error", "warning") and "Failed to load resource" not in entry.text:
                self.console.append(entry.text)

        def request(sent: Any) -> None:
            if not sent.url.startswith((self.url, "data:", "blob:")):
                self.elsewhere.append(sent.url)

        self.page.on("console", message)
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", request)
        self.page.on(
            "response", lambda got: self.refused.append(got.status) if got.status >= 400 else None
        )

    def open(self) -> Page:
        self.page.goto(self.url)
        expect(self.page.locator(".welcome")).to_be_visible()
        return self.page


Visit = Callable[..., Watched]


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    """Opens pages; at the end none of them may have complained or asked another origin."""
    seen = []

    def begin(to: Server = server, *, model: str = "demo:moe", **context: Any) -> Watched:
        view = browser.new_context(**context)
        view.set_default_timeout(10_000)
        seen.append(Watched(view.new_page(), to.url))
        seen[-1].watch()
        if model != "demo:moe":
            seen[-1].open().get_by_label("Model").select_option(model)
        return seen[-1]

    yield begin
    for watched in seen:
        assert (watched.console, watched.elsewhere) == ([], [])
        assert watched.refused == watched.expected
        watched.page.context.close()


def _set(page: Page, **values: Any) -> None:
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def _ask(page: Page, text: str) -> Locator:
    """Sends a message; returns the answer when it has ended."""
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")
    answer = page.locator(".assistant").last
    expect(page.locator("#stop")).to_be_hidden()
    expect(answer).not_to_have_class(re.compile("streaming"))
    return answer


def _text(answer: Locator) -> str:
    """The tokens of an answer, joined."""
    return "".join(answer.locator(".prose:not(.thoughts) .token:not(.end)").all_text_contents())


def _exported(page: Page) -> dict[str, Any]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    return json.loads(Path(download.value.path()).read_text())


def _from_api(server: Server, text: str, **more: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **more}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _stream(text: str) -> str:
    """A streamed answer, made up: one token a character."""
    events: list[dict[str, Any]] = []
    for id, char in enumerate(text):
        entry = {"token": char, "id": id, "logprob": -0.5, "bytes": [], "top_logprobs": []}
        choice = {"index": 0, "delta": {"content": char}, "logprobs": {"content": [entry]}}
        events.append({"choices": [{**choice, "finish_reason": None}]})
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def _answer_with(page: Page, text: str) -> None:
    _fulfil(page, _stream(text))


def _fulfil(page: Page, body: str) -> None:
    headers = {"content-type": "text/event-stream"}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, headers=headers))


def _never_ends(page: Page, server: Server) -> None:
    """Makes the page's requests ask for "a" over and over."""
    model = server.model
    more = endless(model.tokenizer, model.config.text.vocab_size)

    def change(route: Route) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **more}))

    page.route("**/v1/chat/completions", change)


def test_a_streamed_answer_is_that_of_the_api(visit: Visit, server: Server) -> None:
    page = visit().open()
    _set(page, temperature=0.8, seed=3, top_p=0.9, top_k=20, system="Only the answer.")
    answer = _ask(page, SUM)
    body = {"temperature": 0.8, "seed": 3, "top_p": 0.9, "top_k": 20}
    messages = [{"role": "system", "content": "Only the answer."}, {"role": "user", "content": SUM}]
    expected = _from_api(server, "", **body, messages=messages)
    assert _text(answer) == expected["choices"][0]["message"]["content"]
    figures = answer.locator(".stats span").all_text_contents()
    usage = expected["usage"]
    assert f"{usage['completion_tokens']} tokens" in figures
    assert f"{usage['prompt_tokens']} prompt tokens" in figures
    assert "complete" in figures and "seed 3" in figures
    assert any(figure.endswith("tokens/s") for figure in figures)
    page.locator("#max_tokens").fill("2")
    again = _ask(page, SUM)
    expect(again.locator(".stats")).to_contain_text("cut at the token limit")


def test_thoughts_stand_apart(visit: Visit, server: Server) -> None:
    page = visit().open()
    _set(page, temperature=0)
    page.get_by_role("switch", name="Think first").check()
    answer = _ask(page, SUM)
    expected = _from_api(server, SUM, temperature=0, enable_thinking=True)
    message = expected["choices"][0]["message"]
    thoughts = answer.locator(".thoughts")
    expect(thoughts).to_be_hidden()  # Folded when the answer came.
    answer.locator("summary").click()
    expect(thoughts).to_be_visible()
    assert "".join(thoughts.locator(".token").all_text_contents()) == message["reasoning"]
    assert _text(answer) == message["content"]
    page.locator("#max_tokens").fill("8")
    expect(_ask(page, SUM).locator(".thoughts")).to_be_visible()  # No answer came after them.


def test_escape_stops_the_server_too(visit: Visit, server: Server) -> None:
    watched = visit()
    page = watched.open()
    _never_ends(page, server)
    cancelled = server.scheduler.counts.cancelled
    page.locator("#input").fill(SUM)
    page.keyboard.press("Enter")
    answer = page.locator(".assistant")
    expect(answer.locator(".token").nth(30)).to_be_attached()
    expect(page.locator("#experts-reading")).to_contain_text("tokens read; busiest")  # Live.
    page.keyboard.press("Escape")
    expect(answer.locator(".stats")).to_contain_text("stopped")
    wait_until(lambda: server.scheduler.counts.cancelled == cancelled + 1)
    wait_until(lambda: server.scheduler.running == 0)
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="New chat").click()
    _set(page, temperature=0)
    assert "72" in _text(_ask(page, SUM))


def test_a_long_answer_is_followed_until_one_scrolls_up(
    visit: Visit, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = server.scheduler._step

    def slow_step() -> None:
        time.sleep(0.005)
        step()

    monkeypatch.setattr(server.scheduler, "_step", slow_step)
    page = visit(viewport={"width": 900, "height": 420}).open()
    _never_ends(page, server)
    page.locator("#input").fill(SUM)
    page.keyboard.press("Enter")
    scroll = page.locator("#scroll")

    def left() -> float:
        return scroll.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight")

    wait_until(lambda: scroll.evaluate("e => e.scrollTop") > 100)
    assert left() < 80
    scroll.hover()
    page.mouse.wheel(0, -300)
    expect(page.locator("#jump")).to_be_visible()
    at = scroll.evaluate("e => e.scrollTop")
    height = scroll.evaluate("e => e.scrollHeight")
    wait_until(lambda: scroll.evaluate("e => e.scrollHeight") > height)
    assert scroll.evaluate("e => e.scrollTop") == at
    page.locator("#jump").click()
    wait_until(lambda: left() < 80)
    page.locator("#stop").click()
    expect(page.locator(".stats")).to_contain_text("stopped")


def _shares(page: Page) -> list[float]:
    texts = page.locator("#tip .share").all_text_contents()
    return [float(re.sub("[<% ]", "", text)) for text in texts]


def test_hovering_shows_the_probabilities_of_a_token(visit: Visit, server: Server) -> None:
    page = visit().open()
    _set(page, temperature=0.8, seed=3)
    answer = _ask(page, "Tell me a story.")
    expected = _from_api(
        server, "Tell me a story.", temperature=0.8, seed=3, logprobs=True, top_logprobs=6
    )
    entries = expected["choices"][0]["logprobs"]["content"]
    tokens = answer.locator(".prose .token:not(.end)")
    assert tokens.count() == len(entries) - 1  # All but the end of the turn.
    tip = page.locator("#tip")
    for index in (1, 2, 3):
        tokens.nth(index).hover()
        expect(tip).to_be_visible()
        chosen = tip.locator(".chosen")
        assert chosen.count() == 1
        share = math.exp(entries[index]["logprob"]) * 100
        shown = float(re.sub("[<% ]", "", chosen.locator(".share").text_content() or ""))
        assert shown == pytest.approx(share, abs=0.51)
        assert len(_shares(page)) in (7, 8)  # Six, the chosen one, and all others.
        assert sum(_shares(page)) == pytest.approx(100, abs=3)
    page.locator("#input").hover()
    expect(tip).to_be_hidden()
    answer.locator(".token.end").hover()
    expect(tip).to_contain_text("<turn|>")


def test_tokens_can_be_read_with_the_keyboard(visit: Visit) -> None:
    page = visit().open()
    answer = _ask(page, SUM)
    page.locator("#input").focus()
    answer.locator(".prose:not(.thoughts)").focus()
    for key, index in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        expect(answer.locator(".token").nth(index)).to_be_focused()
        expect(page.locator("#tip")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()


def test_without_probabilities_none_are_asked_for(visit: Visit, server: Server) -> None:
    page = visit().open()
    page.get_by_role("switch", name="Probabilities").uncheck()
    _set(page, temperature=0)
    with page.expect_request("**/v1/chat/completions") as sent:
        answer = _ask(page, SUM)
    assert "logprobs" not in sent.value.post_data_json
    assert answer.locator(".token").count() == 0
    expected = _from_api(server, SUM, temperature=0)["choices"][0]["message"]["content"]
    assert answer.locator(".prose:not(.thoughts)").text_content() == expected


def test_the_map_of_experts_is_the_router_trace(visit: Visit, server: Server) -> None:
    page = visit().open()
    _set(page, temperature=0.8, seed=3)
    _ask(page, SUM)
    chat = [{"role": "user", "content": SUM}]
    out = server.model.generate(chat, temperature=0.8, seed=3, max_new_tokens=4096)
    layers = len(out.routing.experts)
    canvas = page.locator("#experts-map")
    box = canvas.bounding_box()
    assert box is not None
    # The numbers of layers and experts stand beside and below the cells.
    wide, high = (box["width"] - 20) / 16, (box["height"] - 16) / layers

    def centre(layer: int, expert: int) -> tuple[float, float]:
        return 20 + (expert + 0.5) * wide, (layer + 0.5) * high

    for kind, checked in (("With the prompt", range(layers)), ("Answer", [0, layers - 1])):
        page.get_by_text(kind, exact=True).click()
        experts = out.routing.experts[:, 0 if kind != "Answer" else len(out.prompt) :]
        read = experts.shape[1]
        for layer in checked:
            counts = np.bincount(experts[layer].ravel(), minlength=16)
            for expert in range(16):
                x, y = centre(layer, expert)
                page.mouse.move(box["x"] + x, box["y"] + y)
                text = page.locator("#tip").text_content() or ""
                begin = f"Layer {layer}, expert {expert}: {counts[expert]} of {read} tokens, "
                assert text.startswith(begin), text
    page.locator("#input").hover()
    picture = PIL.Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
    counts = np.stack([np.bincount(layer.ravel(), minlength=16) for layer in experts])
    for flat, colour in ((counts.argmax(), (6, 70, 60)), (counts.argmin(), (236, 233, 226))):
        x, y = centre(*divmod(int(flat), 16))
        assert picture.getpixel((int(x), int(y))) == colour
    assert counts.min() == 0


def test_texts_are_never_markup(visit: Visit) -> None:
    page = visit().open()
    title = page.title()
    links = "[a](javascript:alert(1)) ![b](https://example.org/x.png)"
    table = f"|{HOSTILE}|b|\n|-|-|\n|c|d|"
    written = f"{HOSTILE}\n{links}\n\n```html\n{HOSTILE}\n```\n\n- **{HOSTILE}**\n\n{table}\n"
    _answer_with(page, written)
    _set(page, system=HOSTILE)
    answer = _ask(page, HOSTILE)
    expect(page.locator(".user p")).to_have_text(HOSTILE)
    assert _text(answer).count(HOSTILE) == 4
    assert links in _text(answer)
    assert page.locator(".message :is(img, script, a, iframe)").count() == 0
    answer.locator(".token").first.hover()
    assert page.locator("#tip :is(img, script)").count() == 0
    page.unroute("**/v1/chat/completions")
    problem = {"error": {"message": HOSTILE}}
    _fulfil(page, f"data: {json.dumps(problem)}\n\n")
    answer = _ask(page, "Hi")
    expect(answer.get_by_role("alert")).to_contain_text(HOSTILE)
    assert page.title() == title


def test_markup_is_set_in_type(visit: Visit) -> None:
    watched = visit()
    page = watched.open()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    _answer_with(
        page,
        "# Title\n\nSome **bold** and *slanted* text, 2*3*4, snake_case_name and `a * b`.\n\n"
        "1. one\n2. two\n   - inner\n\n```python\nx = 1 ** 2\n\ny = x\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n> said\n\n---\n\nThe **end",
    )
    body = _ask(page, "Show").locator(".prose:not(.thoughts)")
    for selector, text in (
        ("h3", "Title"),
        ("p strong", "bold"),
        ("p em", "slanted"),
        ("p code", "a * b"),
        ("ol > li > ul > li", "inner"),
        ("pre code", "x = 1 ** 2\n\ny = x"),
        ("td >> nth=1", "2"),
        ("blockquote", "said"),
        (":scope > p >> nth=-1", "The **end"),
    ):
        assert body.locator(selector).first.text_content() == text
    assert body.locator("hr").count() == 1 and body.locator("ol > li").count() == 2
    expect(body.locator("p").first).to_contain_text("2*3*4, snake_case_name and")
    body.get_by_role("button", name="Copy").click()
    expect(body.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == "x = 1 ** 2\n\ny = x"


def _png() -> bytes:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _wav() -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000)
    soundfile.write(file, samples, 16_000, format="WAV")
    return file.getvalue()


def test_pictures_and_sounds_reach_the_model(visit: Visit, server: Server) -> None:
    page = visit(model="seeing").page
    expect(page.locator("#experts")).to_be_hidden()  # This model has none.
    _set(page, temperature=0, max_tokens=3)
    image, audio = _png(), _wav()
    page.locator("#files").set_input_files(
        [
            {"name": "stone.png", "mimeType": "image/png", "buffer": image},
            {"name": "stone.wav", "mimeType": "audio/wav", "buffer": audio},
        ]
    )
    expect(page.get_by_alt_text("stone.png")).to_be_visible()
    answer = _ask(page, "hi")
    expect(page.locator(".user img")).to_be_visible()
    expect(page.locator(".user audio")).to_be_visible()
    model = server.service.registry.find("seeing").served.model
    content = [
        {"type": "image", "image": image},
        {"type": "audio", "audio": audio},
        {"type": "text", "text": "hi"},
    ]
    chat = [{"role": "user", "content": content}]
    out = model.generate(chat, max_new_tokens=3, temperature=0, logprobs=1)
    assert len(out.prompt.positions("image")) > 1 and len(out.prompt.positions("audio")) > 1
    expect(answer.locator(".stats")).to_contain_text(f"{len(out.prompt)} prompt tokens")
    logprobs = [entry["logprob"] for entry in _exported(page)["messages"][1]["logprobs"]]
    assert logprobs == [logprob for logprob, _ in out.logprobs]


def test_pictures_can_be_dropped_and_pasted(visit: Visit) -> None:
    page = visit(model="seeing").page
    script = """([kind, data]) => {
        const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], `${kind}.png`, { type: "image/png" }));
        const made = kind === "paste"
            ? new ClipboardEvent(kind, { clipboardData: files, bubbles: true, cancelable: true })
            : new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true });
        document.body.dispatchEvent(made);
    }"""
    data = base64.b64encode(_png()).decode()
    page.evaluate(script, ["dragenter", data])
    expect(page.locator("#drop")).to_be_visible()
    page.evaluate(script, ["drop", data])
    page.evaluate(script, ["paste", data])
    expect(page.locator("#drop")).to_be_hidden()
    expect(page.locator("#attached img")).to_have_count(2)
    page.get_by_role("button", name="Remove drop.png").click()
    expect(page.locator("#attached img")).to_have_count(1)


def test_files_that_are_no_pictures_are_refused_in_words(visit: Visit) -> None:
    watched = visit(model="seeing")
    page = watched.page
    pdf = {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"}
    page.locator("#files").set_input_files([pdf])
    expect(page.locator("#note")).to_have_text("“a.pdf” is neither a picture nor a sound.")
    large = {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * (1 << 20)}
    page.locator("#files").set_input_files([large])
    expect(page.locator("#note")).to_have_text(
        "“large.png” is too large: this server takes 0.8 MiB."
    )
    false = {"name": "false.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.locator("#files").set_input_files([false])
    answer = _ask(page, "hi")
    expect(answer.get_by_role("alert")).to_contain_text("is no image in a format that is read")
    watched.expected.append(400)
    page.get_by_role("button", name="Edit and resend").click()
    expect(page.locator("#input")).to_have_value("hi")
    expect(page.locator("#attached li")).to_have_count(1)


def test_a_refused_request_can_be_tried_again(visit: Visit) -> None:
    watched = visit()
    page = watched.open()
    _set(page, temperature=0)
    busy = {"error": {"message": "64 requests are waiting already; try again later"}}
    headers = {"Retry-After": "7"}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, headers=headers, json=busy),
        times=1,
    )
    problem = _ask(page, SUM).get_by_role("alert")
    expect(problem).to_contain_text("The server is busy: 64 requests are waiting already")
    expect(problem).to_contain_text("Try again in 7 s.")
    watched.expected.append(429)
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    problem.get_by_role("button", name="Try again").click()
    problem = page.locator(".assistant").get_by_role("alert")
    expect(problem).to_contain_text("The server can't be reached")
    problem.get_by_role("button", name="Try again").click()
    expect(page.locator(".assistant .prose:not(.thoughts)")).to_contain_text("72")
    expect(page.locator(".assistant")).to_have_count(1)
    page.locator("#temperature").fill("-1")
    page.locator("#input").fill("Hi")
    page.keyboard.press("Enter")
    expect(page.locator("#note")).to_contain_text("Temperature:")


def test_the_keyboard_is_enough(visit: Visit) -> None:
    page = visit().open()
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#input")).to_have_value("one\ntwo")
    assert page.locator(".user").count() == 0
    page.keyboard.press("Enter")
    expect(page.locator(".user p")).to_have_text("one\ntwo")
    expect(page.locator("#input")).to_have_value("")
    expect(page.locator("#stop")).to_be_hidden()
    unnamed = """() => [...document.querySelectorAll("button, input, select, textarea, canvas")]
        .filter((e) => e.type !== "file" && !e.labels?.length && !e.getAttribute("aria-label")
            && !e.textContent.trim()).map((e) => e.outerHTML)"""
    assert page.evaluate(unnamed) == []
    page.locator("#experts-map").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#experts-reading")).to_contain_text("Layer 1, expert 0:")


def test_the_last_message_can_be_edited_and_the_chat_exported(visit: Visit, server: Server) -> None:
    page = visit().open()
    _set(page, temperature=0)
    first = _text(_ask(page, SUM))
    _ask(page, "What is 1 + 1?")
    page.get_by_role("button", name="Edit and resend").click()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator("#input")).to_have_value("What is 1 + 1?")
    second = _text(_ask(page, "What is 2 + 2?"))
    saved = _exported(page)
    texts = [message["content"] for message in saved["messages"]]
    assert texts == [SUM, first, "What is 2 + 2?", second]
    messages = [{"role": "user", "content": SUM}, {"role": "assistant", "content": first},
                {"role": "user", "content": "What is 2 + 2?"}]  # fmt: skip
    expected = _from_api(server, "", messages=messages, temperature=0, logprobs=True)
    assert second == expected["choices"][0]["message"]["content"]
    ids = [entry["id"] for entry in expected["choices"][0]["logprobs"]["content"]]
    assert [entry["id"] for entry in saved["messages"][3]["logprobs"]] == ids
    assert len(saved["messages"][3]["routing"]["tokens"]) == (expected["usage"]["total_tokens"] - 1)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".welcome")).to_be_visible()
    expect(page.locator(".message")).to_have_count(0)


def _contrast(page: Page, colour: str, on: str) -> float:
    """WCAG 2's contrast of two of the page's colours."""
    script = """(names) => names.map((name) => {
        const probe = document.createElement("i");
        probe.style.color = `var(${name})`;
        document.body.append(probe);
        const found = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
        probe.remove();
        return found;
    })"""

    def luminance(rgb: list[int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                  for c in (value / 255 for value in rgb)]  # fmt: skip
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, page.evaluate(script, [colour, on])))
    return (high + 0.05) / (low + 0.05)


def test_it_is_dark_in_the_dark_and_readable_in_both(visit: Visit) -> None:
    levels = {}
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme).open()
        for on in ("--page", "--surface"):
            assert _contrast(page, "--text", on) > 12
            assert _contrast(page, "--muted", on) > 4.5
            assert _contrast(page, "--accent", on) > 4.5
        assert _contrast(page, "--accent-text", "--accent") > 4.5
        assert _contrast(page, "--danger", "--danger-soft") > 4.5
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        levels[scheme] = sum(map(int, re.findall(r"\d+", colour)))
    assert levels["dark"] < 100 and levels["light"] > 700


def test_a_narrow_screen_holds_it(visit: Visit) -> None:
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True).open()
    _answer_with(page, "A " + "long" * 60 + "\n\n```\n" + "code " * 60 + "\n```\n")
    _ask(page, SUM)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    assert page.locator("#scroll").evaluate("e => e.scrollWidth - e.clientWidth") == 0
    expect(page.locator("#panel")).to_be_hidden()
    page.locator(".token").first.tap()
    expect(page.locator("#tip")).to_be_visible()
    page.get_by_role("button", name="Settings", exact=True).click()
    expect(page.locator("#temperature")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#panel")).to_be_hidden()


def test_the_page_asks_for_the_key_and_keeps_it_in_the_tab(visit: Visit) -> None:
    with running("demo:edge", Options(access=Access(api_key="a secret"))) as guarded:
        watched = visit(guarded)
        page = watched.page
        page.goto(guarded.url)
        for key, said in (("wrong", "That key is not the right one."), ("a secret", "")):
            page.get_by_label("API key").fill(key)
            page.get_by_role("button", name="Connect").click()
            if said:
                expect(page.get_by_text(said)).to_be_visible()
        expect(page.locator(".welcome")).to_be_visible()
        assert "72" in _text(_ask(page, SUM))
        page.reload()
        expect(page.locator(".welcome")).to_be_visible()
        assert page.evaluate("() => [localStorage.length, document.cookie]") == [0, ""]
        assert page.evaluate("() => Object.keys(sessionStorage)") == ["gemloupe-api-key"]
        watched.expected += [401, 401]


def test_browsers_alone_get_the_page_and_its_policy(server: Server) -> None:
    page = httpx.get(server.url, headers={"Accept": "text/html,*/*"})
    assert page.text.startswith("<!doctype html>")
    assert httpx.get(server.url).text == "gemloupe is running"  # What Ollama's clients look for.
    script = httpx.get(f"{server.url}/page/page.js")
    assert script.headers["content-type"].startswith("text/javascript")
    for answer in (page, script):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/nothing.js", "/page/index.html", "/page/..%2fguard.py"):
        assert httpx.get(server.url + path).status_code == 404
    with running("demo:edge", Options(access=Access(page=False))) as without:
        answer = httpx.get(without.url, headers={"Accept": "text/html"})
        assert answer.text == "gemloupe is running"
        assert httpx.get(f"{without.url}/page/page.js").status_code == 404


def test_its_own_page_may_call_at_an_address_but_not_at_any_name() -> None:
    access = Access(hosts=(), page=True)
    with running("demo:edge", Options(access=access)) as server:

        def status(host: str, origin: str) -> int:
            headers = {"Host": host, "Origin": origin}
            return httpx.get(f"{server.url}/v1/models", headers=headers).status_code

        assert status("192.168.1.5:11434", "http://192.168.1.5:11434") == 200
        assert status("[fd00::1]:11434", "http://[fd00::1]:11434") == 200
        assert status("192.168.1.5:11434", "http://192.168.1.6:11434") == 403
        assert status("192.168.1.5:11434", "http://192.168.1.5:80") == 403
        # A name could have been pointed here by its owner.
        assert status("example.org", "http://example.org") == 403
    with running("demo:edge", Options(access=Access(hosts=("gems.lan",)))) as server:
        assert status("gems.lan", "https://gems.lan") == 200


def test_the_command_line_can_leave_the_page_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Options] = []
    monkeypatch.setattr(command, "serve", lambda source, options: asked.append(options))
    cli.main(["serve", "demo:edge"])
    cli.main(["serve", "demo:edge", "--no-page"])
    assert [options.access.page for options in asked] == [True, False]
