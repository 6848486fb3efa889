"""Numbers and lists as a plan prints them.

Invariant: every quantity carries its unit.
"""

from __future__ import annotations


def repeated(words: list[str]) -> str:
    """Equal neighbours counted: `a, 3 x b, c`."""
    runs: list[tuple[str, int]] = []
    for word in words:
        if runs and runs[-1][0] == word:
            runs[-1] = (word, runs[-1][1] + 1)
        else:
            runs.append((word, 1))
    return "; ".join(word if count == 1 else f"{count} x {word}" for word, count in runs)


def plural(count: int, noun: str) -> str:
    """`1 stage`, `2 stages`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def joined(sections: list[tuple[str, list[str]]]) -> str:
    """Titles, each with its lines indented."""
    lines: list[str] = []
    for title, body in sections:
        lines += [title, *(f"  {line}".rstrip() for line in body), ""]
    return "\n".join(lines).rstrip()


def bytes_text(size: float) -> str:
    """Decimal units."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def count_text(number: float) -> str:
    """A large number with its letter."""
    for power, letter in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:,.0f} "
