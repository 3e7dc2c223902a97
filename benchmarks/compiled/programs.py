"""RASP programs, and what is changed in them; needs tracr.

After the task descriptions of the RASP literature ("Thinking Like Transformers", Weiss et al.,
arXiv 2106.06981; "Tracr", Lindner et al., arXiv 2301.05062). A program is a function whose
arguments are its sub-programs: the defaults make the base, and each of the named ``changes``
replaces one of them and makes an expert. So base and expert have one graph, hence one layout.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tracr.rasp import rasp

Part = Any
T, P, M = rasp.tokens, rasp.indices, rasp.Map
Select, Width, Aggregate = rasp.Select, rasp.SelectorWidth, rasp.Aggregate
Both = rasp.SequenceMap
EQ, NEQ, LT = rasp.Comparison.EQ, rasp.Comparison.NEQ, rasp.Comparison.LT
GT, LEQ, TRUE = rasp.Comparison.GT, rasp.Comparison.LEQ, rasp.Comparison.TRUE


@dataclass(frozen=True)
class Program:
    """A program with the changes that make its experts.

    Attributes:
        name: of the function.
        build: the function.
        tokens: its vocabulary.
        length: of its inputs, all of them: attention goes both ways, so nothing may be padded.
        distinct: whether no token stands twice in an input.
        causal: whether it is compiled with causal attention.
        changes: the new sub-program by the argument that it replaces.
    """

    name: str
    build: Callable[..., rasp.SOp]
    tokens: tuple[str | int, ...]
    length: int
    distinct: bool
    causal: bool
    changes: dict[str, Part]

    def variants(self) -> Iterator[tuple[str, rasp.SOp, rasp.SOp]]:
        """Name of a change, base and expert."""
        for argument, part in self.changes.items():
            yield f"{self.name}-{argument}", self.build(), self.build(**{argument: part})


PROGRAMS: dict[str, Program] = {}


def program(
    tokens: str = "1234",
    length: int = 5,
    *,
    distinct: bool = False,
    causal: bool = False,
    **changes: Part,
) -> Callable[[Callable[..., rasp.SOp]], Callable[..., rasp.SOp]]:
    """Register a program, with the changes of its arguments."""

    def register(build: Callable[..., rasp.SOp]) -> Callable[..., rasp.SOp]:
        assert set(changes) <= set(inspect.signature(build).parameters)
        of = tuple(int(x) if x.isdigit() else x for x in tokens)
        name = build.__name__
        PROGRAMS[name] = Program(name, build, of, length, distinct, causal, changes)
        return build

    return register


# --- parts -------------------------------------------------------------------------------------


def equals(token: Any) -> Callable[[Any], bool]:
    return lambda x: x == token


def at(offset: int) -> Callable[[int, int], bool]:
    return lambda k, q: k == q + offset


IS_A, IS_B, PREVIOUS = equals("a"), equals("b"), at(-1)


def length() -> rasp.SOp:
    return Width(Select(T, T, TRUE))


def mirrored(of_length: Callable[[int], int] = lambda x: x - 1) -> rasp.SOp:
    return Both(lambda n, i: n - i, M(of_length, length()), P)


def moved(places: rasp.SOp, values: rasp.SOp, predicate: Any = EQ) -> rasp.SOp:
    return Aggregate(Select(P, places, predicate), values)


def fraction(where: rasp.SOp, predicate: Any = LEQ) -> rasp.SOp:
    numbers = rasp.numerical(where)
    return rasp.numerical(Aggregate(Select(P, P, predicate), numbers, default=0))


def is_token(token: Any) -> rasp.SOp:
    return rasp.numerical(M(lambda x: int(x == token), T))


def ranked(keys: rasp.SOp, values: rasp.SOp, predicate: Any = LT) -> rasp.SOp:
    return Aggregate(Select(Width(Select(keys, keys, predicate)), P, EQ), values)


# --- counting ----------------------------------------------------------------------------------


@program(predicate=LT)
def histogram(predicate: Part = EQ) -> rasp.SOp:
    return Width(Select(T, T, predicate))


@program(predicate=NEQ, above=lambda x: x > 1)
def frequent(predicate: Part = EQ, above: Part = lambda x: x > 2) -> rasp.SOp:
    return M(above, Width(Select(T, T, predicate)))


@program("abcd", token=lambda k, q: k == "b")
def count_of_a_token(token: Part = lambda k, q: k == "a") -> rasp.SOp:
    return Width(Select(T, T, token))


@program("abcd", kept=lambda x: x in "ad")
def count_of_a_class(kept: Part = lambda x: x in "ab") -> rasp.SOp:
    return Width(Select(M(kept, T), T, lambda k, q: k))


@program(first=LT, second=GT)
def histogram_of_histogram(first: Part = EQ, second: Part = EQ) -> rasp.SOp:
    counts = Width(Select(T, T, first))
    return Width(Select(counts, counts, second))


@program(first=NEQ, less=lambda k, q: k < 3)
def count_less_frequent(first: Part = EQ, less: Part = lambda k, q: k < 2) -> rasp.SOp:
    counts = Width(Select(T, T, first))
    return Width(Select(counts, counts, less))


@program("abc", first=lambda k, q: k == "c", more=lambda x, y: x >= y)
def more_a_than_b(first: Part = lambda k, q: k == "a", more: Part = lambda x, y: x > y) -> rasp.SOp:
    return Both(more, Width(Select(T, T, first)), Width(Select(T, T, lambda k, q: k == "b")))


@program(odd=lambda x: x // 2 % 2)
def length_parity(odd: Part = lambda x: x % 2) -> rasp.SOp:
    return Both(lambda n, i: (n + i) % 2, M(odd, length()), M(lambda i: i % 2, P))


@program(predicate=GT, parity=lambda x: x % 3)
def rank_parity(predicate: Part = LT, parity: Part = lambda x: x % 2) -> rasp.SOp:
    return M(parity, Width(Select(T, T, predicate)))


@program(earlier=lambda k, q: k[0] == q[0] and k[1] > q[1])
def count_of_earlier(
    earlier: Part = lambda k, q: k[0] == q[0] and k[1] < q[1],
) -> rasp.SOp:
    both = Both(lambda t, i: (t, i), T, P)
    return Width(Select(both, both, earlier))


@program(length=4, earlier=lambda k, q: k[0] == q[0] and k[1] != q[1], mark=lambda x: x == 1)
def first_occurrence(
    earlier: Part = lambda k, q: k[0] == q[0] and k[1] < q[1], mark: Part = lambda x: x == 0
) -> rasp.SOp:
    both = Both(lambda t, i: (t, i), T, P)
    return M(mark, Width(Select(both, both, earlier)))


@program(near=EQ, cap=lambda x: min(x, 3))
def window_width(
    near: Part = lambda k, q: abs(k - q) <= 1, cap: Part = lambda x: min(x, 2)
) -> rasp.SOp:
    return Both(lambda w, t: (w + t) % 4, M(cap, Width(Select(P, P, near))), T)


# --- moving ------------------------------------------------------------------------------------


@program("abcd", of_length=lambda x: x, predicate=lambda k, q: k == 4 - q)
def reverse(of_length: Part = lambda x: x - 1, predicate: Part = EQ) -> rasp.SOp:
    return moved(mirrored(of_length), T, predicate)


@program("abcd", offset=at(-2))
def shift(offset: Part = PREVIOUS) -> rasp.SOp:
    return Aggregate(Select(P, P, offset), T)


@program("abcd", where=lambda k, q: k == 2)
def copy_first(where: Part = lambda k, q: k == 0) -> rasp.SOp:
    return Aggregate(Select(P, P, where), T)


@program(places=lambda i: (i + 2) % 5, code=lambda t: (t + 2) % 4)
def rotate(places: Part = lambda i: (i + 1) % 5, code: Part = lambda t: (t + 1) % 4) -> rasp.SOp:
    return M(code, moved(M(places, P), T))


@program(code=lambda t: (t + 2) % 4, of_length=lambda x: x - 2)
def cipher_then_reverse(
    code: Part = lambda t: (t + 1) % 4, of_length: Part = lambda x: x - 1
) -> rasp.SOp:
    return moved(mirrored(of_length), M(code, T))


@program(code=lambda t: (t + 2) % 4, of_length=lambda x: x - 2)
def reverse_then_cipher(
    code: Part = lambda t: (t + 1) % 4, of_length: Part = lambda x: x - 1
) -> rasp.SOp:
    return M(code, moved(mirrored(of_length), T))


@program("abcd", even=lambda i: i // 2, odd=lambda i: i)
def swap_pairs(even: Part = lambda i: i - i % 2 + 1 - i % 2, odd: Part = lambda i: 0) -> rasp.SOp:
    places = Both(lambda p, q: min(p + q, 4), M(even, P), M(odd, P))
    return moved(places, T)


@program("abcd", one=at(-2), two=at(1))
def shift_twice(one: Part = PREVIOUS, two: Part = PREVIOUS) -> rasp.SOp:
    return Aggregate(Select(P, P, two), Aggregate(Select(P, P, one), T))


# --- sorting -----------------------------------------------------------------------------------


@program("12345", 4, distinct=True, predicate=GT)
def sort(predicate: Part = LT) -> rasp.SOp:
    return ranked(T, T, predicate)


@program("12345", 4, distinct=True, key=lambda x: -x, value=lambda x: x % 3)
def sort_by_key(key: Part = lambda x: (3 * x) % 7, value: Part = lambda x: (x + 1) % 3) -> rasp.SOp:
    return ranked(M(key, T), M(value, T))


@program("12345", 4, distinct=True, which=lambda k, q: k == 3, predicate=GT)
def extreme(which: Part = lambda k, q: k == 0, predicate: Part = LT) -> rasp.SOp:
    return Aggregate(Select(Width(Select(T, T, predicate)), P, which), T)


@program("123", 4, sign=lambda h, i: h + i / 4, first=NEQ)
def sort_by_frequency(sign: Part = lambda h, i: i / 4 - h, first: Part = EQ) -> rasp.SOp:
    keys = Both(sign, Width(Select(T, T, first)), P)
    return ranked(keys, T)


@program("123", 4, first=NEQ, which=lambda k, q: k == 3)
def most_frequent(first: Part = EQ, which: Part = lambda k, q: k == 0) -> rasp.SOp:
    keys = Both(lambda h, i: i / 4 - h, Width(Select(T, T, first)), P)
    return Aggregate(Select(Width(Select(keys, keys, LT)), P, which), T)


@program("1234", 4, distinct=True, offset=at(1), predicate=GT)
def sort_then_shift(offset: Part = PREVIOUS, predicate: Part = LT) -> rasp.SOp:
    return Aggregate(Select(P, P, offset), ranked(T, T, predicate))


@program("1234", 4, distinct=True, predicate=GT, last=lambda n, i: (n + i) % 4)
def sort_then_reverse(predicate: Part = LT, last: Part = lambda n, i: n - i) -> rasp.SOp:
    places = Both(last, M(lambda x: x - 1, length()), P)
    return moved(places, ranked(T, T, predicate))


# --- brackets ----------------------------------------------------------------------------------


def balance(first: Any, second: Any, factors: tuple[int, int] = (1, -1)) -> rasp.SOp:
    opened, closed = fraction(is_token(first)), fraction(is_token(second))
    return rasp.numerical(rasp.LinearSequenceMap(opened, closed, *factors))


@program("()a", first="a", factors=(1, 1), broken=lambda x: x > 0.1)
def pair_balance(
    first: Part = "(", factors: Part = (1, -1), broken: Part = lambda x: x < -0.1
) -> rasp.SOp:
    return M(broken, balance(first, ")", factors))


@program("()ab", 4, first="b", everywhere=lambda x: x > 0.6)
def dyck(first: Part = "(", everywhere: Part = lambda x: x > 0.1) -> rasp.SOp:
    negative = rasp.numerical(M(lambda x: int(x < -0.01), balance(first, ")")))
    return M(everywhere, fraction(negative, TRUE))


@program("()[]", 4, second="(", either=lambda x, y: x and y)
def shuffle_dyck(second: Part = "[", either: Part = lambda x, y: x or y) -> rasp.SOp:
    round_ = M(lambda x: x < -0.01, balance("(", ")"))
    square = M(lambda x: x < -0.01, balance(second, "]"))
    return Both(either, round_, square)


@program("abc", token="b", most=lambda x: x > 0.3)
def fraction_of_previous(token: Part = "a", most: Part = lambda x: x > 0.6) -> rasp.SOp:
    return M(most, fraction(is_token(token)))


@program("abc", causal=True, token="c", most=lambda x: x > 0.2)
def running_fraction(token: Part = "a", most: Part = lambda x: x > 0.4) -> rasp.SOp:
    return M(most, fraction(is_token(token), TRUE))


@program("abc", factors=(1, 1), token="c")
def majority(factors: Part = (1, -1), token: Part = "b") -> rasp.SOp:
    one, two = fraction(is_token("a"), TRUE), fraction(is_token(token), TRUE)
    return M(lambda x: x > 0.05, rasp.numerical(rasp.LinearSequenceMap(one, two, *factors)))


# --- patterns ----------------------------------------------------------------------------------


@program("abc", now=equals("c"), before=equals("b"), offset=at(-2))
def detect_pattern(now: Part = IS_B, before: Part = IS_A, offset: Part = PREVIOUS) -> rasp.SOp:
    earlier = Aggregate(Select(P, P, offset), M(before, T))
    return Both(lambda x, y: x and bool(y), M(now, T), earlier)


@program("abc", code=lambda x, y: x < (y or "a"), offset=at(1))
def bigram(code: Part = lambda x, y: x == y, offset: Part = PREVIOUS) -> rasp.SOp:
    return Both(code, T, Aggregate(Select(P, P, offset), T))


@program("abcd", 5, distinct=False, offset=at(1), match=NEQ)
def induction(offset: Part = PREVIOUS, match: Part = EQ) -> rasp.SOp:
    before = Aggregate(Select(P, P, offset), T)
    return Aggregate(Select(before, T, match), T)


@program("abc", of_length=lambda x: x - 2, same=lambda x, y: x != y)
def palindrome_places(
    of_length: Part = lambda x: x - 1, same: Part = lambda x, y: x == y
) -> rasp.SOp:
    return Both(same, T, moved(mirrored(of_length), T))


@program("ab", same=lambda x, y: x < (y or "a"), enough=lambda x: x > 0.3)
def palindrome(same: Part = lambda x, y: x == y, enough: Part = lambda x: x > 0.9) -> rasp.SOp:
    alike = Both(same, T, moved(mirrored(), T))
    numbers = rasp.numerical(M(lambda x: int(bool(x)), alike))
    return M(enough, fraction(numbers, TRUE))


@program("abc", branch=equals("b"), one=lambda t: {"a": "c", "b": "a", "c": "b"}[t])
def switch_on_first(
    branch: Part = IS_A, one: Part = lambda t: {"a": "b", "b": "c", "c": "a"}[t]
) -> rasp.SOp:
    first = Aggregate(Select(P, P, lambda k, q: k == 0), M(branch, T))
    both = Both(lambda x, y: (x, y), M(one, T), T)
    return Both(lambda on, pair: pair[0] if on else pair[1], first, both)


@program("abcd", vowel=lambda x: x in "ab", predicate=NEQ)
def class_histogram(vowel: Part = lambda x: x in "a", predicate: Part = EQ) -> rasp.SOp:
    kind = M(vowel, T)
    return Width(Select(kind, kind, predicate))


@program("abcd", vowel=lambda x: x in "bd", offset=at(1))
def previous_class(vowel: Part = lambda x: x in "ac", offset: Part = PREVIOUS) -> rasp.SOp:
    return Aggregate(Select(P, P, offset), M(vowel, T))


@program("1234", 4, one=lambda x: (x + 2) % 4, add=lambda x, y: (x - y) % 4)
def sum_with_mirror(
    one: Part = lambda x: (x + 1) % 4, add: Part = lambda x, y: (x + y) % 4
) -> rasp.SOp:
    coded = M(one, T)
    return Both(lambda x, y: add(x, y or 0), coded, moved(mirrored(), M(lambda t: t % 4, T)))


@program("123", 4, parity=lambda i: i // 2, join=lambda x, y: (x * y) % 3)
def token_by_position(
    parity: Part = lambda i: i % 2, join: Part = lambda x, y: (x + y) % 3
) -> rasp.SOp:
    return Both(join, M(lambda t: t % 3, T), M(parity, P))


@program("1234", 5, causal=True, predicate=LT, odd=lambda x: x > 1)
def running_count(predicate: Part = EQ, odd: Part = lambda x: x % 2 == 1) -> rasp.SOp:
    return M(odd, Width(Select(T, T, predicate)))


@program("abcd", causal=True, offset=at(-2), code=lambda x, y: x < (y or "a"))
def causal_bigram(offset: Part = PREVIOUS, code: Part = lambda x, y: x == y) -> rasp.SOp:
    return Both(code, T, Aggregate(Select(P, P, offset), T))
