"""Families about numbers. Each function draws one problem of a level; demonstrations write down every step."""

from __future__ import annotations

from mifo.data.tasks.base import Draw, Family, Item, join_sorted


def _running_totals(terms: list[int]) -> tuple[str, int]:
    total, lines = terms[0], []
    for term in terms[1:]:
        lines.append(f"{total}+{term}={total + term}")
        total += term
    return "\n".join(lines), total


def chain_add(draw: Draw, level: int) -> Item:
    """Add three one-digit, three two-digit or four two-digit numbers with running totals."""
    low, high, count = ((1, 9, 3), (10, 99, 3), (10, 99, 4))[level - 1]
    terms = [draw.between(low, high) for _ in range(count)]
    steps, total = _running_totals(terms)
    return Item(
        text=f"Add {', '.join(map(str, terms))}.",
        canonical=f"add {join_sorted(terms)}",
        steps=steps,
        answer=str(total),
    )


def _places(n: int) -> list[int]:
    """The non-zero decimal places of n, largest first: 507 -> [500, 7]."""
    digits = str(n)
    return [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"]


def subtract(draw: Draw, level: int) -> Item:
    """Subtract place by place: two from two digits, two from three, three from three."""
    low_a, high_a, low_b, high_b = ((20, 99, 11, 98), (120, 999, 11, 99), (220, 999, 101, 998))[level - 1]
    a, b = draw.between(low_a, high_a), draw.between(low_b, high_b)
    if b >= a:
        a, b = b + 1, a
    left, lines = a, []
    for place in _places(b):
        lines.append(f"{left}-{place}={left - place}")
        left -= place
    return Item(text=f"What is {a} - {b}?", canonical=f"{a}-{b}", steps="\n".join(lines), answer=str(left))


def product(draw: Draw, level: int) -> Item:
    """Multiply by taking the second factor apart: x*34 = x*30 + x*4."""
    low_a, high_a, low_b, high_b = ((3, 9, 11, 99), (11, 19, 11, 39), (20, 99, 20, 99))[level - 1]
    a, b = draw.between(low_a, high_a), draw.between(low_b, high_b)
    parts = _places(b)
    lines = [f"{a}*{part}={a * part}" for part in parts]
    if len(parts) > 1:
        lines.append("+".join(str(a * part) for part in parts) + f"={a * b}")
    return Item(
        text=f"What is {a} * {b}?", canonical=f"mul {join_sorted((a, b))}", steps="\n".join(lines), answer=str(a * b)
    )


def _euclid(a: int, b: int) -> list[str]:
    lines: list[str] = []
    while True:
        quotient, rest = divmod(a, b)
        if rest == 0:
            return [*lines, f"{a}={quotient}*{b}"]
        lines.append(f"{a}={quotient}*{b}+{rest}")
        a, b = b, rest


def gcd(draw: Draw, level: int) -> Item:
    """Greatest common divisor by at most three division steps of Euclid."""
    high, most = ((30, 2), (90, 2), (160, 3))[level - 1]
    while True:
        factor = draw.between(1, (6, 12, 16)[level - 1])
        pair = [factor * draw.between(2, high // factor) for _ in range(2)]
        b, a = sorted(pair)
        lines = _euclid(a, b)
        if a != b and len(lines) <= most:
            break
    return Item(
        text=f"What is the gcd of {pair[0]} and {pair[1]}?",
        canonical=f"gcd {join_sorted(pair)}",
        steps="\n".join(lines),
        answer=lines[-1].rsplit("*", 1)[1],
    )


def select(draw: Draw, level: int) -> Item:
    """List the numbers larger than a bound (level 3: even ones), judging them one by one."""
    count, low, high = ((4, 1, 20), (5, 10, 99), (5, 10, 99))[level - 1]
    even = level == 3
    while True:
        numbers = [draw.between(low, high) for _ in range(count)]
        bound = draw.between(low + 2, high - 5)
        kept = [n for n in numbers if n > bound and not (even and n % 2)]
        if len(set(numbers)) == count and 0 < len(kept) <= 3:
            break
    condition = f"{'even and ' if even else ''}larger than {bound}"
    return Item(
        text=f"Which of {', '.join(map(str, numbers))} are {condition}?",
        canonical=f"{condition}: {join_sorted(numbers)}",
        steps="\n".join(f"{n} {'yes' if n in kept else 'no'}" for n in numbers),
        answer=", ".join(map(str, kept)),
    )


def bits(draw: Draw, level: int) -> Item:
    """Count the ones or zeros of a number in binary, after writing it as a sum of powers of two."""
    low, high = ((2, 31), (32, 255), (256, 1023))[level - 1]
    while True:
        n, digit = draw.between(low, high), draw.between(0, 1)
        if n.bit_count() <= 7:  # a longer sum makes a response of more than about 48 tokens
            break
    binary = f"{n:b}"
    powers = [1 << i for i in range(len(binary) - 1, -1, -1) if n >> i & 1]
    answer = binary.count(str(digit))
    name = ("zeros", "ones")[digit]
    return Item(
        text=f"How many {name} does {n} have in binary?",
        canonical=f"bits {n}",
        steps=f"{n}={'+'.join(map(str, powers))}\n{binary}\n{name} {answer}",
        answer=str(answer),
    )


def equation(draw: Draw, level: int) -> Item:
    """Solve x + b = c, a x + b = c, or a x - b = c x + d, for a positive integer x."""
    x, b = draw.between(1, 40) if level == 1 else draw.between(2, 12), draw.between(1, 30)
    if level == 1:
        return Item(text=f"Solve x + {b} = {x + b}.", canonical=f"x+{b}={x + b}", steps=f"x={x + b}-{b}", answer=str(x))
    a = draw.between(2, 9)
    if level == 2:
        c = a * x + b
        steps = f"{a}x={c}-{b}={a * x}\nx={a * x}/{a}"
        return Item(text=f"Solve {a}x + {b} = {c}.", canonical=f"{a}x+{b}={c}", steps=steps, answer=str(x))
    other = draw.between(2, 9)
    d = a * x - b  # (a + other) x - b = other x + d, so d may not be negative
    if d < 1:
        b, d = 1, a * x - 1
    left = a + other
    steps = f"{left}x-{other}x={d}+{b}\n{a}x={a * x}\nx={a * x}/{a}"
    text = f"{left}x - {b} = {other}x + {d}"
    return Item(text=f"Solve {text}.", canonical=text, steps=steps, answer=str(x))


def remainder(draw: Draw, level: int) -> Item:
    """The remainder of a division, through the largest multiple that fits."""
    low, high, divisor_low, divisor_high = ((10, 40, 2, 5), (30, 99, 3, 9), (100, 400, 6, 15))[level - 1]
    a, b = draw.between(low, high), draw.between(divisor_low, divisor_high)
    quotient, rest = divmod(a, b)
    return Item(
        text=f"What is the remainder when {a} is divided by {b}?",
        canonical=f"{a} mod {b}",
        steps=f"{b}*{quotient}={a - rest}\n{a}-{a - rest}={rest}",
        answer=str(rest),
    )


def digit_sum(draw: Draw, level: int) -> Item:
    """The sum of the digits of a number of three, four or five digits."""
    n = draw.between(10 ** (level + 1), 10 ** (level + 2) - 1)
    steps, total = _running_totals([int(d) for d in str(n)])
    return Item(text=f"What is the digit sum of {n}?", canonical=f"digits {n}", steps=steps, answer=str(total))


def next_term(draw: Draw, level: int) -> Item:
    """The next number of an arithmetic sequence of four terms."""
    start, step = draw.between(1, (20, 60, 200)[level - 1]), draw.between(2, (9, 15, 40)[level - 1])
    terms = [start + i * step for i in range(4)]
    return Item(
        text=f"What comes next: {', '.join(map(str, terms))}?",
        canonical=f"sequence {start}+{step}",
        steps=f"{terms[1]}-{terms[0]}={step}\n{terms[3]}+{step}={terms[3] + step}",
        answer=str(terms[3] + step),
    )


FAMILIES = (
    Family(name="chain_add", description="add three or four numbers with running totals", draw=chain_add),
    Family(name="subtract", description="subtract place by place", draw=subtract),
    Family(name="product", description="multiply by taking one factor apart", draw=product),
    Family(name="gcd", description="greatest common divisor by Euclid's steps", draw=gcd),
    Family(name="select", description="list the numbers that meet a condition", draw=select, grader="exact"),
    Family(name="bits", description="count ones or zeros in binary", draw=bits),
    Family(name="equation", description="solve a linear equation", draw=equation),
    Family(name="remainder", description="remainder of a division", draw=remainder, in_training=False),
    Family(name="digit_sum", description="sum of the digits of a number", draw=digit_sum, in_training=False),
    Family(name="next_term", description="next term of an arithmetic sequence", draw=next_term, in_training=False),
)
