"""Answering questions: the batch file, an endpoint and its failures, the terminal, the command line, a fake engine."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes.answering import AnswerModelConfig, AnswerRolloutConfig, Output, open_answerer
from recipes.batch import answer_batch, read_lines, result_line
from recipes.endpoint import Endpoint, EndpointConfig, EndpointError
from recipes.infer import Session, converse, main, pixel_limits
from recipes.questions import Question, named_prompt, prompt_hash, read_questions, to_prompt
from rollout.config import InputsConfig
from rollout.types import Prompt, SamplingParams
from rsgrpo.console import Console
from rsgrpo.errors import RsgrpoError

ANSWER = "<observe>o</observe>\n<evidence>\n[1]: 16%\n</evidence>\n<think>[1]</think>\n<answer>16%</answer>"
SMALL = InputsConfig(min_pixels=784, max_pixels=3136, max_images=2)
GREEDY = SamplingParams(temperature=0.0, max_tokens=64)


# A server to talk to


@dataclass
class Server:
    """An OpenAI-compatible endpoint that behaves as `reply` says.

    reply: (number of the request, request body) -> (status, headers, reply body); a text answers with a completion.
    """

    reply: Callable[[int, dict[str, Any]], Any]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""


def handler_of(server: Server) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send(200, {}, json.dumps({"data": [{"id": "served-model"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.bodies.append(body)
                server.keys.append(self.headers.get("Authorization"))
                reply = server.reply(len(server.bodies), body)
            if isinstance(reply, tuple):
                self.send(reply[0], reply[1], reply[2].encode())
            elif body.get("stream"):
                pieces = [reply[place : place + 7] for place in range(0, len(reply), 7)]
                events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
                events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
                self.send(200, {"Content-Type": "text/event-stream"}, text.encode())
            else:
                choice = {"message": {"content": reply}, "finish_reason": "stop"}
                self.send(200, {}, json.dumps({"choices": [choice]}).encode())

    return Handler


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers; they end with the test."""
    running: list[tuple[ThreadingHTTPServer, threading.Thread]] = []

    def start(reply: Callable[[int, dict[str, Any]], Any] = lambda *_: ANSWER) -> Server:
        server = Server(reply)
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server))
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((http, thread))
        server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
        return server

    yield start
    for http, thread in running:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture
def connect() -> Iterator[Callable[..., Endpoint]]:
    """Open endpoints that hardly wait between tries."""
    opened: list[Endpoint] = []

    def start(server: Server, **settings: Any) -> Endpoint:
        defaults: dict[str, Any] = {"url": server.url, "backoff_s": 0.01, "max_tries": 3}
        config = EndpointConfig(**(defaults | settings))
        opened.append(Endpoint(config, GREEDY, SMALL))
        return opened[-1]

    yield start
    for endpoint in opened:
        endpoint.close()


@pytest.fixture
def page(tmp_path: Path) -> str:
    Image.new("RGB", (200, 100), "white").save(tmp_path / "page.png")
    return str(tmp_path / "page.png")


def prompts_of(count: int, page: str | None = None) -> list[Prompt]:
    images, mark = ((page,), "<image>") if page else ((), "")
    return [Prompt(f"q{number}", f"{mark}question {number}", images) for number in range(count)]


def texts(endpoint: Endpoint, prompts: list[Prompt]) -> dict[str, str]:
    return {output.prompt.id: output.error or output.text for output in endpoint.answer(prompts)}


# Asking an endpoint


def test_an_endpoint_answers_every_prompt(serve, connect):
    server = serve(lambda _, body: body["messages"][0]["content"][-1]["text"].upper())
    assert texts(connect(server), prompts_of(20)) == {f"q{number}": f"QUESTION {number}" for number in range(20)}


