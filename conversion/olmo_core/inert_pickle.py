"""Reading a pickle as data: nothing that it names is imported, called or built.

A pickle is a program for a small stack machine. `pickle.Unpickler` with a strict `find_class` is not safe
enough. It still calls what is allowed. It looks up extension codes in a cache of the process without asking.
It hashes nested tuples, which can take for ever, and allocates as much memory as the file says.

The machine here knows the instructions that metadata needs, and no others. A global stays a name. An object
is a name with its state. A call is looked up in a table, which says what it would return.

The instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ...checkpoints import CheckpointError

_MAX_INTEGER_BYTES = 8
# The most containers and objects, for each byte read so far. Pickles of metadata have one in 8 to 22 bytes.
# A container takes 60 bytes of memory.
_MAX_MADE = 1 / 4
_SOME = 1000  # more at any time
_MAX_NAME = 120  # characters of a refused name that an error shows


class UnsafePickleError(CheckpointError):
    """A pickle is damaged, or holds something other than plain metadata. Nothing of it was run.

    Example:

    ```python
    >>> import os, pickle
    >>> from transformers_emo.conversion import UnsafePickleError
    >>> from transformers_emo.conversion.olmo_core.inert_pickle import read_pickle
    >>> try:
    ...     read_pickle(pickle.dumps(os.system), {})
    ... except UnsafePickleError as error:
    ...     print("os.system" in str(error) or "posix.system" in str(error))
    True

    ```
    """


@dataclass(frozen=True, eq=False)
class Global:
    """A name in a pickle, such as `torch.Size`. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object in a pickle: the name of its class, and its state."""

    kind: Global
    state: Any = None


Call = Callable[[tuple], Any]


class _Mark:
    """Marks on the stack where a series of items begins."""


_MARK = _Mark()


def read_pickle(
    data: bytes,
    admitted: Mapping[tuple[str, str], Call | None],
    *,
    persistent: Call | None = None,
    source: str = "the pickle",
) -> Any:
    """Read a pickle of protocol 2 to 5 as data.

    Args:
        data (`bytes`): the pickle.
        admitted (`Mapping`): the pairs (module, name) that the pickle may name. They are compared as they
            stand: a dotted name is another name. The value is a function that takes a tuple of arguments and
            returns what a call gives. It is `None` for a name that may not be called, but may have instances
            (`Record`).
        persistent (`Callable`, *optional*): returns what a persistent id, a tuple, stands for. Without it
            persistent ids are refused.
        source (`str`): the name of the pickle in errors.

    Returns:
        Numbers, strings, tuples, lists, dicts whose keys are strings, numbers or records, `Global`, `Record`
        and what the calls returned.

    Raises:
        UnsafePickleError: if the pickle names or does anything else, or is cut short or damaged.

    Example:

    ```python
    >>> import pickle, torch
    >>> from transformers_emo.conversion.olmo_core.inert_pickle import read_pickle
    >>> read_pickle(pickle.dumps({"size": torch.Size([2, 3])}), {("torch", "Size"): lambda args: args[0]})
    {'size': (2, 3)}

    ```
    """
    machine = _Machine(data, admitted, persistent, source)
    try:
        return machine.run()
    except UnsafePickleError:
        raise
    # A damaged program can do anything to the stack. It is one kind of error for the user.
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise UnsafePickleError(
            f"{source} is damaged at byte {machine.position} ({type(error).__name__}: {error}): copy it "
            "again."
        ) from error


class _Machine:
    def __init__(
        self,
        data: bytes,
        admitted: Mapping[tuple[str, str], Call | None],
        persistent: Call | None,
        source: str,
    ):
        self.data = data
        self.admitted = admitted
        self.persistent = persistent
        self.source = source
        self.position = 0
        self.stack: list[Any] = []
        self.memo: list[Any] = []
        self.made = 0

    def run(self) -> Any:
        instructions, data = _INSTRUCTIONS, self.data
        while True:
            if self.position >= len(data):
                self.refuse("ends in the middle")
            code = data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    self.refuse(f"leaves {len(self.stack)} values, expected one")
                if self.position != len(data):
                    self.refuse("goes on after its end")
                return self.pop()
            instruction = instructions.get(code)
            if instruction is None:
                self.refuse(f"has the instruction {bytes([code])!r}, which metadata does not need")
            if code in _MAKERS:
                self.made += 1
                if self.made > _SOME + _MAX_MADE * self.position:
                    self.refuse(
                        f"makes {self.made} values of so few bytes, more than one in {1 / _MAX_MADE:.0f}"
                    )
            instruction(self)

    def refuse(self, what: str) -> NoReturn:
        raise UnsafePickleError(
            f"{self.source} {what} (before byte {self.position}): it is damaged or made to do harm. Nothing "
            "of it was run; get the checkpoint from its author again."
        )

    def take(self, length: int) -> bytes:
        end = self.position + length
        if length < 0 or end > len(self.data):
            self.refuse(f"is cut short: {length} bytes should follow")
        part = self.data[self.position : end]
        self.position = end
        return part

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return value

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            self.refuse("uses a mark as a value")
        return value

    def pop_items(self) -> list[Any]:
        """Remove everything above the last mark, and the mark, and return the items."""
        position = len(self.stack) - 1
        while self.stack[position] is not _MARK:
            position -= 1
            if position < 0:
                self.refuse("has no mark where one is needed")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def push_tuple(self, length: int) -> None:
        items = [self.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(items)))

    def text(self, length: int) -> None:
        self.stack.append(self.take(length).decode("utf-8"))

    def integer(self) -> None:
        length = self.number("<B")
        if length > _MAX_INTEGER_BYTES:
            self.refuse(f"has an integer of {length} bytes")
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def memoize(self, index: int) -> None:
        if index > len(self.memo):  # pickles number what they remember from 0 on
            self.refuse(f"wants memory for {index} values")
        value = self.stack[-1]
        if value is _MARK:
            self.refuse("uses a mark as a value")
        self.memo[index : index + 1] = [value]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            self.refuse("sets items of something that is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) not in (str, int, Record):  # hashing other keys can take for ever
                self.refuse(f"has a dict key that is a {type(key).__name__}")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            self.refuse("appends to something that is no list")
        self.stack[-1].extend(items)

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or (module, name) not in self.admitted:
            self.refuse(f"names {str(module)[:_MAX_NAME]}.{str(name)[:_MAX_NAME]}, which is refused")
        self.stack.append(Global(module, name))

    def named_global(self) -> None:
        end = self.data.find(b"\n", self.position)
        middle = end if end < 0 else self.data.find(b"\n", end + 1)
        if middle < 0:
            self.refuse("is cut short in a name")
        module, name = self.data[self.position : end].decode(), self.data[end + 1 : middle].decode()
        self.position = middle + 1
        self.push_global(module, name)

    def stacked_global(self) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("has a name that is no string")
        self.push_global(module, name)

    def new_object(self) -> None:
        arguments, kind = self.pop(), self.pop()
        if type(kind) is not Global or arguments != () or self.admitted[kind.module, kind.name] is not None:
            self.refuse(f"makes an object of {kind if type(kind) is Global else 'a value'}, which is refused")
        self.stack.append(Record(kind))

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            self.refuse("calls something that is no admitted name")
        result = self.admitted[function.module, function.name]
        if result is None:
            self.refuse(f"calls {function}, which is refused")
        self.stack.append(result(arguments))

    def build(self) -> None:
        state, record = self.pop(), self.stack[-1]
        if type(record) is not Record or record.state is not None:
            self.refuse("gives a state to something that has none")
        if type(state) not in (dict, tuple):
            self.refuse(f"gives {record.kind} a {type(state).__name__} for a state")
        record.state = state

    def persistent_id(self) -> None:
        key = self.pop()
        if self.persistent is None or type(key) is not tuple:
            self.refuse("has a persistent id")
        self.stack.append(self.persistent(key))


_INSTRUCTIONS: dict[int, Callable[[_Machine], Any]] = {
    0x80: lambda m: 2 <= m.number("<B") <= 5 or m.refuse("is of a protocol other than 2 to 5"),
    0x95: lambda m: m.take(8),  # FRAME: how far to read ahead
    ord("("): lambda m: m.stack.append(_MARK),
    ord("N"): lambda m: m.stack.append(None),
    0x88: lambda m: m.stack.append(True),
    0x89: lambda m: m.stack.append(False),
    ord("J"): lambda m: m.stack.append(m.number("<i")),
    ord("K"): lambda m: m.stack.append(m.number("<B")),
    ord("M"): lambda m: m.stack.append(m.number("<H")),
    0x8A: _Machine.integer,  # LONG1
    ord("G"): lambda m: m.stack.append(m.number(">d")),
    0x8C: lambda m: m.text(m.number("<B")),  # SHORT_BINUNICODE
    ord("X"): lambda m: m.text(m.number("<I")),  # BINUNICODE
    ord(")"): lambda m: m.stack.append(()),
    0x85: lambda m: m.push_tuple(1),
    0x86: lambda m: m.push_tuple(2),
    0x87: lambda m: m.push_tuple(3),
    ord("t"): lambda m: m.stack.append(tuple(m.pop_items())),
    ord("]"): lambda m: m.stack.append([]),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_items()),
    ord("}"): lambda m: m.stack.append({}),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_items()),
    0x94: lambda m: m.memoize(len(m.memo)),  # MEMOIZE
    ord("q"): lambda m: m.memoize(m.number("<B")),
    ord("r"): lambda m: m.memoize(m.number("<I")),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): _Machine.named_global,
    0x93: _Machine.stacked_global,
    0x81: _Machine.new_object,
    ord("R"): _Machine.call,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}
# The instructions that make a container, an object or a name: those that take memory.
_MAKERS = frozenset({ord(code) for code in "]}tcR"} | {0x81, 0x85, 0x86, 0x87, 0x93})
