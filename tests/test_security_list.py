"""gl.help("security"): each of its lines has a test, and those that were missing."""

from __future__ import annotations

import base64
import hmac
import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import PIL.Image
import pytest
import soundfile

import gemloupe as gl
from gemloupe import help_pages
from gemloupe.serving.command import Options
from gemloupe.serving.limits import Access, Limits
from serving import Server, endless, running
from tiny_models import make_tiny, save_tiny, save_tiny_tokenizer

# How a line begins -> the tests of it, wherever they stand.
TESTS = {
    "Without `--host`": ["addresses_of_this_machine", "listening_to_others_needs_a_key"],
    "With a key": ["a_key_guards_every_route", "keys_are_compared_in_constant_time"],
    "A web page of another": ["pages_of_other_origins", "an_origin_can_be_allowed",
                              "its_own_page_may_call_at_an_address"],
    "On a loopback": ["a_name_that_was_pointed_here"],
    "A body above": ["long_bodies_are_refused", "slow_bodies_are_refused"],
    "What is not a JSON": ["what_is_no_json_object", "wrong_fields_are_named"],
    "A prompt above": ["long_prompts_are_refused", "long_answers_are_cut"],
    "A response_format": ["wrong_fields_are_named", "a_row_that_fails_takes_no_other"],
    "Captures and routing": ["wrong_fields_are_named", "the_numbers_of_the_list"],
    "More than 8": ["wrong_fields_are_named", "a_model_without_vision_says_so",
                    "more_sounds_than_four"],
    "Images and videos are read": ["images_come_from_the_request_alone"],
    "Image bytes": ["broken_pictures_and_sounds"],
    "Videos are decoded": ["videos_are_few_and_need_their_decoder", "large_frames_are_refused",
                           "long_videos_and_playlists"],
    "Sounds are decoded": ["broken_pictures_and_sounds", "long_sounds_are_not_transcribed"],
    "Edits are named": ["wrong_fields_are_named"],
    "Adapters are loaded": ["adapters_come_from_their_folder", "without_an_adapter_folder"],
    "A text of more": ["texts_that_no_context_holds", "four_texts_are_tokenised_at_once"],
    "More requests": ["requests_at_once_are_bounded"],
    "More than `--max-queue`": ["a_full_queue_refuses", "a_server_that_stops_says_so"],
    "A row that fails": ["a_row_that_fails_takes_no_other"],
    "A client that goes": ["a_client_that_goes_away"],
    "Errors of the": ["errors_of_our_own", "paths_of_this_machine"],
    "Its Content-Security-Policy": ["browsers_alone_get_the_page_and_its_policy"],
    "What users and models write": ["texts_are_never_markup"],
    "It keeps the API key": ["the_page_asks_for_the_key_and_keeps_it"],
    "A PDF is read": ["hostile_pdfs_end", "time_and_memory_of_a_pdf"],
    "Special tokens": ["special_tokens_in_files"],
    "In folders": ["folders_are_walked_by_name"],
}  # fmt: skip
PIXELS = 48 * 32 * 8
LIMITS = Limits(max_new_tokens=5, max_transcribed=1.0, max_video_pixels=PIXELS)


def test_every_line_of_the_list_has_its_tests() -> None:
    lines = re.findall(r"^- (.+)$", help_pages.text("security"), re.MULTILINE)
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for line in lines:
        begins = [begin for begin in TESTS if line.startswith(begin)]
        assert begins, f"this line has no test: {line}"
        for name in TESTS[max(begins, key=len)]:
            assert f"def test_{name}" in sources, f"{line}: there is no test_{name}…"
    unused = [begin for begin in TESTS if not any(line.startswith(begin) for line in lines)]
    assert not unused


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("towers")
    save_tiny(make_tiny("e2b", towers="tiny", media_ids=True), folder)
    save_tiny_tokenizer(folder)
    with running(str(folder), Options(limits=LIMITS)) as started:
        yield started


@pytest.fixture(scope="module")
def http(seeing: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=seeing.url, timeout=30) as client:
        yield client


def _ask(http: httpx.Client, *parts: dict[str, Any]) -> httpx.Response:
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "hi"}]}]
    return http.post("/v1/chat/completions", json={"messages": chat, "max_tokens": 1})


