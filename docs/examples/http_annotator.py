"""An annotator behind HTTP: --config.annotator.init=python:http_annotator.score

The server is sent {"prompt": "...", "responses": ["...", "..."]} and answers with a score for each, or null.
"""

import json
import os
import urllib.request


def score(prompts: list[str], responses: list[list[str]]) -> list[list[float | None]]:
    return [ask(prompt, texts) for prompt, texts in zip(prompts, responses, strict=True)]


def ask(prompt: str, texts: list[str]) -> list[float | None]:
    body = json.dumps({"prompt": prompt, "responses": texts}).encode()
    request = urllib.request.Request(os.environ["ANNOTATOR_URL"], body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:  # an error stops the run: it is no label
        return json.load(answer)
