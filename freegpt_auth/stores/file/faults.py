"""The reason why bytes are no token file, in one sentence for an operator. Pure.

msgspec gives the place of an error only in its message, and rewords messages between releases. This module finds the
place itself: of a syntax error by the standard library's parser, whose errors carry a position, and of a wrong field by
converting one field at a time.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import inspect

if TYPE_CHECKING:
    from collections.abc import Generator

_KINDS = {
    inspect.BoolType: "true or false",
    inspect.DateTimeType: "a time with its offset, such as 2025-06-01T12:00:00Z",
    inspect.NoneType: "null",
    inspect.StrType: "a string",
    inspect.VarTupleType: "a list of strings",
}


class _Rows(msgspec.Struct):
    tokens: list[msgspec.Raw]


_decode = msgspec.json.Decoder().decode
_decode_rows = msgspec.json.Decoder(_Rows).decode


@contextlib.contextmanager
def explained(content: bytes) -> Generator[None]:
    """Turn each error of a block that decodes *content* into one kind, with the cause and the place.

    Raises:
        ValueError: *content* is not JSON; the message gives the cause and the place.
    """
    try:
        try:
            yield
        except (UnicodeDecodeError, msgspec.MsgspecError):  # MsgspecError is a ValueError only since msgspec 0.21
            raise ValueError(_syntax_fault(content)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def shape_fault(content: bytes, kind: type[msgspec.Struct]) -> str:
    """Return the reason why the tokens of a JSON object cannot be decoded as a list of *kind*."""
    try:
        rows = _decode_rows(content).tokens
    except msgspec.MsgspecError:
        return "$.tokens must be a list"
    decode = msgspec.json.Decoder(kind).decode
    for number, row in enumerate(rows):
        try:
            decode(row)
        except msgspec.MsgspecError:
            place, record = f"$.tokens[{number}]", _decode(row)
            if not isinstance(record, dict):
                return f"{place} must be an object"
            return record_fault(record, kind, f"{place}.") or f"a field of {place} stands there twice"
    return "a field of $ stands there twice"


def record_fault(record: dict[str, Any], kind: type[msgspec.Struct], place: str) -> str | None:
    """Return the fault of the first field that cannot be converted for *kind*; *place* precedes the field's name."""
    for field in msgspec.structs.fields(kind):
        if field.name in record:
            try:
                msgspec.convert(record[field.name], field.type)
            except msgspec.ValidationError:
                return f"{place}{field.name} must be {_described(inspect.type_info(field.type))}"
        elif field.required:
            return f"{place}{field.name} is missing"
    return None


def _described(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.UnionType):
        return " or ".join(map(_described, kind.types))
    if isinstance(kind, inspect.StrType) and kind.max_length is not None:
        return f"a string of {kind.min_length} to {kind.max_length} characters"
    return _KINDS[type(kind)]


def _syntax_fault(content: bytes) -> str:
    if not content.strip():
        return "it is empty; a new token file is made by create, not by touch"
    constants: list[str] = []
    try:
        text = content.decode()
        json.loads(text, parse_int=str, parse_constant=constants.append)  # an int has at most 4,300 digits
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"it is not UTF-8: line {line} holds the byte 0x{content[error.start]:02x}"
    except json.JSONDecodeError as error:
        text = text.rstrip()
        if text.lstrip().startswith("{") and (error.pos >= len(text) or not text.endswith("}")):
            line = text.count("\n") + 1
            return f"it is cut off in line {line}: its closing brace is missing"
        return f"it is not JSON: line {error.lineno}, column {error.colno} cannot be read"
    if constants:
        return f"it holds {constants[0]}, which is no number of JSON"
    return "it holds a number out of range, or half of a surrogate pair"