def test_the_request_holds_pages_and_text_in_order_and_the_sampling(serve, connect, page):
    server = serve()
    prompt = Prompt("q", "first <image> then <image> last", (page, page), system="Be brief.")
    assert [output.text for output in connect(server).answer([prompt])] == [ANSWER]
    body = server.bodies[0]
    assert [part["type"] for part in body["messages"][1]["content"]] == [
        "text",
        "image_url",
        "text",
        "image_url",
        "text",
    ]
    assert body["messages"][0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("served-model", 0.0, 64)
    assert "top_k" not in body


def test_pages_are_sent_as_training_sees_them(serve, connect, page):
    import base64

    server = serve()
    list(connect(server).answer(prompts_of(1, page)))
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as sent:
        assert sent.size == (56, 28)  # 200 x 100 within 3136 pixels, sides multiples of 28


def test_the_key_comes_from_the_environment(serve, connect, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    server = serve()
    list(connect(server, api_key_env="MY_KEY").answer(prompts_of(1)))
    assert server.keys == ["Bearer secret"]


def test_failures_that_pass_are_tried_again(serve, connect):
    server = serve(lambda number, _: (503, {"Retry-After": "0"}, "busy") if number < 3 else ANSWER)
    assert texts(connect(server), prompts_of(1)) == {"q0": ANSWER}
    assert len(server.bodies) == 3


def test_a_request_that_the_server_refuses_stops_no_other(serve, connect):
    def reply(_, body):
        if "question 1" in str(body):
            return 400, {}, json.dumps({"error": {"message": "too long"}})
        return ANSWER

    found = texts(connect(serve(reply)), prompts_of(3))
    assert found == {"q0": ANSWER, "q1": "the endpoint refuses the request, HTTP 400: too long", "q2": ANSWER}


def test_a_request_that_always_crashes_the_server_stops_no_other(serve, connect):
    server = serve(lambda _, body: (500, {}, "boom") if "question 0" in str(body) else ANSWER)
    found = texts(connect(server, concurrency=2), prompts_of(6))
    assert found.pop("q0") == "the endpoint failed 3 times, HTTP 500: boom"
    assert set(found.values()) == {ANSWER}


def test_a_reply_of_another_form_is_that_prompts_error(serve, connect):
    found = texts(connect(serve(lambda *_: (200, {}, '{"hello": 1}'))), prompts_of(1))
    assert found["q0"].startswith("the reply is no chat completion: KeyError")


def test_an_unreadable_page_is_that_prompts_error(serve, connect, tmp_path):
    found = texts(connect(serve()), prompts_of(1, str(tmp_path / "none.png")))
    assert found["q0"].endswith("none.png does not exist")


def test_too_many_pages_are_that_prompts_error(serve, connect, page):
    prompt = Prompt("q", "<image>" * 3, (page,) * 3)
    assert texts(connect(serve()), [prompt]) == {"q": "the prompt has 3 images, inputs.max_images is 2"}


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (404, "usually ends in /v1")])
def test_a_hopeless_refusal_stops_at_once_and_says_why(serve, connect, status, hint):
    server = serve(lambda *_: (status, {}, "no"))
    with pytest.raises(EndpointError, match=f"HTTP {status}: no; .*{hint}"):
        list(connect(server).answer(prompts_of(1)))
    assert len(server.bodies) == 1


def test_a_server_that_is_down_is_an_error_with_the_reason():
    config = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", max_tries=2, backoff_s=0.0)
    endpoint = Endpoint(config, GREEDY, SMALL)
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1 did not answer in 2 tries, the last was ConnectError"):
        list(endpoint.answer(prompts_of(3)))
    endpoint.close()


def test_a_streamed_answer_comes_in_pieces_and_then_whole(serve, connect):
    *pieces, output = connect(serve()).stream(prompts_of(1)[0])
    assert len(pieces) > 5
    assert "".join(pieces) == ANSWER
    assert (output.text, output.finish_reason, output.error) == (ANSWER, "stop", "")


def test_a_server_that_does_not_stream_answers_at_once(serve, connect):
    body = json.dumps({"choices": [{"message": {"content": ANSWER}, "finish_reason": "length"}]})
    *pieces, output = connect(serve(lambda *_: (200, {}, body))).stream(prompts_of(1)[0])
    assert pieces == [ANSWER]
    assert output.finish_reason == "length"


