"""What all request bodies have in common, and fields that exist only to be refused or ignored."""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Body(BaseModel):
    """A JSON object of a request: strict types, no unknown fields, null as good as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Unsupported:
    """Marks a field of another server's API that this one does not serve: ``Annotated[object, Unsupported(...)]``.

    Args:
        neutral: the values, beside null, that ask for nothing and are therefore accepted.
        hint: ends the refusal's sentence, such as ``; use 'seed'``.
    """

    def __init__(self, *neutral: object, hint: str = "") -> None:
        self.neutral = neutral
        self.hint = hint

    def check(self, value: object) -> None:
        """Raise a validation error of type ``unsupported`` unless the value asks for nothing."""
        if value is not None and not any(_same(value, harmless) for harmless in self.neutral):
            raise PydanticCustomError("unsupported", "is not supported by this server{hint}", {"hint": self.hint})

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {
            "enum": [None, *self.neutral],
            "description": f"Not supported{self.hint}. Only values that ask for nothing are accepted.",
        }


Ignored: TypeAlias = Annotated[Any, Field(description="Accepted with any value, and ignored.", examples=["anything"])]
"""A field that says nothing about the answer."""

ModelName: TypeAlias = Annotated[
    str | None,
    Field(description="One of the served model's names; not given: the first.", examples=["classics-11m"]),
]


def _same(value: object, neutral: object) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
