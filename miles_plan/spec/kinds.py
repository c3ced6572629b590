"""What a field's annotation allows, in words and as data: error messages, `explain` and layering read it from here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from miles_plan.spec.section import Section
from miles_plan.spec.types import Form, PathMark


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The values of a field.

    forms: each completes `must be ...`. words: the words that stand for themselves (`auto`). section: the mapping it may be,
    of which `many` stand in a list. number: the type of number it takes. known: values of a text field to suggest.
    path: the mark of a field that names a file.
    """

    forms: tuple[str, ...]
    words: tuple[str, ...] = ()
    section: type[Section] | None = None
    many: bool = False
    number: type[int] | type[float] | None = None
    known: tuple[str, ...] = ()
    path: PathMark | None = None

    @property
    def phrase(self) -> str:
        """Completes `must be ...`."""
        return self.forms[0] if len(self.forms) == 1 else f"{', '.join(self.forms[:-1])} or {self.forms[-1]}"


def kind_of(annotation: Any, marks: tuple[Any, ...] = ()) -> Kind:
    """The kind of an annotation; `marks` are the metadata of the `Annotated` around it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(args[0], (*_unpacked(args[1:]), *marks))
    if origin is Literal:
        return Kind(forms=tuple(f"`{word}`" for word in args), words=tuple(str(word) for word in args))
    if origin in (Union, UnionType):
        return _union([kind_of(each) for each in args if each is not NoneType])
    if origin is tuple:
        item = kind_of(args[0])
        return Kind(forms=(f"a list, each item {item.phrase}",), section=item.section, many=item.section is not None)
    if origin is dict:
        return Kind(forms=("a mapping",))
    if annotation is bool:
        return Kind(forms=("true", "false"))
    if annotation in (int, float):
        return Kind(forms=(f"{'a whole number' if annotation is int else 'a number'}{_range(marks)}",), number=annotation)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Kind(forms=(f"a mapping of {_listing(annotation.__pydantic_fields__)}",), section=annotation)
    return _text(marks)


def bounds(marks: Iterable[Any]) -> tuple[tuple[str, float], ...]:
    """The limits of a number as (words, limit): at least, above, at most, below."""
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    found = ((words[name], getattr(mark, name)) for mark in _unpacked(marks) for name in words if hasattr(mark, name))
    return tuple(found)


def number_text(value: float) -> str:
    """A number as people write it: 2,147,483,647, 3,500 and 0.5."""
    return f"{int(value):,}" if (value == value // 1 and abs(value) < 1e15) or isinstance(value, int) else f"{value:g}"


def _text(marks: tuple[Any, ...]) -> Kind:
    form = next((mark for mark in marks if isinstance(mark, Form)), Form("text"))
    path = next((mark for mark in marks if isinstance(mark, PathMark)), None)
    return Kind(forms=(form.words,), known=form.known, path=path)


def _union(parts: list[Kind]) -> Kind:
    return Kind(
        forms=tuple(form for part in parts for form in part.forms),
        words=tuple(word for part in parts for word in part.words),
        section=next((part.section for part in parts if part.section), None),
        many=any(part.many for part in parts),
        number=next((part.number for part in parts if part.number), None),
        known=tuple(value for part in parts for value in part.known),
        path=next((part.path for part in parts if part.path), None),
    )


def _range(marks: tuple[Any, ...]) -> str:
    limits = bounds(marks)
    lower = next((each for each in limits if each[0] in ("at least", "above")), None)
    upper = next((each for each in limits if each[0] in ("at most", "below")), None)
    if lower and upper and lower[1] == upper[1]:
        return f": {number_text(lower[1])}"
    if lower and upper and lower[0] == "at least" and upper[0] == "at most":
        return f" from {number_text(lower[1])} to {number_text(upper[1])}"
    return "".join(f"{' and' if index else ''} {word} {number_text(limit)}" for index, (word, limit) in enumerate(limits))


def _unpacked(marks: Iterable[Any]) -> tuple[Any, ...]:
    """Metadata with the constraints that pydantic's `Field(...)` carries taken out of it."""
    return tuple(part for mark in marks for part in (mark.metadata if isinstance(mark, FieldInfo) else [mark]))


def _listing(names: Iterable[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return ", ".join(quoted[:6]) + (", ..." if len(quoted) > 6 else "")
