"""Where a sentence of a solution ends, and what in it is a formula."""

import re

SENTENCE_END = re.compile(r"[.!?][\"')\]*”’]*[^\S\n]+(?=\S)")
NO_SENTENCE_END = re.compile(
    r"(?:\b[A-Za-z]\.[A-Za-z]"  # i.e.
    r"|\b(?:cf|vs|etc|Mr|Mrs|Ms|Dr|Fig|Eq|approx|resp)|\."  # vs. and ...
    r"|^[^\S\n]*\d{1,3})\.$",  # 12. of a list
    re.MULTILINE,
)
LOOK_BACK = 39  # characters before the full stop that NO_SENTENCE_END may see
# An escaped character is read as one, so that `\\[2pt]` opens nothing and `\$` is no dollar.
BRACKET = re.compile(r"\\(?:begin|end)\{[A-Za-z]+\*?\}|\[/?asy\]|\\[^\n]")
CLOSING = {r"\[": r"\]", r"\(": r"\)", "[asy]": "[/asy]"}  # the last: MATH's drawings
DOLLARS = re.compile(r"\\.|(\$\$)(?:\\.|[^\\])*?\$\$|(\$)(?:\\.|[^$\\])*\$", re.DOTALL)


def sentence_starts(text):
    """Character offsets behind the sentence ends of a text, whose formulas are hidden."""
    starts = set()
    for match in SENTENCE_END.finditer(text):
        mark = match.start()
        next_one = text[match.end()]  # the first character behind the space
        goes_on = next_one.islower() or next_one in "#=+-*/<>^,;:"  # `5! ways`, `approx. five`
        if text[mark] == "." and not goes_on:  # `Mr. Smith`, `1. First`
            goes_on = NO_SENTENCE_END.search(text, max(0, mark - LOOK_BACK), mark + 1)
        if not goes_on:
            starts.add(match.end())
    return starts


def hide_formulas(text):
    """The text with every formula overwritten by as many X, but for the full stop that may be its
    last character: \\[...\\], \\(...\\), environments, [asy]...[/asy]; then $...$ and $$...$$
    between them. A delimiter without its partner is plain text."""
    hidden = list(text)

    def hide(start, end, closing):
        inside = text[start : end - len(closing)].rstrip()
        last = inside[-1] if inside[-1:] in (".", "!", "?") else "X"
        # X is a capital: a sentence may begin with a formula.
        hidden[start:end] = "X" * (end - start - 1) + last

    opened = {}  # closing bracket -> where its opening ones stand: environments nest
    for match in BRACKET.finditer(text):
        bracket = match[0]
        if bracket.startswith(r"\begin{"):
            opened.setdefault(bracket.replace("begin", "end", 1), []).append(match.start())
        elif bracket in CLOSING:
            opened.setdefault(CLOSING[bracket], []).append(match.start())
        elif opened.get(bracket):
            hide(opened[bracket].pop(), match.end(), bracket)
    for match in DOLLARS.finditer("".join(hidden)):
        dollars = match[1] or match[2]
        if dollars:
            hide(match.start(), match.end(), dollars)
    return "".join(hidden)
