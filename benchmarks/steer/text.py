"""Text for :mod:`benchmarks.steer`: sentences of a small grammar, and a tokenizer learned on them.

Subject and verb agree in number, and verbs choose who may do what to whom, so that the next word
depends on more than the last one. Words of a list are the rarer the later they stand (Zipf).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rl_ebm.tokens import Batch, TokenSpace

EOS = "<eos>"
LEXICON = """
animals: dog cat horse bird fox wolf bear rabbit owl crow hare deer goose duck otter badger
  squirrel hedgehog sparrow raven falcon salmon turtle lizard spider beetle donkey goat rooster
  pigeon swallow heron lamb kitten puppy weasel ferret moth frog toad

people: girl boy teacher farmer doctor sailor baker king queen soldier painter singer dancer
  student writer hunter miller weaver potter shepherd gardener lawyer merchant traveller neighbour
  stranger carpenter blacksmith librarian musician scientist mechanic officer pilot captain judge
  tailor barber butcher poet prince widow banker clerk nurse guard ranger printer jeweller
  beekeeper cobbler astronomer gambler smuggler minister senator drummer fiddler conductor

things: book letter apple stone key lamp bottle basket ring hat coat knife bell drum map clock
  candle mirror hammer ladder bucket blanket ribbon pocket pillow kettle saucepan feather needle
  button wheel anchor lantern whistle violin trumpet telescope compass notebook envelope parcel
  umbrella necklace bracelet helmet shovel rope chain coin medal statue carpet curtain cushion
  teapot spoon plate goblet barrel crate cradle puppet marble kite banner scroll locket parchment
  thimble tapestry accordion harmonica microscope typewriter

places: river garden forest house market village mountain bridge harbour meadow castle church
  kitchen tower valley island orchard stable tavern library school station theatre cottage cellar
  attic palace quarry lighthouse windmill courtyard cemetery monastery workshop warehouse vineyard
  swamp canyon glacier desert lagoon plateau observatory

names: anna peter maria thomas clara john ruth david emma martin julia oscar helen victor nora
  felix laura simon irene hugo alice conrad edith walter ingrid leopold beatrice gregory matilda
  theodore

adjectives: old little big young quiet red dark bright small strange tired happy angry clever
  heavy broken golden silver wooden empty hungry lonely gentle proud brave careful famous ancient
  narrow crooked dusty frozen hollow humble jealous lively lucky merry nervous patient polite
  rusty sleepy stubborn thirsty velvet wicked graceful mysterious forgotten enormous delicate
  suspicious magnificent peculiar

adverbs: slowly quickly again quietly carefully today yesterday together happily sadly suddenly
  often never gently loudly secretly bravely patiently eagerly nervously proudly reluctantly
  cheerfully politely silently awkwardly

seeing: see find watch follow remember hear admire notice visit chase avoid fear meet greet
  recognise surprise protect frighten ignore trust

using: take carry bring buy sell hide lose clean paint open break repair borrow steal polish
  collect wrap deliver examine measure inspect

moving: walk sleep wait run sing dance sit rest hide work play stay wander travel listen dream
  whisper laugh shiver tremble stumble linger

saying: say think know believe hope fear claim dream whisper insist suspect

where: in near behind under above beside beyond across inside outside around through

times: today yesterday sometimes tonight tomorrow meanwhile eventually in_the_morning in_the_evening
  after_the_storm before_the_winter at_midnight during_the_festival

one: the a every

several: the two some many

past: see saw find found hear heard meet met take took bring brought buy bought sell sold hide hid
  lose lost break broke steal stole sleep slept run ran sing sang sit sat say said think thought
  know knew wrap wrapped
"""
WORDS = {
    name.strip(): [word.replace("_", " ") for word in words.split()]
    for name, _, words in (part.partition(":") for part in LEXICON.split("\n\n"))
}
PAST = dict(zip(WORDS["past"][::2], WORDS["past"][1::2], strict=True))


def past(verb: str) -> str:
    """The past tense."""
    if verb in PAST:
        return PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if verb[-1] == "y" and verb[-2] not in "aeiou" else verb + "ed"


def plural(noun: str) -> str:
    """Of a noun, and the third person of a verb: the same letters."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun[-1] == "y" and noun[-2] not in "aeiou" else noun + "s"


class Grammar:
    """Draws sentences; the same ones for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def word(self, kind: str) -> str:
        """A word of this kind, the n-th in proportion to 1 / (n + 3)."""
        words = WORDS[kind]
        weights = [1 / (n + 3) for n in range(len(words))]
        return self.random.choices(words, weights)[0]

    def maybe(self, chance: float, text: str) -> str:
        """The text with this chance, else nothing."""
        return text if self.random.random() < chance else ""

    def noun(self, kind: str) -> tuple[str, bool]:
        """A noun phrase, and whether it is plural."""
        many = self.random.random() < 0.3
        noun = self.word(kind)
        determiner = self.word("several" if many else "one")
        middle = self.maybe(0.35, self.word("adjectives"))
        return f"{determiner} {middle} {plural(noun) if many else noun}", many

    def actor(self) -> tuple[str, bool]:
        """Who can act."""
        if self.random.random() < 0.2:
            return self.word("names"), False
        return self.noun(self.random.choices(["people", "animals"], [0.6, 0.4])[0])

    def place(self) -> str:
        """Where."""
        return f"{self.word('where')} {self.noun('places')[0]}"

    def clause(self, depth: int = 0) -> str:
        """Subject, verb, and what the verb asks for."""
        subject, many = self.actor()
        present = self.random.random() < 0.35

        def verb(kind: str) -> str:
            chosen = self.word(kind)
            if present:
                return chosen if many else plural(chosen)
            return past(chosen)

        kind = self.random.choices(["see", "use", "move", "say"], [0.3, 0.3, 0.3, 0.1])[0]
        if kind == "say" and depth == 0:
            return f"{subject} {verb('saying')} that {self.clause(1)}"
        if kind == "see":
            tail = f"{verb('seeing')} {self.actor()[0]} {self.maybe(0.3, self.place())}"
        elif kind == "use":
            tail = f"{verb('using')} {self.noun('things')[0]} {self.maybe(0.4, self.place())}"
        else:
            more = self.maybe(0.2, f"and {verb('moving')}")
            tail = f"{verb('moving')} {more} {self.maybe(0.6, self.place())}"
        return f"{subject} {tail} {self.maybe(0.25, self.word('adverbs'))}"

    def sentence(self) -> str:
        """One sentence, without a stop."""
        return " ".join(f"{self.maybe(0.2, self.word('times'))} {self.clause()}".split())


def sentences(count: int, seed: int = 0) -> list[str]:
    """So many sentences of the grammar."""
    grammar = Grammar(seed)
    return [grammar.sentence() for _ in range(count)]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-pair encoding with EOS as id 0; a token that begins a word begins with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], space: TokenSpace) -> Batch:
    """The sentences that fit as responses, each ended by EOS."""
    rows = [x.ids for x in tokenizer.encode_batch(list(texts)) if len(x.ids) < space.max_length]
    lengths = torch.tensor([len(ids) + 1 for ids in rows])
    tokens = torch.zeros(len(rows), space.max_length, dtype=torch.int64)  # EOS is 0
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
    return Batch(tokens, lengths, torch.zeros(len(rows), dtype=torch.int64))


def decode(tokenizer: Tokenizer, batch: Batch) -> list[str]:
    """The texts of responses, EOS left out."""
    rows = zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True)
    return [tokenizer.decode(ids[: n - 1]) for ids, n in rows]
