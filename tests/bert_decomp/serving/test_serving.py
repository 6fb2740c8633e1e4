"""The server on 127.0.0.1: right answers to requests that come together, clear errors, nothing lost, a clean stop."""

import base64
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

import numpy as np
import pytest
from kinds.test_question_answering import reader
from kinds.test_token_classification import tagger
from optional import needs
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_models import ANIMALS, COLOURS, tiny_model, tiny_tokenizer

from bert_decomp.models.saving import save
from bert_decomp.prediction.predictor import Predictor

pytestmark = needs("serve")
TEXTS = [
    " ".join(["the", COLOURS[i % 4], ANIMALS[i % 5], *["sees", "a", "dog"] * (i % 9)])
    for i in range(40)
]


@contextmanager
def served(predictor):
    """A server in a thread of this process, and its port."""
    from bert_decomp.serving.server import server

    running = server(predictor, "tiny", "127.0.0.1", 0)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        end = time.monotonic() + 20
        while not running.started:
            assert time.monotonic() < end and thread.is_alive()
            time.sleep(0.005)
        yield running, running.servers[0].sockets[0].getsockname()[1]
    finally:
        running.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def ask(port, path, body=None, raw=None):
    """Status and answer; a GET without a body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    content = raw if raw is not None else None if body is None else json.dumps(body)
    connection.request("GET" if content is None else "POST", path, content)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if text.startswith(("{", "[")) else text


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, found = tmp_path_factory.mktemp("served"), {}
    for name, labels in (("class", 3), ("score", 1)):
        save(tiny_model("bert", num_labels=labels), tiny_tokenizer(), root / name)
        found[name] = str(root / name)
    save(tiny_model("bert").base_model, tiny_tokenizer(), root / "bare")
    parts = [Transformer(str(root / "bare")), Pooling(36), Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(root / "vector"))
    return {**found, "vector": str(root / "vector")}


@pytest.fixture(scope="module")
def predictors(folders):
    return {name: Predictor(folder, batch_tokens=200) for name, folder in folders.items()}


def close(found, wanted):
    assert np.abs(np.array(found) - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_requests_that_come_together_get_their_own_answers(predictors, folders):
    wanted = SentenceTransformer(folders["vector"], device="cpu").encode(TEXTS)

    def one(index):
        form = "base64" if index % 2 else "float"
        texts = TEXTS[index] if index % 3 else [TEXTS[index], TEXTS[0]]
        body = {"input": texts, "encoding_format": form, "model": "tiny"}
        status, answer = ask(port, "/v1/embeddings", body)
        assert status == 200 and len(answer["data"]) == (1 if index % 3 else 2), answer
        vector = answer["data"][0]["embedding"]
        if form == "base64":
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        return np.array(vector)

    with served(predictors["vector"]) as (_, port), ThreadPoolExecutor(20) as clients:
        close(list(clients.map(one, range(len(TEXTS)))), wanted)
        _, answer = ask(port, "/v1/embeddings", {"input": TEXTS[:3]})
        tokens = sum(len(ids) for ids in tiny_tokenizer()(TEXTS[:3])["input_ids"])
        assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        metrics = ask(port, "/metrics")[1]
        assert ask(port, "/health")[1] == {"status": "ok"}
        assert ask(port, "/v1/models")[1]["data"][0]["id"] == "tiny"

    def value(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", metrics, re.MULTILINE)[1])

    assert value('lowrank_bert_requests_total{path="/v1/embeddings",status="200"}') == 41
    assert value("lowrank_bert_texts_total") == 40 + 14 + 3
    assert value("lowrank_bert_batch_seconds_count") < 40
    assert value("lowrank_bert_waiting_tokens") == 0


def test_classes_and_ranks(predictors):
    with served(predictors["class"]) as (_, port):
        status, answer = ask(port, "/classify", {"input": TEXTS[:5]})
        assert ask(port, "/rerank", {"query": "a", "documents": ["b"]})[0] == 400
    outputs = predictors["class"](TEXTS[:5])
    close(
        [one["probs"] for one in answer["data"]], predictors["class"].answers.probabilities(outputs)
    )
    assert status == 200
    assert [one["label"] for one in answer["data"]] == [f"LABEL_{i}" for i in outputs.argmax(-1)]

    body = {"query": TEXTS[0], "documents": TEXTS[1:7], "return_documents": True}
    pairs = 1 / (1 + np.exp(-predictors["score"]([TEXTS[0]] * 6, TEXTS[1:7])[:, 0]))
    vectors = predictors["vector"](TEXTS[:7])
    for name, wanted in (("score", pairs), ("vector", vectors[1:] @ vectors[0])):
        with served(predictors[name]) as (_, port):
            results = ask(port, "/rerank", body)[1]["results"]
            assert ask(port, "/rerank", {**body, "top_n": 2})[1]["results"] == results[:2]
        close([one["relevance_score"] for one in results], np.sort(wanted)[::-1])
        close(wanted[[one["index"] for one in results]], np.sort(wanted)[::-1])
        assert all(one["document"]["text"] == TEXTS[1 + one["index"]] for one in results)


def test_entities_and_answers(tmp_path):
    """Those of ``predict``, also of texts of several windows."""
    texts, question = [*TEXTS[:5], " ".join(TEXTS)], "is the cat ?"
    for name, model in (("tagger", tagger()), ("reader", reader())):
        save(model, tiny_tokenizer(), tmp_path / name)
        predictor = Predictor(str(tmp_path / name), batch_tokens=100)
        given = [texts] if name == "tagger" else [[question] * 6, texts]
        columns = predictor.columns(*given)
        wanted = [{key: values[row].as_py() for key, values in columns.items()} for row in range(6)]
        with served(predictor) as (_, port):
            body = {"input": texts}
            if name == "reader":
                body = {"question": question, "context": texts}
                one = ask(port, "/answer", {**body, "context": texts[0]})[1]["data"]
            status, answer = ask(port, "/classify" if name == "tagger" else "/answer", body)
            other = (
                ask(port, "/answer", body)
                if name == "tagger"
                else ask(port, "/classify", {"input": "a"})
            )
        assert other[0] in (400, 422) and status == 200
        for row, found in zip(wanted, answer["data"], strict=True):
            scores = [
                entity.pop("score")
                for entity in (row, *row.get("entities", ()))
                if "score" in entity
            ]
            again = [
                entity.pop("score")
                for entity in (found, *found.get("entities", ()))
                if "score" in entity
            ]
            close(again, np.array(scores))
            assert {key: found[key] for key in row} == row
    assert len(one) == 1 and one[0]["answer"] == answer["data"][0]["answer"]


def test_bad_requests_get_a_clear_error_and_the_next_one_is_served(predictors, monkeypatch):
    from bert_decomp.serving import app

    monkeypatch.setattr(app, "BODY_BYTES", 2000)
    cases = [
        ("/v1/embeddings", b"{", 422, "JSON"),
        ("/v1/embeddings", b"\xff\xfe", 4, ""),
        ("/v1/embeddings", b"[1]", 422, ""),
        ("/v1/embeddings", b"{}", 422, "input: Field required"),
        ("/v1/embeddings", b'{"input": 3}', 422, "input"),
        ("/v1/embeddings", b'{"input": []}', 422, "input"),
        ("/v1/embeddings", b'{"input": ["a", null]}', 422, "input"),
        ("/v1/embeddings", b'{"input": "a", "dimensions": 3}', 422, "dimensions"),
        ("/v1/embeddings", json.dumps({"input": ["a", "cat " * 99]}).encode(), 413, "text 1 has"),
        ("/v1/embeddings", b" " * 3000, 413, "2000 bytes"),
        ("/classify", b'{"input": "a"}', 400, "tiny gives no classes"),
        ("/rerank", b'{"query": "a", "documents": ["a"], "top_n": 0}', 422, "top_n"),
        ("/nothing", b"{}", 404, "Not Found"),
        ("/health", b"{}", 405, "Method"),
    ]
    with served(predictors["vector"]) as (_, port):
        for path, body, status, words in cases:
            found, answer = ask(port, path, raw=body)
            assert str(found).startswith(str(status)), (path, body, answer)
            assert words in answer["error"]["message"]
        status, answer = ask(port, "/v1/embeddings", {"input": "cat " * 99, "truncate": True})
        assert status == 200 and answer["usage"]["total_tokens"] == 40


def test_slow_and_silent_clients_are_closed_and_others_served(predictors, monkeypatch):
    from bert_decomp.serving import app, server

    monkeypatch.setattr(app, "BODY_SECONDS", 0.5)
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    head = b"POST /classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with served(predictors["class"]) as (_, port):
        slow = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(60)]
        for index, client in enumerate(slow):
            client.sendall([b"", head, head + b'content-length: 50\r\n\r\n{"in'][index % 3])
        assert ask(port, "/classify", {"input": "a"})[0] == 200
        for index, client in enumerate(slow):
            answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 408") if index % 3 == 2 else answer == b""
            client.close()
        assert ask(port, "/classify", {"input": "a"})[0] == 200


def test_too_much_at_once_is_refused_and_who_leaves_is_forgotten(predictors, monkeypatch):
    from bert_decomp.serving import app

    monkeypatch.setattr(app, "QUEUE_TOKENS", 30)
    predictor, free = predictors["class"], threading.Event()
    real = predictor.outputs

    def held(encoded, rows):
        free.wait(20)
        return real(encoded, rows)

    monkeypatch.setattr(predictor, "outputs", held)
    with served(predictor) as (_, port), ThreadPoolExecutor(2) as clients:
        first = clients.submit(ask, port, "/classify", {"input": ["the cat"] * 6})
        end = time.monotonic() + 20
        while "waiting_tokens 24" not in ask(port, "/metrics")[1]:
            assert time.monotonic() < end
        status, answer = ask(port, "/classify", {"input": ["the cat"] * 2})
        assert status == 503 and "waiting" in answer["error"]["message"]
        free.set()
        assert first.result()[0] == 200
        assert ask(port, "/classify", {"input": ["the cat"] * 2})[0] == 200


def test_a_stop_lets_open_requests_finish(predictors, monkeypatch):
    predictor, begun = predictors["class"], threading.Event()
    real = predictor.outputs

    def slow(encoded, rows):
        begun.set()
        time.sleep(0.5)
        return real(encoded, rows)

    monkeypatch.setattr(predictor, "outputs", slow)
    with ThreadPoolExecutor(1) as clients, served(predictor) as (running, port):
        open_one = clients.submit(ask, port, "/classify", {"input": "a"})
        assert begun.wait(20)
        running.should_exit = True
        assert open_one.result()[0] == 200
    with pytest.raises(OSError):
        ask(port, "/health")
