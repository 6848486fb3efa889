"""What a YAML syntax error usually means, in words for the person who wrote the file.

Looks at the text around the place where the parser gave up, which is often a line after the mistake. Invariant: names
a line that exists, and never hides the parser's own words.
"""

from __future__ import annotations

import re
import unicodedata

import yaml

_NO_SPACE = re.compile(r"""^\s*["']?[A-Za-z_][\w-]*["']?:[^\s/\\]""")
_EQUALS = re.compile(r"^\s*[A-Za-z_][\w.-]*\s*=\s*\S")
_CONFLICT = re.compile(r"^(<{7}|={7}|>{7})( |$)")
_COLON_IN_VALUE = re.compile(r"""^\s*["']?[\w-]+["']?:\s+[^"'\[{#][^#]*:(\s|$)""")


# Hints that say exactly what to write.
_TAB = "The line holds a tab; indent with spaces."
_COMMENT = "Comments begin with #."
_NO_COLON = "Write `key: value`, with a colon."
_NO_SPACE_THERE = "A space is missing after the colon."
_NO_COMMA = "A comma is missing at the end of this line"

# What files of other kinds begin with.
_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file. Unpack it",
    b"PK\x03\x04": "a zip file. Unpack it",
    b"\xff\xfe": "UTF-16 text. Save it as UTF-8",
    b"\xfe\xff": "UTF-16 text. Save it as UTF-8",
    b"\x80": "a pickle, not text. Name the YAML file",
}


def explain_bytes(name: str, content: bytes, position: int) -> str:
    """`file: ... What to do.` for a file that is not UTF-8 from the byte `position` on."""
    for begins, kind in _OTHER_KINDS.items():
        if content.startswith(begins):
            return f"{name}: is {kind}."
    line = content.count(b"\n", 0, position) + 1
    return f"{name}:{line}: is not UTF-8 text (byte {position}). Save it as UTF-8."


def odd_characters(text: str) -> str:
    """The characters of a key that look like others or like nothing: `U+200B ZERO WIDTH SPACE`."""
    odd = dict.fromkeys(letter for letter in text if ord(letter) > 126)
    return ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, '')}".rstrip() for letter in odd)


def mended(text: str, error: yaml.YAMLError) -> str | None:
    """The text as the hint of `explain` would have it, to find what else is wrong; None where that is not sure."""
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines() or [""]
    if mark is None or isinstance(error, yaml.reader.ReaderError):
        return None
    number, hint = _hint(lines, min(mark.line + 1, len(lines)), error)
    line = lines[number - 1]
    content = _content(line)
    if hint == _TAB:
        # Whoever indents with tabs does so everywhere: told once.
        lines = [re.sub(r"^\s+", lambda indent: indent[0].replace("\t", "  "), each) for each in lines]
        return "\n".join(lines)
    if hint == _NO_COLON:
        line = line.replace("=", ": ", 1)
    elif hint == _NO_SPACE_THERE:
        line = re.sub(r":(?=\S)", ": ", line, count=1)
    elif hint == _COMMENT:
        line = re.sub(r"(^|\s)//.*|/\*.*?\*/", "", line)
    elif hint.startswith(_NO_COMMA):
        line = content.rstrip() + ","
    if line == lines[number - 1]:
        return None
    lines[number - 1] = line
    return "\n".join(lines)


def explain(name: str, text: str, error: yaml.YAMLError) -> str:
    """`file:line: not valid YAML: ... What to do.` for an error of PyYAML."""
    lines = text.splitlines() or [""]
    if isinstance(error, yaml.reader.ReaderError):
        number = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        return (
            f"{name}:{number}: not valid YAML: the line holds the control character \\x{code:02x}"
            ". Remove it, or save the file as plain UTF-8 text."
        )
    mark = getattr(error, "problem_mark", None)
    # libyaml's place of an unexpected end lies behind the last line.
    number = min(mark.line + 1, len(lines)) if mark else 1
    number, hint = _hint(lines, number, error)
    words = getattr(error, "problem", None) or str(error)
    return f"{name}:{number}: not valid YAML: {words}.{f' {hint}' if hint else ''}"