def test_a_stream_that_breaks_off_keeps_its_text(serve, connect):
    event = f"data: {json.dumps({'choices': [{'delta': {'content': 'half'}}]})}\n\ndata: {{broken\n\n"
    *_, output = connect(serve(lambda *_: (200, {"Content-Type": "text/event-stream"}, event))).stream(prompts_of(1)[0])
    assert (output.text, output.finish_reason) == ("half", "error")
    assert output.error.startswith("the answer broke off")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"url": "localhost:8000"}, "must start with http"),
        ({"concurrency": 0}, "endpoint.concurrency must be >= 1"),
        ({"max_tries": 0}, "endpoint.max_tries must be >= 1"),
        ({"timeout_s": 0}, "endpoint.timeout_s must be > 0"),
    ],
)
def test_impossible_endpoint_settings_are_refused(settings, complaint):
    with pytest.raises(RsgrpoError, match=complaint):
        EndpointConfig(**settings)


# The batch file


class Scripted:
    """Answers from a function; counts what it was asked."""

    name = "model-a"

    def __init__(self, reply: Callable[[Prompt], str] = lambda _: ANSWER, fail_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._reply = reply
        self._fail_after = fail_after

    def answer(self, prompts):
        for prompt in prompts:
            if self._fail_after is not None and len(self.asked) >= self._fail_after:
                raise RsgrpoError("the endpoint is down")
            self.asked.append(prompt.id)
            text = self._reply(prompt)
            yield Output(prompt, "", "error", text[1:]) if text.startswith("!") else Output(prompt, text, "stop")

    def stream(self, prompt):
        yield "<obs"
        yield from self.answer([prompt])

    def close(self):
        pass


def batch(prompts, answerer, out, share_equal=False):
    return answer_batch(prompts, answerer, out, share_equal=share_equal, console=Console(io.StringIO()))


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_question_gets_one_line_with_all_fields(tmp_path):
    batch(prompts_of(3), Scripted(), tmp_path / "deep/out.jsonl")
    lines = lines_of(tmp_path / "deep/out.jsonl")
    assert [line["id"] for line in lines] == ["q0", "q1", "q2"]
    assert list(lines[0]) == [
        "id", "question", "answer", "insufficient", "observe", "evidence", "think", "citations", "format_ok", "errors",
        "raw", "finish_reason", "prompt_hash", "model", "num_prompt_tokens", "num_response_tokens",
    ]  # fmt: skip
    assert (lines[0]["answer"], lines[0]["raw"], lines[0]["format_ok"]) == ("16%", ANSWER, True)


def test_a_stopped_batch_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(RsgrpoError, match=r"down\n2 answers of this run and 0 earlier ones are kept in .*out.jsonl"):
        batch(prompts_of(5), Scripted(fail_after=2), out)
    assert [line["id"] for line in lines_of(out)] == ["q0", "q1"]
    second = Scripted()
    summary = batch(prompts_of(5), second, out)
    assert second.asked == ["q2", "q3", "q4"]
    assert (summary.asked, summary.reused, summary.failed) == (3, 2, 0)
    assert [line["id"] for line in lines_of(out)] == [f"q{number}" for number in range(5)]


def test_a_line_cut_off_by_a_crash_is_asked_again(tmp_path):
    out = tmp_path / "out.jsonl"
    batch(prompts_of(3), Scripted(), out)
    out.write_bytes(out.read_bytes()[:-20])
    second = Scripted()
    batch(prompts_of(3), second, out)
    assert second.asked == ["q2"]
    assert len(lines_of(out)) == 3


def test_failed_questions_are_asked_again(tmp_path):
    out = tmp_path / "out.jsonl"
    first = batch(prompts_of(2), Scripted(lambda prompt: "!page lost" if prompt.id == "q1" else ANSWER), out)
    assert first.failed == 1
    assert lines_of(out)[1] | {"prompt_hash": "", "id": ""} == {
        "id": "", "question": "", "answer": "", "insufficient": False, "observe": "", "evidence": [], "think": "",
        "citations": [], "format_ok": False, "errors": ["page lost"], "raw": "", "finish_reason": "error",
        "prompt_hash": "", "model": "model-a", "num_prompt_tokens": None, "num_response_tokens": None,
    }  # fmt: skip
    second = Scripted()
    assert batch(prompts_of(2), second, out).failed == 0
    assert second.asked == ["q1"]
    assert [line["finish_reason"] for line in lines_of(out)] == ["stop", "stop"]


def test_equal_questions_are_asked_once(tmp_path):
    prompts = [Prompt("a", "same"), Prompt("b", "same"), Prompt("c", "other"), Prompt("a", "same")]
    greedy = Scripted()
    summary = batch(prompts, greedy, tmp_path / "greedy.jsonl", share_equal=True)
    assert greedy.asked == ["a", "c"]
    assert (summary.asked, summary.shared) == (2, 1)
    assert [line["id"] for line in lines_of(tmp_path / "greedy.jsonl")] == ["a", "b", "c"]
    sampled = Scripted()
    batch(prompts, sampled, tmp_path / "sampled.jsonl")
    assert sampled.asked == ["a", "b", "c"]


def test_two_questions_with_one_id_are_refused(tmp_path):
    with pytest.raises(RsgrpoError, match="two different questions have the id 'a'"):
        batch([Prompt("a", "one"), Prompt("a", "two")], Scripted(), tmp_path / "out.jsonl")


def test_answers_to_another_prompt_or_model_are_not_mixed(tmp_path):
    out = tmp_path / "out.jsonl"
    batch([Prompt("a", "one")], Scripted(), out)
    with pytest.raises(RsgrpoError, match="answers question 'a' with another prompt"):
        batch([Prompt("a", "two")], Scripted(), out)
    other = Scripted()
    other.name = "model-b"
    with pytest.raises(RsgrpoError, match=r"another model \(model-a, now model-b\)"):
        batch([Prompt("a", "one")], other, out)


def test_a_file_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "out.jsonl").write_text('{"id": "7", "text": "mine"}\n')
    with pytest.raises(RsgrpoError, match=r"line 1 of .* is no answer that this program wrote"):
        read_lines(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"id": "7", "text": "mine"}\n'


