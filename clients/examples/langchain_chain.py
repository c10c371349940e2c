"""LangChain: a chain of a prompt template and the model, called, in a batch, and streamed.

    pip install langchain-openai
    python clients/examples/langchain_chain.py

``OPENAI_BASE_URL`` and ``OPENAI_API_KEY`` name another server and its key. ``ChatOpenAI`` works in the same way where
the model has a chat template.
"""

import os
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_openai import OpenAI

base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
model: Any = OpenAI(
    model=os.environ.get("MODEL", "classics-11m"),
    base_url=base_url,
    api_key=os.environ.get("OPENAI_API_KEY", "none"),
    max_tokens=32,
    temperature=0.7,
    seed=1,
)
template = PromptTemplate.from_template("The {who} looked at the {what} and")
chain = template | model | StrOutputParser()

print("# One")
print(chain.invoke({"who": "old man", "what": "sea"}))

print("\n# A batch, sent at once")
for text in chain.batch([{"who": who, "what": "stars"} for who in ("captain", "child", "king")]):
    print(repr(text))

print("\n# A stream")
for part in chain.stream({"who": "widow", "what": "letter"}):
    print(part, end="", flush=True)
print()

print("\n# Fields that are not OpenAI's own: an answer that is one of three")
choosing = model.bind(extra_body={"structured_outputs": {"choice": [" smiled.", " wept.", " ran away."]}})
print((template | choosing).invoke({"who": "thief", "what": "door"}))
