"""The process that compares LaTeX: `answers.Judges` starts it, asks it, and kills it when it hangs.

A line in, the JSON of [gold, answer, question]; a line out, 1 or 0. math-verify's parser reads the
LaTeX, without evaluating it, so that one sees how it was written. Equal value is not enough: an
answer that leaves more to do than the gold one is the question, said again.
"""

import contextlib
import json
import os
import re
import signal
import sys
import warnings
import zlib
from collections import Counter
from functools import lru_cache

from answers import outside_braces  # as a program it has this folder on its path

# sympy and the parser are imported below, by the process that has given up memory and stdout first.
MEMORY = 4 << 30  # bytes: 9^{9^9} asks for more
PARSE_SECONDS = 4  # shorter than answers.JUDGE_SECONDS; the first parse on a busy machine takes 2
DIGITS = 120
# Where expressions are compared: (low, width) of every letter's value. Below 1 and little above, so
# that no power drowns the other terms; negative, which tells |x| from x.
POINTS = (("0.1", "0.8"), ("1.05", "0.2"), ("-3", "2"))


@lru_cache(4096)  # a gold answer meets every response to its question
def read(text):
    r"""The sympy expression of a LaTeX text, or None. Inequalities of one letter become sets."""
    text = re.sub(r"\)\s*\(", r")\\cdot(", text)  # the parser takes (12)(10) for 22
    boxed = "\\boxed{" + text + "}"
    # Out of time is an error that ends this process, not a text that the cache remembers as None.
    limits = {"parsing_timeout": PARSE_SECONDS, "raise_on_error": True}
    found = parse_latex(boxed, CONFIG, "no_fallback", "first_match", **limits)
    if not found or isinstance(found[0], str):
        return None
    found = found[0]
    if isinstance(found, sympy.MatrixBase):
        return found.as_immutable()
    if found.has(sympy.zoo, sympy.nan):  # \gamma(2) as a function
        return None
    # The parser drops what it does not know: of 3\mathbf{i}+2\mathbf{j} it returns 3, of 11_5 11,
    # and of a=b=c one part.
    bare = re.sub(r"\\(?:text|mathrm)\s*\{[^{}]*\}|\\(?:begin|end)\{\w*\}(?:\{\w*\})?", "", text)
    letters = set(re.sub(r"\\[A-Za-z]+|[^A-Za-z]", "", bare).lower())
    if letters - set(str(found).lower()) or re.search(r"\d\s*_|\\(?:approx|hspace|phantom)", bare):
        return None
    if outside_braces(bare).count("=") > str(found).count("Eq("):
        return None
    if isinstance(found, sympy.FiniteSet) and len(found) == 1:
        found = found.args[0]  # a set of one is that one
    # Inequalities of one letter become the set of its values: 0<x<8 is (0, 8).
    parts = found.args if isinstance(found, (sympy.FiniteSet, sympy.And)) else [found]
    if len(found.free_symbols) != 1 or not all(part.is_Relational for part in parts):
        return found
    if any(isinstance(part, sympy.Eq) for part in parts):
        return found
    either = isinstance(found, sympy.FiniteSet) and re.search(r"\bor\b", text)
    join = sympy.Union if either else sympy.Intersection
    return join(*(part.as_set() for part in parts))


# --------------------------------------------------------------------------- the same value?


def close(a, b):
    """Equal as fractions, or to 100 digits of the larger one: 2^{-100} is not 2^{-99}."""
    if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
        return False
    if a.is_Rational and b.is_Rational:
        return a == b
    a, b = sympy.N(a, DIGITS), sympy.N(b, DIGITS)
    return bool(abs(a - b) <= sympy.Float(10) ** -100 * max(abs(a), abs(b)))


def values(tree, at):
    """Its value at a point, where each letter has a number of its own."""
    exact = {x: sympy.Rational(str(x)) for x in tree.atoms(sympy.Float)}  # 0.5x as it is written
    low, width = map(sympy.Rational, POINTS[at])
    letters = {}
    for symbol in tree.free_symbols:
        hashed = zlib.crc32(symbol.name.encode()) % 2999
        letters[symbol] = low + width * sympy.Rational(hashed, 2999)
    return tree.xreplace(exact).subs(letters).doit()


def names(tree):
    return {symbol.name for symbol in tree.free_symbols}


def equal(a, b):
    """Do two sympy objects mean the same?"""
    if a == b:
        return True
    if isinstance(a, sympy.Eq) and isinstance(b, sympy.Eq) and names(a):
        # equations are equal when they are multiples of each other
        a, b = a.lhs - a.rhs, b.lhs - b.rhs
        if names(a) != names(b):
            return False
        first, *others = (values(a, at) / values(b, at) for at in range(3))
        return first != 0 and all(close(first, other) for other in others)
    scalars = [isinstance(x, sympy.Expr) and not isinstance(x, sympy.MatrixBase) for x in (a, b)]
    if all(scalars):
        points = range(3 if names(a) else 1)
        return names(a) == names(b) and all(close(values(a, i), values(b, i)) for i in points)
    if any(scalars) or type(a) is not type(b) or len(a.args) != len(b.args):
        return False
    if isinstance(a, (sympy.FiniteSet, sympy.Union, sympy.And)):  # in any order
        partners = [[equal(x, y) for y in b.args] for x in a.args]
        return all(map(any, partners)) and all(map(any, zip(*partners)))
    return all(map(equal, a.args, b.args))  # tuples, matrices, the ends of intervals