def test_finished_answers_are_kept_when_the_endpoint_dies(tmp_path, serve, connect):
    server = serve(lambda number, _: ANSWER if number <= 4 else (503, {"Retry-After": "0"}, "gone"))
    endpoint = connect(server, concurrency=1, max_tries=2)
    with pytest.raises(RsgrpoError, match=r"HTTP 503: gone[\s\S]*are kept"):
        batch(prompts_of(8), endpoint, tmp_path / "out.jsonl")
    finished = [line for line in lines_of(tmp_path / "out.jsonl") if line["finish_reason"] == "stop"]
    assert len(finished) == 4


# Questions and prompts


def test_rows_of_several_layouts_are_questions(tmp_path, page):
    rows = [
        {"qid": 1, "query": "how much?", "image": ["page.png"], "answer": ["16%", "16"], "is_sufficient": True},
        {"id": "2", "question": "who?", "images": "page.png"},
        {
            "prompt": "<image>when?",
            "image": ["page.png"],
            "answer": "<evidence>[1]: 2020</evidence><answer>2020</answer>",
        },
        {"question": "why?", "answer": "insufficient to answer"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third, fourth = read_questions(str(tmp_path / "rows.jsonl"))
    assert first == Question("1", "how much?", (page,), answers=("16%", "16"))
    assert (second.id, second.question, second.images, second.answers) == ("2", "who?", (page,), ())
    assert (third.id, third.question, third.answers, third.evidence) == ("row-3", "when?", ("2020",), ("2020",))
    assert not fourth.is_sufficient


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ([7], "a row must be a JSON object, got list"),
        ({"id": "1"}, "no question: it needs question, query or prompt"),
        ({"query": "q", "image": [7]}, "an image must be a path"),
        ({"query": "q", "image": ["a", "b"], "evidence": ["x"]}, "gold evidence has 1 entries for 2 images"),
        ({"query": "q", "is_sufficient": "maybe"}, "is_sufficient must be true or false"),
        ({"query": "q", "answer": {"a": 1}}, "a gold answer is a text or a list"),
    ],
)
def test_rows_that_are_no_questions_are_listed(tmp_path, row, complaint):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RsgrpoError, match=rf"1 of 1 rows cannot be used:\n  line 1 of rows.jsonl: {complaint}"):
        read_questions(str(tmp_path / "rows.jsonl"))