def _picture(data: bytes, kind: str = "png") -> dict[str, Any]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def _sound(data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}


def _wav(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(16_000 * seconds)), 16_000, format="WAV")
    return file.getvalue()


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = hmac.compare_digest

    def counted(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return compare(a, b)

    with running("demo:edge", Options(access=Access(api_key="secret"))) as server:
        monkeypatch.setattr(hmac, "compare_digest", counted)
        for given, status in (("secret", 200), ("secrat", 401), ("s", 401)):
            headers = {"Authorization": f"Bearer {given}"}
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert answer.status_code == status
            assert compared.pop() == (given.encode(), b"secret") and not compared


def test_long_answers_are_cut(seeing: Server, http: httpx.Client) -> None:
    model = seeing.model
    body = endless(model.tokenizer, model.config.text.vocab_size) | {"prompt": [2, 5]}
    for asked in ({"max_tokens": 1000}, {"max_tokens": 10**9}):
        answer = http.post("/v1/completions", json={**body, **asked}).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["choices"][0]["finish_reason"] == "length"


def test_the_numbers_of_the_list_are_the_servers() -> None:
    limits = Limits()
    assert limits.max_capture == 64 << 20 and limits.body_seconds == 30
    assert (limits.max_choices, limits.max_images, limits.max_sounds) == (8, 16, 4)
    assert (limits.max_transcribed, limits.spare_requests) == (600, 32)


def test_more_sounds_than_four_are_refused(http: httpx.Client) -> None:
    answer = _ask(http, *[_sound(_wav(0.1))] * 5)
    assert answer.status_code == 400
    assert "5 sounds; expected at most 4" in answer.json()["error"]["message"]


def test_broken_pictures_and_sounds_are_refused(http: httpx.Client) -> None:
    file = io.BytesIO()
    PIL.Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(file, "PNG")
    png = file.getvalue()
    bomb = png[:16] + (100_000).to_bytes(4, "big") * 2 + png[24:]
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    pictures = (b"", b"no picture", png[:60], png[:-20], bomb, script, b"<svg></svg>")
    for data in pictures:
        answer = _ask(http, _picture(data))
        assert answer.status_code == 400, (data[:20], answer.text)
    wav = _wav(0.1)
    for data in (b"", b"no sound", wav[:20], b"RIFF" + b"\xff" * 100):
        answer = _ask(http, _sound(data))
        assert answer.status_code == 400, (data[:20], answer.text)
    assert _ask(http, _picture(png), _sound(wav)).status_code == 200


def _video(frames: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "bgr0"
        for index in range(frames):
            picture = np.full((32, 48, 3), 20 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def test_long_videos_and_playlists_are_refused(http: httpx.Client, tmp_path: Path) -> None:
    def asked(data: bytes) -> httpx.Response:
        url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
        return _ask(http, {"type": "video_url", "video_url": {"url": url}})

    answer = asked(_video(9))
    assert answer.status_code == 400
    assert f"expected at most {PIXELS:,}" in answer.json()["error"]["message"]
    file = tmp_path / "other.mkv"
    file.write_bytes(_video(2))
    for playlist in (
        f"#EXTM3U\n#EXTINF:1,\n{file}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{file}'\n",
    ):
        answer = asked(playlist.encode())
        assert answer.status_code == 400
        assert "is no video that is read" in answer.json()["error"]["message"]
    assert asked(file.read_bytes()).status_code == 200


def test_long_sounds_are_not_transcribed(http: httpx.Client) -> None:
    files = {"file": ("a.wav", _wav(1.5))}
    answer = http.post("/v1/audio/transcriptions", files=files)
    assert answer.status_code == 400
    assert "2 s long; expected at most 1 s" in answer.json()["error"]["message"]


def test_four_texts_are_tokenised_at_once(
    seeing: Server, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = gl.Model.prepare
    lock, enough = threading.Lock(), threading.Event()
    inside = most = 0

    def slow(*arguments: Any, **more: Any) -> Any:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
            if inside >= 4:
                enough.set()
        enough.wait(10)
        try:
            return prepare(*arguments, **more)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(gl.Model, "prepare", slow)
    answers: list[int] = []

    def ask() -> None:
        body = {"prompt": "hi", "max_tokens": 1}
        answers.append(http.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [200] * 9 and most == 4