# --------------------------------------------------------------------------- as worked out?


def worked_out(tree, found):
    """The written expression as sympy simplifies it by itself, from the leaves up. Counts in
    `found` what there was to do: steps by their parts, and by name what sympy does not do."""
    if not tree.args:
        return tree
    if isinstance(tree, sympy.UnevaluatedExpr):
        return tree.args[0]
    args = [worked_out(arg, found) for arg in tree.args]
    try:
        done = tree.func(*args)
    except Exception:  # a function that refuses its evaluated parts
        return tree
    step = (tree.func.__name__, *sorted(map(str, args)))
    if tree.is_Add:
        written = sum(len(sympy.Add.make_args(arg)) for arg in args)
        if len(sympy.Add.make_args(done)) < written:  # 99^2+99+1, x+x: not collected
            found[step] += 1
    elif tree.is_Mul:
        tops, bottoms = zip(*map(sympy.fraction, args))
        top = [factor for each in tops for factor in factors(each)]
        if len(factors(sympy.Mul(*top))) < len(top):  # 5*24, 2(x+1), x*x: not multiplied
            found[step] += 1
        bases = [factor.as_base_exp()[0] for factor in top]
        if sum(not base.is_number for base in bases) > 1:
            found["factors"] += any(base.is_Add for base in bases)  # (x+1)(x+2): not expanded
        found["uncancelled"] += share_a_factor(sympy.Mul(*tops), sympy.Mul(*bottoms))
    elif tree.is_Pow:
        base, power = args
        if power.is_Integer and power > 1 and base.is_Add:
            found["factors"] += 1
        if power.is_Rational and not power.is_Integer:
            nested = any(inner.exp.is_Integer is False for inner in base.atoms(sympy.Pow))
            found["roots"] += 1 + nested  # sqrt(6+2 sqrt 5) is 1 + sqrt 5
        if power.is_negative and (base.free_symbols or base.is_Add):
            found["divisions"] += 1  # 1/x + 1/y is not one fraction yet
        if power.is_negative and base.has(sympy.Pow):
            found["roots below"] += not base.free_symbols
        turned = power.is_Integer and power.is_negative  # 1/2 is a number, not a step
        if not turned and done.as_base_exp() != (base, power) and base != sympy.E:
            found[step] += 1  # 2^3, sqrt(8), (2x)^2
    return done


def share_a_factor(top, bottom):
    """(2x+2)/(4x), 2 pi/8, 4/sqrt(2), but not 1/sqrt(3)."""
    if (top**2).is_Integer and (bottom**2).is_Integer:
        top, bottom = top**2, bottom**2
    return bottom != 1 and sympy.gcd(top, bottom) != 1


def factors(product):
    """Its factors other than 1 and -1."""
    return [factor for factor in sympy.Mul.make_args(product) if abs(factor) != 1]


def factor_count(tree):
    """Of 2(x+1)^2: 3."""
    powers = tree.as_powers_dict().values()
    return sum(int(power) if power in range(1, 99) else 1 for power in powers)


def same(gold, answer, question):
    gold, answer = read(gold), read(answer)
    if gold is None or answer is None or not equal(gold, answer):
        return False
    of_gold, of_answer = Counter(), Counter()
    worked_out(gold, of_gold)
    worked_out(answer, of_answer)
    if not re.search(r"\brationali[sz]", question, re.I):
        del of_answer["roots below"]  # 1/sqrt(3) is as good as sqrt(3)/3
    if not of_answer <= of_gold:
        return False
    if re.search(r"\bfactor", question, re.I) and of_gold["factors"]:
        return factor_count(answer) >= factor_count(gold)  # 2(x-1)(x+1), not (2x-2)(x+1)
    return True


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end closes stdin
    with contextlib.suppress(ImportError, ValueError, OSError):  # no such limit on this system
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.path.pop(0)  # this folder: its names are not for sympy
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not look like a reply
    warnings.simplefilter("ignore")
    import sympy
    from math_verify import LatexExtractionConfig
    from math_verify import parse as parse_latex

    CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]
    print("ready", file=reply, flush=True)
    for line in sys.stdin:
        try:
            verdict = same(*json.loads(line))
        except Exception as error:  # what cannot be read is not equal
            print(repr(error), file=sys.stderr)
            verdict = False
        print(int(verdict), file=reply, flush=True)
