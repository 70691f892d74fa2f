"""PTX as a list of instructions, for `ptx_machine`: as much of it as Triton's kernels use."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = re.compile(r"[%\w$]+$")
_LABEL = re.compile(r"\s*([%\w$]+):")


@dataclass
class Instruction:
    """One instruction: ``@[!]guard opcode operands``; names of blocks in braces are made unique."""

    opcode: str
    operands: list[str]
    guard: str = ""
    negated: bool = False


@dataclass
class Code:
    """A kernel: its instructions, where labels point, and the tables of indirect branches."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)


def parse(text: str) -> Code:
    """The one kernel of a module."""
    text = re.sub(r"//[^\n]*|^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.MULTILINE)
    head, body = text.partition(".entry")[2].split("{", 1)
    code = Code(parameters=re.findall(r"\.param[^,)]*\s([\w$]+)", head))
    scopes: list[dict[str, str]] = [{}]
    count, at = 0, 0
    while at < len(body):
        if body[at].isspace():
            at += 1
        elif body[at] == "{":
            count += 1
            end = _closing(body, at)
            scopes.append(_own_names(body[at + 1 : end], count))
            at += 1
        elif body[at] == "}":
            scopes.pop()
            at += 1
            if not scopes:
                return code
        elif label := _LABEL.match(body, at):
            code.labels[_renamed(label[1], scopes)] = len(code.instructions)
            at = label.end()
        else:
            end = body.index(";", at)
            _statement(body[at:end], code, scopes)
            at = end + 1
    raise AssertionError("the kernel does not end")


def _closing(body: str, at: int) -> int:
    depth = 0
    for end in range(at, len(body)):
        depth += (body[end] == "{") - (body[end] == "}")
        if depth == 0:
            return end
    raise AssertionError("a block does not end")


def _own_names(block: str, count: int) -> dict[str, str]:
    """The registers and labels of a block that others may have too."""
    found = re.findall(r"(?:^|[;{\s])([A-Za-z]\w*):", block)
    for names in re.findall(r"\.reg\s+\.\w+\s+([^;]+);", block):
        found += [name.strip() for name in names.split(",")]
    return {name: f"{name}@{count}" for name in found}


def _renamed(name: str, scopes: list[dict[str, str]]) -> str:
    for scope in reversed(scopes):
        if name in scope:
            return scope[name]
    return name


def _statement(text: str, code: Code, scopes: list[dict[str, str]]) -> None:
    text = " ".join(text.split())
    if text.startswith(".branchtargets"):
        (table,) = [name for name, at in code.labels.items() if at == len(code.instructions)][-1:]
        code.tables[table] = [name.strip() for name in text.split(None, 1)[1].split(",")]
    if not text or text.startswith("."):
        return
    guard, negated = "", False
    if text.startswith("@"):
        guard, text = text[1:].split(None, 1)
        negated, guard = guard.startswith("!"), _renamed(guard.lstrip("!"), scopes)
    opcode, _, rest = text.partition(" ")
    operands = [_operand(part, scopes) for part in _parts(rest)]
    code.instructions.append(Instruction(opcode, operands, guard, negated))


def _parts(text: str) -> list[str]:
    """Split by commas outside of brackets."""
    found, depth, part = [], 0, ""
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            found.append(part)
            part = ""
        else:
            part += letter
    return [part.strip() for part in (*found, part) if part.strip()]


def _operand(text: str, scopes: list[dict[str, str]]) -> str:
    return "".join(
        _renamed(part, scopes) if _NAME.match(part) else part
        for part in re.split(r"([%\w$]+)", text.replace(" ", ""))
    )
