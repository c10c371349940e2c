"""The token ids of a conversation are those that transformers gives, for a checkpoint as people publish them."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors
from transformers import AutoTokenizer

from server.api.chat_template import load_chat_template
from server.api.conversation import Conversations
from server.api.schemas.conversation import ConversationFields
from server.tokenizer import load_tokenizer
from tests.api.test_chat_template import CHATML, MISTRAL, THINKING
from tests.tokenizers import train_byte_level

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "What is <|im_start|> for?"},
        {"role": "assistant", "content": "It begins a message; </s> ends a text."},
        {"role": "user", "content": "Grüße,\n  世界 🌊 "},
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that puts a BOS before texts, as most do."""
    texts = ["the user and the assistant say what they begin and what it ends"] * 9
    backend = train_byte_level(texts, vocab_size=400, special_tokens=("<s>", "</s>"))
    backend.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = tmp_path_factory.mktemp("checkpoint")
    backend.save(str(made / "tokenizer.json"))
    return made


@pytest.mark.parametrize("source", [CHATML, MISTRAL, THINKING], ids=["chatml", "mistral", "thinking"])
def test_prompts_are_those_of_transformers(source: str, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "chat_template": source,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    conversations = Conversations(tokenizer, load_chat_template(None, folder, tokenizer.special_tokens))
    for messages in CONVERSATIONS:
        for begin in (True, False):
            request = ConversationFields.model_validate({"messages": messages, "add_generation_prompt": begin})
            ids = conversations.token_ids(request, add_special_tokens=False)
            expected = theirs.apply_chat_template(messages, add_generation_prompt=begin, return_dict=False)
            assert ids == expected
            assert ids.count(0) == (source == MISTRAL), "a BOS where the template writes one, and no other"
        # Behind a saved answer: what the whole conversation has behind it.
        answered = [*messages, {"role": "assistant", "content": "They say"}, {"role": "user", "content": " it ends"}]
        whole = theirs.apply_chat_template(answered, tokenize=False, add_generation_prompt=True)
        request = ConversationFields.model_validate({"messages": answered[-1:]})
        expected = theirs.encode(whole.partition("They say")[2], add_special_tokens=False)
        if source != THINKING:  # which writes how many messages there are
            assert conversations.continuation_ids(request, "assistant") == expected
        begun = [*messages, {"role": "assistant", "content": "They say"}]
        request = ConversationFields.model_validate({"messages": begun, "continue_final_message": True})
        expected = theirs.apply_chat_template(begun, continue_final_message=True, return_dict=False)
        assert conversations.token_ids(request, add_special_tokens=False) == expected