def test_a_prompt_is_rendered_by_the_one_function():
    prompt = to_prompt(Question("q", "how much?", ("a.png", "b.png")), "{images}\n{question}", "Be brief.")
    assert prompt.text == "[1]: <image>\n[2]: <image>\nhow much?"
    assert (prompt.system, prompt.question) == ("Be brief.", "how much?")
    assert to_prompt(Question("q", "who?", ("a", "b")), "{question}{image_marks}").text == "who?<image><image>"


def test_a_prompt_that_shows_no_pages_is_refused():
    with pytest.raises(RsgrpoError, match="0 <image> marks for 1 images"):
        to_prompt(Question("q", "how much?", ("a.png",)), "{question}")
    with pytest.raises(RsgrpoError, match="no message of its own"):
        to_prompt(Question("q", "how much?"), "")


def test_the_hash_follows_what_is_asked_not_where_the_pages_lie():
    one = Prompt("1", "<image>q", ("here/a.png",))
    assert prompt_hash(one) == prompt_hash(Prompt("2", "<image>q", ("there/a.png",)))
    others = [
        Prompt("1", "<image>q", ("here/b.png",)),
        Prompt("1", "<image>Q", ("here/a.png",)),
        Prompt("1", "<image>q", (b"a.png",)),
    ]
    assert len({prompt_hash(prompt) for prompt in [one, *others]}) == 4


@pytest.mark.parametrize(
    "name", ["evidence", "evidence_example", "direct", "scene_graph", "contrastive", "subquestions"]
)
def test_every_shipped_prompt_asks_for_an_answer(name):
    from rsgrpo.prompts import read_template

    prompt = to_prompt(Question("q", "how {much}?", ("a", "b")), read_template(named_prompt(name)))
    assert "[1]: <image>\n[2]: <image>" in prompt.text
    assert prompt.text.endswith("how {much}?")
    assert ("<answer>" in prompt.text) == (name != "direct")
    assert "insufficient to answer" in prompt.text


def test_a_template_file_can_be_passed_and_an_unknown_name_names_the_nearest(tmp_path):
    (tmp_path / "mine.txt").write_text("{question}")
    assert named_prompt(str(tmp_path / "mine.txt")).file == str(tmp_path / "mine.txt")
    with pytest.raises(RsgrpoError, match="did you mean evidence"):
        named_prompt("evidenc")


# The terminal


def session(out, answerer=None, images=("a.png",)):
    return Session(answerer or Scripted(), "{images}{question}", "", images, out)


def test_an_answer_is_shown_with_its_evidence_and_faults():
    out = io.StringIO()
    session(out, images=("a.png", "b.png")).ask("how much?")
    assert out.getvalue() == ("<obs\nanswer: 16%\nevidence:\n  [1] a.png: 16%\nfault: no evidence slot for page 2\n")


def test_a_conversation_goes_on_after_errors_and_changes_pages(tmp_path, page):
    out = io.StringIO()
    typed = io.StringIO(f"how much?\n\n/images {page} none.png\n/images {page}\nwho?\n/json\n/what\n/quit\nnever\n")
    answerer = Scripted()
    converse(session(out, answerer), typed, out, prompts_user=True)
    assert answerer.asked == ["question-1", "question-2"]
    shown = out.getvalue()
    assert "error: there is no image none.png" in shown
    assert f"[1] {page}: 16%" in shown
    assert '"id": "question-2"' in shown
    assert shown.count("/images A.png") == 2


def test_an_output_with_an_error_keeps_its_text():
    line = result_line(Output(Prompt("q", "t"), "<answer>16", "error", "the answer broke off"), "m")
    assert (line["answer"], line["errors"][0], line["finish_reason"]) == ("16", "the answer broke off", "error")


# The command line


