"""Families about words and letters: counting, reversing, and (out of distribution) vowels."""

from __future__ import annotations

from mifo.data.tasks.base import Draw, Family, Item

_SHORT_TEXT = """
add all ant apple arena art baby ball bee bell bird boat book boot bubble cat cherry class coffee cook cool cup
daddy dog door dress eel egg error eye feet fish floor foot free fruit giggle glass goose grass hat hello hill honey
igloo inn jelly kiss kite label lamp leaf level lily llama loop mama mirror moon mummy name needle nest noon paper
peel penny pepper pizza pool puppy queen rabbit radar river roof room rose ruler sheep ship sleep spoon street sugar
sunny tea teeth tent tiger toast tooth tree water wheel wood yellow zebra zoo
"""
_LONG_TEXT = """
address alphabet arrange assassin balloon banana barrel basket battery blossom bookkeeper bottle broccoli buffalo
butterfly cabbage calendar carrot caterpillar cinnamon coconut collection committee computer cucumber december
difference dinosaur elephant eleven engineer essence february football forever freedom garden giraffe grammar
grasshopper hammock happiness hippo holiday history hundred illness island january kangaroo keyboard kitchen ladder
lemonade lettuce library mammoth marmalade mattress meadow messenger mississippi mountain mushroom necessary
notebook november october onion orange pancake parallel parrot passenger peppermint piano pineapple possess potato
pumpkin pyramid raccoon rainbow raspberry remember sandwich scissors season sentence september settlement seventeen
sixteen skeleton spaghetti squirrel staircase strawberry success sunflower surprise telephone television terrace
tomorrow tomato toothbrush tobacco umbrella unicorn vanilla village volcano waterfall weekend winter yesterday
zucchini
"""
_SHORT, _LONG = _SHORT_TEXT.split(), _LONG_TEXT.split()
WORDS = (
    tuple(w for w in _SHORT if len(w) <= 5),
    tuple(w for w in _SHORT + _LONG if 6 <= len(w) <= 7),
    tuple(w for w in _LONG if len(w) >= 8),
)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def _numbered(word: str, counted: str) -> tuple[str, int]:
    """The word spelled out with each counted letter numbered: ("banana", "a") -> ("b a1 n a2 n a3", 3)."""
    count, spelled = 0, []
    for letter in word:
        count += letter in counted
        spelled.append(f"{letter}{count}" if letter in counted else letter)
    return " ".join(spelled), count


def letter_count(draw: Draw, level: int) -> Item:
    """Count a letter in a word, spelling it out; one time in six the letter is drawn from the whole alphabet."""
    word = draw.choice(WORDS[level - 1])
    letter = draw.choice(_ALPHABET if draw.between(1, 6) == 1 else word)
    steps, count = _numbered(word, letter)
    return Item(
        text=f"How many times does {letter} appear in {word}?",
        canonical=f"{letter} in {word}",
        steps=steps,
        answer=str(count),
    )


def reverse(draw: Draw, level: int) -> Item:
    """Write an invented word of three, five or seven letters backwards, letter by letter."""
    length = (3, 5, 7)[level - 1]
    word = "".join(draw.choice("dklmnrtvz" if i % 2 == 0 else "aeiou") for i in range(length))
    steps = f"{' '.join(word)}\n{' '.join(word[::-1])}"
    # The reversal of a problem is its mirror image: both belong to one split.
    return Item(
        text=f"Write {word} backwards.",
        canonical=f"reverse {min(word, word[::-1])}",
        steps=steps,
        answer=word[::-1],
    )


def vowels(draw: Draw, level: int) -> Item:
    """Count the vowels of a word."""
    word = draw.choice(WORDS[level - 1])
    steps, count = _numbered(word, "aeiou")
    return Item(text=f"How many vowels are in {word}?", canonical=f"vowels {word}", steps=steps, answer=str(count))


FAMILIES = (
    Family(name="letter_count", description="count a letter in a word by spelling it", draw=letter_count),
    Family(name="reverse", description="write a word backwards", draw=reverse, grader="exact"),
    Family(name="vowels", description="count the vowels of a word", draw=vowels, in_training=False),
)
