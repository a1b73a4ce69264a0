"""The names of what a backend can do beyond answering a plain prompt.

A request that needs a feature goes only to models that declare it; the others are rejected with the reason.
"""

from __future__ import annotations

FEATURES: dict[str, str] = {
    "raw": "answers a raw prompt, as it is",
    "chat": "answers messages",
    "continue": "goes on with a conversation that ends with an assistant's message",
    "seed": "the same seed gives the same text",
    "token_ids": "tells the ids of the tokens behind the text",
    "tokenize": "turns text into the model's tokens and back",
    "renders_chat": "puts messages into the model's form itself",
    "parses": "splits reasoning and tool calls from the text itself",
    "literal": "keeps control tokens in users' text from being read as such",
    "template_options": "passes options on to the model's template",
    "think": "can be told whether and how much to think",
    "reasoning_budget": "bounds the thought",
    "json_schema": "answers in the form of a JSON schema",
    "regex": "answers in the form of a regular expression",
    "grammar": "answers in the form of a grammar",
    "choices": "answers with one of several texts",
    "tools": "can call functions",
    "resume": "goes on with an answer that another backend began",
    "resume_constraint": "goes on inside an answer that has a constraint",
    "logprobs": "tells log-probabilities",
    "logit_bias": "adds a bias to chosen tokens",
    "show": "shows the text of control tokens",
    "images": "reads pictures",
    "embeddings": "turns texts into vectors",
    "rerank": "scores texts by a query",
}
"""Each feature's name, and what it means."""
