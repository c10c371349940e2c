"""Saved states with OpenAI's Python package: a text read once, a tree of continuations, a story told in parts.

    pip install openai
    python clients/examples/states.py

What a model of this kind keeps of a text is a state of the same size however long the text is. ``state`` continues
one, ``save_state`` saves one; the routes below ``/v1/states`` list, fork and delete them. ``OPENAI_BASE_URL`` and
``OPENAI_API_KEY`` name another server and its key.
"""

import os
from typing import Any

from openai import OpenAI

BOOK = """Call me Ishmael. Some years ago--never mind how long precisely--having little or no money in my purse, and \
nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the \
world. It is a way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing \
grim about the mouth; whenever it is a damp, drizzly November in my soul; whenever I find myself involuntarily pausing \
before coffin warehouses, and bringing up the rear of every funeral I meet; then, I account it high time to get to sea \
as soon as I can."""

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
)
model = client.models.list().data[0].id


def go_on(state: str, prompt: str = "", **fields: Any) -> tuple[str, Any]:
    """Continue a state; the text, and the state that was saved if ``save_state`` is among the fields."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=24, temperature=0.7, seed=3, extra_body={"state": state, **fields}
    )
    usage = answer.usage
    assert usage and usage.prompt_tokens_details
    read = usage.prompt_tokens - (usage.prompt_tokens_details.cached_tokens or 0)
    print(f"  {prompt}{answer.choices[0].text}".replace("\n", "\n  "))
    print(f"  (context of {usage.prompt_tokens} tokens, {read} of them read now)")
    return answer.choices[0].text, (answer.model_extra or {}).get("state")


print("# A text is read once ...")
book: Any = client.post("/states/prefill", cast_to=object, body={"prompt": BOOK, "name": "book", "ttl": 600})
print(f"  {book['id']}, named {book['name']}: {book['num_tokens']} tokens in {book['bytes']:,} bytes")

print("# ... and asked many times")
for question in (" My name", " I looked at the sea, and", " When I came on shore,"):
    go_on("book", question)

print("# A tree: two continuations of the same state, then one of the first")
_, north = go_on("book", " We sailed north, and", save_state=True)
_, south = go_on("book", " We sailed south, and", save_state=True)
go_on(north["id"])

print("# A fork lives on when the state it was made from is deleted")
copy: Any = client.post(f"/states/{north['id']}/fork", cast_to=object, body={"name": "north"})
client.delete(f"/states/{north['id']}", cast_to=object)
assert go_on(copy["id"])[0] == go_on("north")[0]

print("# A story in parts: each part takes the name over, so the name is where the story stands")
client.post("/states/prefill", cast_to=object, body={"prompt": "Once upon a time", "name": "story"})
for _part in range(3):
    go_on("story", save_state="story", state_ttl=600)

print("# What is saved")
saved: Any = client.get("/states", cast_to=object)
for one in saved["data"]:
    print(f"  {one['id']}  {one['name'] or '-':8}{one['num_tokens']:>6} tokens")
for name in ("book", "north", "story", south["id"]):
    client.delete(f"/states/{name}", cast_to=object)
