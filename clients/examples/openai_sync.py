"""OpenAI's Python package: a completion, a stream, several choices, log-probabilities, a structure, an error.

    pip install openai
    python clients/examples/openai_sync.py

``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` name another server and its key.
"""

import math
import os
import time

import openai

client = openai.OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),  # the package wants one, a server without keys does not
)
model = client.models.list().data[0].id
prompt = "The old man looked at the sea and"
print(f"# {model}: a completion")
answer = client.completions.create(model=model, prompt=prompt, max_tokens=32, temperature=0)
print(prompt + answer.choices[0].text)
print(answer.usage)

print("\n# A stream")
sent, first = time.perf_counter(), None
for chunk in client.completions.create(model=model, prompt=prompt, max_tokens=48, temperature=0.8, seed=2, stream=True):
    first = first or time.perf_counter()
    print(chunk.choices[0].text, end="", flush=True)
assert first
print(f"\n(first token after {(first - sent) * 1e3:.0f} ms, last after {(time.perf_counter() - sent) * 1e3:.0f} ms)")

print("\n# Three choices: the prompt is read once")
answer = client.completions.create(model=model, prompt=prompt, n=3, max_tokens=16, temperature=1, seed=1)
for choice in answer.choices:
    print(f"{choice.index}: {choice.text!r}")

print("\n# How likely each token was, and what else was")
answer = client.completions.create(model=model, prompt=prompt, max_tokens=5, temperature=0, logprobs=3)
logprobs = answer.choices[0].logprobs
assert logprobs and logprobs.tokens and logprobs.top_logprobs
for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True):
    others = ", ".join(f"{other!r} {math.exp(logprob):.0%}" for other, logprob in top.items())
    print(f"{token!r:10} of {others}")

print("\n# An answer that follows a JSON schema: fields that are not OpenAI's own go into extra_body")
schema = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z][a-z]{2,9}$"}, "age": {"enum": list(range(18, 99))}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
answer = client.completions.create(
    model=model,
    prompt="The captain's name and age were ",
    max_tokens=40,
    temperature=0,
    extra_body={"structured_outputs": {"json": schema, "disable_any_whitespace": True}},
)
print(answer.choices[0].text)

print("\n# What cannot be is refused, by the name of the field")
try:
    client.completions.create(model=model, prompt=prompt, temperature=-1)
except openai.BadRequestError as error:
    print(f"{error.status_code}, {error.param}: {error.message}")
