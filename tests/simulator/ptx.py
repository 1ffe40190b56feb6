"""PTX text to a `Program`: instructions with resolved names. Knows the grammar, not what an instruction does."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

from .errors import Unsupported
from .floats import ptx_type

_IDENTIFIER = re.compile(r"[%$A-Za-z_][\w$]*")
_DIMENSIONS = re.compile(r"\.(reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")


@dataclass(frozen=True)
class Instruction:
    text: str
    opcode: str  # "ld.global.v4.b32"
    operands: tuple[str, ...]
    guard: str | None = None  # the predicate of @p or @!p
    negated: bool = False

    @cached_property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in re.split(r"\.|::", self.opcode) if part)

    @property
    def name(self) -> str:
        return self.parts[0]

    def type(self, index: int = -1):
        found = ptx_type(self.parts[index])
        if found is None:
            raise Unsupported(f"type .{self.parts[index]}")
        return found

    def allow(self, *modifiers: str) -> None:
        """Raises for a modifier that the caller does not know of: it may change what the instruction does."""
        known = set(" ".join(modifiers).split())
        unknown = [part for part in self.parts[1:] if part not in known and ptx_type(part) is None and part != "pred"]
        if unknown:
            raise Unsupported(f"modifier .{unknown[0]}")


@dataclass
class Program:
    name: str
    params: list[tuple[str, str, int]]  # name, type, bytes
    block: tuple[int, int, int] | None  # threads, where the PTX says
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # name, or prefix of a numbered family -> type
    shared: dict[str, int] = field(default_factory=dict)  # name -> address
    shared_bytes: int = 0  # of the static declarations; dynamic shared memory follows
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0

    def register_type(self, name: str) -> str | None:
        found = self.registers.get(name)
        return found if found else self.registers.get(name.rstrip("0123456789") + "<>")


class _Scope:
    """A pair of braces: inline assembly declares registers and labels of its own in them."""

    def __init__(self, parent: _Scope | None, number: int):
        self.parent, self.number = parent, number
        self.names: set[str] = set()

    def resolve(self, name: str) -> str:
        scope: _Scope | None = self
        while scope is not None and scope.parent is not None:
            if name in scope.names:
                return f"{name}@{scope.number}"
            scope = scope.parent
        return name


def parse(ptx: str, entry: str | None = None) -> Program:
    """The kernel called `entry`, or the only one."""
    ptx = re.sub(r"/\*.*?\*/|//[^\n]*", "", ptx, flags=re.S)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(", ptx))
    chosen = [e for e in entries if entry in (None, e[1])]
    if len(chosen) != 1:
        raise ValueError(f"entry {entry!r} of the PTX, which has {[e[1] for e in entries]}")
    head_end = ptx.index(")", chosen[0].end())
    open_brace = ptx.index("{", head_end)
    program = Program(
        chosen[0][1],
        [_param(text) for text in ptx[chosen[0].end() : head_end].split(",") if text.strip()],
        _block(ptx[head_end:open_brace]),
    )
    for declaration in re.findall(r"^\s*(?:\.\w+\s+)*?\.shared\s[^;{}]*;", ptx[: entries[0].start()], re.M):
        _declare(program, declaration.strip(" ;\n"), None)
    _body(program, ptx[open_brace + 1 : _matching_brace(ptx, open_brace)])
    return program


def _param(text: str) -> tuple[str, str, int]:
    found = re.search(r"\.(\w+)\s+(?:\.ptr\b.*?\s)?([\w$]+)(?:\[(\d+)\])?\s*$", text.strip(), re.S)
    assert found, text
    kind = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", text)
    assert kind, text
    return found[2], kind[1], ptx_type(kind[1]).bytes * int(found[3] or 1)


def _block(head: str) -> tuple[int, int, int] | None:
    found = {m[1]: tuple(int(x or 1) for x in m.groups()[1:]) for m in _DIMENSIONS.finditer(head)}
    return found.get("reqntid") or found.get("maxntid")


def _matching_brace(text: str, start: int) -> int:
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("unbalanced braces in the PTX")


def _body(program: Program, body: str) -> None:
    scopes = [_Scope(None, 0)]
    stack = [scopes[0]]
    statements: list[tuple[str, _Scope]] = []
    body = re.sub(r"^\s*\.(loc|file|section)\b[^\n]*", "", body, flags=re.M)
    for piece in body.split(";"):
        text = " ".join(piece.split())
        while True:
            if text.startswith(("{", "}")):
                if text[0] == "{":
                    scopes.append(_Scope(stack[-1], len(scopes)))
                    stack.append(scopes[-1])
                else:
                    stack.pop()
                text = text[1:].lstrip()
            elif label := re.match(r"([\w$]+)\s*:(?!:)\s*", text):
                stack[-1].names.add(label[1])
                statements.append((label[1] + ":", stack[-1]))
                text = text[label.end() :]
            else:
                break
        if text.startswith("."):
            _declare(program, text, stack[-1])
        elif text:
            statements.append((text, stack[-1]))
    for text, scope in statements:
        if text.endswith(":"):
            program.labels[scope.resolve(text[:-1])] = len(program.instructions)
        else:
            program.instructions.append(_instruction(text, scope))


def _declare(program: Program, text: str, scope: _Scope | None) -> None:
    if register := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
        for name in register[2].replace(" ", "").split(","):
            family = re.fullmatch(r"(.*)<\d+>", name)
            if scope is not None and scope.parent is not None:
                if family:
                    raise Unsupported(f"a family of registers inside braces: {text}")
                scope.names.add(name)
                name = scope.resolve(name)
            program.registers[f"{family[1]}<>" if family else name] = register[1]
    elif array := re.search(r"\.(shared|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?", text):
        names, size = (program.shared, "shared_bytes") if array[1] == "shared" else (program.local, "local_bytes")
        align, width = int(array[2] or 1), ptx_type(array[3]).bytes
        address = -(-getattr(program, size) // align) * align
        names[array[4]] = address
        if array[5] != "":  # an extern array takes what is left
            setattr(program, size, address + width * int(array[5] or 1))
    elif not text.startswith((".pragma", ".maxn", ".minn", ".branchtargets", ".param")):
        raise Unsupported(f"declaration {text[:80]}")


def _instruction(text: str, scope: _Scope) -> Instruction:
    found = re.match(r"(?:@(!?)\s*([%$\w]+)\s+)?([\w.:]+)\s*(.*)", text)
    assert found, text
    negated, guard, opcode, rest = found.groups()
    operands, depth, current = [], 0, ""
    for character in rest:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        operands.append(current.strip())
    rename = (lambda s: s) if scope.parent is None else (lambda s: _IDENTIFIER.sub(lambda m: scope.resolve(m[0]), s))
    return Instruction(
        text, opcode, tuple(rename(o) for o in operands), rename(guard) if guard else None, bool(negated)
    )
