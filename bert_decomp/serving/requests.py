"""The bodies of requests, checked by pydantic, and the bodies of answers.

Shapes are those of OpenAI's embeddings, and of the classify and rerank endpoints of vLLM and Jina.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..prediction.answers import Answers

# Texts of one request.
MOST_TEXTS = 2048
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_TEXTS)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    user: str | None = None
    truncate: bool = False


class EmbeddingsRequest(_Request):
    """``POST /v1/embeddings``."""

    input: str | Texts
    encoding_format: Literal["float", "base64"] = "float"

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class ClassifyRequest(_Request):
    """``POST /classify``."""

    input: str | Texts

    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class RerankRequest(_Request):
    """``POST /rerank``."""

    query: str
    documents: Texts
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


class AnswerRequest(_Request):
    """``POST /answer``: a question to be answered from each of the contexts."""

    question: str
    context: str | Texts

    def contexts(self) -> list[str]:
        return [self.context] if isinstance(self.context, str) else self.context


def usage(tokens: int) -> dict[str, int]:
    """Tokens of a request as OpenAI counts them."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}


def embeddings_answer(
    request: EmbeddingsRequest, name: str, vectors: np.ndarray, tokens: int
) -> dict[str, Any]:
    """Vectors (texts, width); in base64 the bytes of little-endian float32."""

    def written(vector: np.ndarray) -> Any:
        if request.encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()

    data = [
        {"object": "embedding", "index": index, "embedding": written(vector)}
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "data": data, "model": name, "usage": usage(tokens)}


def classify_answer(
    name: str, answers: Answers, outputs: np.ndarray, tokens: int
) -> dict[str, Any]:
    """What the model says of each text; ``probs`` of a regression is its score."""
    probabilities = answers.probabilities(outputs)
    columns = {
        column: values.to_pylist()
        for column, values in answers.columns(outputs).items()
        if column in ("label", "labels")
    }
    data = [
        {
            "index": index,
            **{column: values[index] for column, values in columns.items()},
            "probs": row.tolist(),
            "num_classes": answers.width,
        }
        for index, row in enumerate(probabilities)
    ]
    return {"object": "list", "data": data, "model": name, "usage": usage(tokens)}


def found_answer(name: str, rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Entities of texts, or answers to questions, as ``Kind.found`` gives them."""
    data = [{"index": index, **row} for index, row in enumerate(rows)]
    return {"object": "list", "data": data, "model": name, "usage": usage(tokens)}


def rerank_answer(
    request: RerankRequest, name: str, scores: np.ndarray, tokens: int
) -> dict[str, Any]:
    """Documents from the best to the worst, ``scores`` (documents,)."""
    order = np.argsort(-scores, kind="stable")[: request.top_n]
    results = [
        {
            "index": int(index),
            "relevance_score": float(scores[index]),
            **(
                {"document": {"text": request.documents[index]}} if request.return_documents else {}
            ),
        }
        for index in order
    ]
    return {"results": results, "model": name, "usage": usage(tokens)}
