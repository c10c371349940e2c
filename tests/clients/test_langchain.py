"""langchain-openai: text and chat models, sync and async, whole and streamed, with the token counts that it reports."""

import asyncio

import pytest
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.conftest import KEY, MODEL

MESSAGES = [SystemMessage("You are old."), HumanMessage("Who are you?")]
PROMPT = "The old man looked at the sea and"


@pytest.fixture
def text_model(v1: str) -> OpenAI:
    return OpenAI(model=MODEL, base_url=v1, api_key=KEY, max_tokens=12, temperature=0, max_retries=0)


@pytest.fixture
def chat_model(v1: str) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=v1, api_key=KEY, max_tokens=12, temperature=0, max_retries=0, seed=1)


def test_text(text_model: OpenAI) -> None:
    whole = text_model.invoke(PROMPT)
    assert whole
    assert "".join(text_model.stream(PROMPT)) == whole
    assert text_model.batch([PROMPT, PROMPT]) == [whole, whole]
    result = text_model.generate([PROMPT], stop=[" "])
    assert result.generations[0][0].generation_info["finish_reason"] == "stop"
    assert result.llm_output["token_usage"]["completion_tokens"] > 0


def test_text_asynchronously(text_model: OpenAI) -> None:
    async def main() -> tuple[str, str]:
        whole = await text_model.ainvoke(PROMPT)
        return whole, "".join([part async for part in text_model.astream(PROMPT)])

    whole, streamed = asyncio.run(main())
    assert whole == streamed != ""


def test_chat(chat_model: ChatOpenAI) -> None:
    whole = chat_model.invoke(MESSAGES)
    assert whole.content
    assert whole.response_metadata["finish_reason"] in ("stop", "length")
    assert whole.response_metadata["model_name"] == MODEL
    assert whole.usage_metadata["total_tokens"] == (
        whole.usage_metadata["input_tokens"] + whole.usage_metadata["output_tokens"]
    )
    assert whole.usage_metadata["input_token_details"]["cache_read"] >= 0


def test_chat_streamed(chat_model: ChatOpenAI) -> None:
    whole = chat_model.invoke(MESSAGES)
    parts = list(chat_model.stream(MESSAGES, stream_usage=True))
    joined = parts[0]
    for part in parts[1:]:
        joined += part
    assert joined.content == whole.content
    assert joined.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]
    assert joined.usage_metadata["input_tokens"] == whole.usage_metadata["input_tokens"]


def test_chat_asynchronously(chat_model: ChatOpenAI) -> None:
    async def main() -> tuple[str, str]:
        whole = await chat_model.ainvoke(MESSAGES)
        return whole.text, "".join([part.text async for part in chat_model.astream(MESSAGES)])

    whole, streamed = asyncio.run(main())
    assert whole == streamed != ""


def test_chain_with_token_counts(chat_model: ChatOpenAI) -> None:
    counts = UsageMetadataCallbackHandler()
    chain = ChatPromptTemplate.from_messages([("system", "You are {age}."), ("user", "{question}")])
    answer = (chain | chat_model | StrOutputParser()).invoke(
        {"age": "old", "question": "Who are you?"}, config={"callbacks": [counts]}
    )
    assert answer
    assert counts.usage_metadata[MODEL]["output_tokens"] > 0


def test_log_probabilities(chat_model: ChatOpenAI) -> None:
    answer = chat_model.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_structured_output(chat_model: ChatOpenAI) -> None:
    schema = {
        "title": "Age",
        "description": "How old somebody is.",
        "type": "object",
        "properties": {"years": {"type": "integer", "minimum": 0, "maximum": 120}, "alive": {"type": "boolean"}},
        "required": ["years", "alive"],
        "additionalProperties": False,
        # JSON may have any number of spaces between its parts, and a model that never saw JSON likes spaces.
        "x-guidance": {"whitespace_flexible": False},
    }
    model = chat_model.model_copy(update={"max_tokens": 100})
    answer = model.with_structured_output(schema, method="json_schema").invoke(MESSAGES)
    assert set(answer) == {"years", "alive"}
    assert 0 <= answer["years"] <= 120