def write_questions(folder: Path, page: str, count: int = 3) -> Path:
    rows = [{"qid": f"q{number}", "query": f"question {number}", "image": [page]} for number in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_a_file_is_answered_from_the_command_line(serve, tmp_path, page, capsys):
    arguments = ["--batch", str(write_questions(tmp_path, page)), "--endpoint", serve().url, "--max-pixels", "300000"]
    assert main(arguments) == 0
    assert [line["answer"] for line in lines_of(tmp_path / "rows.answers.jsonl")] == ["16%"] * 3
    assert "asked" in capsys.readouterr().err
    assert main([*arguments, "--prompt", "direct"]) == 2
    assert "with another prompt" in capsys.readouterr().err


def test_one_question_is_answered_as_json(serve, page, capsys):
    assert main(["how much?", "--image", page, "--endpoint", serve().url, "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["answer"], line["evidence"][0]["image"], line["model"]) == ("16%", page, "served-model")


def test_one_question_streams_to_the_terminal(serve, page, capsys):
    assert main(["how much?", "--image", page, "--endpoint", serve().url]) == 0
    assert capsys.readouterr().out.startswith(f"{ANSWER}\nanswer: 16%\n")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["q", "--image", "none.png"], "there is no image none.png"),
        (["q"], "model.path is empty"),
        (["q", "--model", "none/of/this"], "there is no such file or folder"),
        (["q", "--prompt", "nothing"], "neither a file nor one of"),
        (["q", "--prompt", "raw"], "has no template"),
        (["--batch", "none.jsonl"], "does not exist"),
        (["q", "--batch", "none.jsonl"], "brings its own questions"),
        (["q", "--max-pixels", "5", "--model", "m"], "min_pixels must lie between"),
        (["q", "--endpoint", "http://127.0.0.1:9/v1", "--max-tries", "1"], "did not answer in 1 tries"),
    ],
)
def test_mistakes_are_one_line_each(arguments, complaint, capsys, serve):
    if "--batch" in arguments and "q" not in arguments:
        arguments = [*arguments, "--endpoint", serve().url]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert "Traceback" not in error


def test_ctrl_c_says_that_the_answers_are_kept(monkeypatch, capsys):
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.infer.answer", interrupted)
    assert main(["--batch", "rows.jsonl"]) == 130
    assert capsys.readouterr().err == "stopped; answers so far are kept, the same command goes on\n"


def test_an_engine_answers_in_process(tmp_path, page, tiny_model_path):
    script = tmp_path / "script.jsonl"
    script.write_text(json.dumps({"id": "q0", "responses": [ANSWER]}) + "\n")
    rollout = AnswerRolloutConfig(engine="fake", script=str(script), max_batch_sequences=2)
    answerer = open_answerer(AnswerModelConfig(tiny_model_path), rollout, SMALL, EndpointConfig())
    prompts = [*prompts_of(3, page)[:2], Prompt("q2", "<image>", (page,), {"answers": ["7"], "evidence": ["seven"]})]
    found = {output.prompt.id: output for output in answerer.answer(prompts)}
    assert (found["q0"].text, found["q0"].finish_reason) == (ANSWER, "length" if len(ANSWER) > 10_000 else "stop")
    assert "not in rollout.script" in found["q1"].error
    assert "<answer>7</answer>" in found["q2"].text
    assert [output.text for output in answerer.stream(prompts[0]) if isinstance(output, Output)] == [ANSWER]
    answerer.close()


def test_a_model_that_cannot_start_is_one_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    answerer = open_answerer(AnswerModelConfig(str(tmp_path)), AnswerRolloutConfig(), SMALL, EndpointConfig())
    with pytest.raises(RsgrpoError, match="cannot be started"):
        list(answerer.answer(prompts_of(1)))
    answerer.close()


def test_a_finished_file_starts_no_engine(tmp_path):
    out = tmp_path / "out.jsonl"
    first = Scripted()
    first.name = str(tmp_path)
    batch(prompts_of(2), first, out)
    empty_folder = open_answerer(AnswerModelConfig(str(tmp_path)), AnswerRolloutConfig(), SMALL, EndpointConfig())
    assert batch(prompts_of(2), empty_folder, out).reused == 2


def test_pages_are_resized_as_the_models_folder_was_trained(tmp_path):
    defaults = (InputsConfig().min_pixels, InputsConfig().max_pixels)
    assert pixel_limits("org/hub-model") == defaults
    config = tmp_path / "preprocessor_config.json"
    config.write_text(json.dumps({"size": {"shortest_edge": 784, "longest_edge": 50_176}}))
    assert pixel_limits(str(tmp_path)) == (784, 50_176)
    config.write_text(json.dumps({"size": {"shortest_edge": 3136, "longest_edge": 12_845_056}}))
    assert pixel_limits(str(tmp_path)) == defaults