def _hint(lines: list[str], number: int, error: yaml.YAMLError) -> tuple[int, str]:
    """The line to look at, and what to do there."""
    for at, line in enumerate(lines, 1):
        if _CONFLICT.match(line):
            return at, "A merge conflict is left in the file. Resolve it."
    if re.match(r"\s*<(!doctype|html)", "\n".join(lines[:3]), re.IGNORECASE):
        return 1, "This is a web page. Download the raw file."
    for at, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            return at, "This is Markdown. Remove the lines that begin with ```."
        if re.fullmatch(r"\[\w+\]", _content(line).strip()) and len(lines) > 1:
            return at, "Keys stand in no sections. Remove this line."
    words = str(getattr(error, "problem", ""))
    opened = getattr(error, "context_mark", None)
    start = opened.line + 1 if opened else number
    line = lines[number - 1]
    # The parser stops at the line after an entry that it could not finish; both are suspects.
    for at in (number, number - 1, start):
        if 1 <= at <= len(lines):
            hint = _hint_of_line(lines[at - 1])
            if hint:
                return at, hint
    if "document start" in words and number > 1:
        return number, "The brackets above it are all closed: move it in front of the last one, or remove it."
    if "escape" in words:
        return number, "A backslash in double quotes begins an escape. Use single quotes."
    if "another document" in words:
        return number, "A file holds one document. Remove this `---`, or split the file."
    if "alias" in words:
        return (
            number,
            "`*name` repeats what `&name` marks, which stands nowhere. Quote the text if * belongs to it.",
        )
    if "end of stream" in words:
        return start, "The quote that begins here is not closed."
    if "',' or '}'" in words or "',' or ']'" in words:
        before = max((at for at in range(1, number) if _content(lines[at - 1])), default=number)
        unclosed = _unclosed(lines)
        if unclosed and number >= len(lines):
            return unclosed, "The bracket that begins here is not closed."
        return before, f"{_NO_COMMA}, or a bracket above it is not closed."
    if "node content" in words and re.search(r",\s*,", _content(line)):
        return number, "A comma is too many."
    if "node content" in words and _unclosed(lines):
        return _unclosed(lines), "The bracket that begins here is not closed."
    if "expected ':'" in words:
        return number, "Write `key: value`."
    if line.lstrip().startswith("- "):
        return number, "A list item stands among `key: value` lines. Remove the dash, or indent it below its key."
    if "block mapping" in str(getattr(error, "context", "")) or "mapping values" in words:
        return number, "Lines of one block begin in the same column, and each is `key: value`."
    return number, ""


def _hint_of_line(line: str) -> str:
    content = _content(line)
    if odd := odd_characters(re.sub(r"\"[^\"]*\"|'[^']*'", "", re.sub(r"[^\W_a-zA-Z0-9]", "", content))):
        return f"The line holds {odd}: write plain spaces, quotes and colons."
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return _TAB
    if re.search(r"(^|\s)(//|/\*)", line):
        return _COMMENT
    if _EQUALS.match(content):
        return _NO_COLON
    if _NO_SPACE.match(content):
        return _NO_SPACE_THERE
    if content.rstrip().endswith(";") or "; " in content:
        return "Write one `key: value` per line, without semicolons."
    if _COLON_IN_VALUE.match(content):
        return "Quote the value: it holds a colon."
    return ""


def _unclosed(lines: list[str]) -> int:
    """The line of the innermost bracket that nothing closes, or 0."""
    opened: list[int] = []
    for at, line in enumerate(lines, 1):
        bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", _content(line))
        for character in bare:
            if character in "[{":
                opened.append(at)
            elif character in "]}" and opened:
                opened.pop()
    return opened[-1] if opened else 0


def _content(line: str) -> str:
    """A line without its comment."""
    return re.sub(r"(^|\s)#.*", "", line).rstrip()
