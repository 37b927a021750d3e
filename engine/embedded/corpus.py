"""A generated sentiment corpus: opinions on films, books, phones, food and hotels, labelled 0 (bad) or 1 (good).

The label is the verdict of the main clause, and a reader can always derive it:

    plain      The acting was superb.                               the word decides
    negated    The acting was far from superb.                      "not", "never", "hardly", ... turn the word round
    contrast   Although the plot was dull, the acting was superb.   the main clause outweighs the conceded one
    concord    The acting was superb and the score moving.          both clauses agree

Hedges, intensifiers and remarks on where and when carry no verdict. A third of the sentences are negated or
contrasted, so that counting words is not enough: that is the part on which a large model beats a small one.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

SIZES = {"train": 4_000, "quiz": 100, "validation": 872, "test": 2_000}
"""Rows of each split; `train` is the rows of one teacher's sample."""

_SEED = 20_220
"""Seed of the corpus that `splits` cuts."""


@dataclass(frozen=True)
class Domain:
    """What is reviewed; each value is one string of words, read by `_words`."""

    name: str
    item: str  # what the whole is called
    aspects: str  # its parts; a final * marks a plural
    good: str  # adjectives that suit these parts only
    bad: str
    verbs: str  # what the author did with it, in the past tense


# Adjectives and verbs that suit every domain. Underscores stand for spaces.
_GOOD = """superb excellent wonderful brilliant delightful impressive outstanding marvellous splendid terrific fantastic
    magnificent lovely remarkable exquisite stunning fabulous perfect charming memorable refreshing satisfying polished
    first-rate exceptional glorious admirable great good fine beautiful likeable pleasing praiseworthy masterful sublime
    inspired rewarding"""
_BAD = """awful terrible dreadful poor horrible mediocre disappointing abysmal appalling lousy atrocious pathetic dismal
    weak horrid irritating forgettable shoddy lamentable woeful hopeless feeble annoying tiresome second-rate miserable
    dire frustrating bad lacklustre unpleasant sloppy ugly laughable pitiful careless clumsy wretched"""
_SOARS = "soar shine sparkle delight impress charm dazzle triumph excel please captivate"
_DRAGS = "drag disappoint grate flop sag suffer stumble fail annoy falter bore underwhelm"
_LOVED = "loved adored enjoyed admired treasured praised cherished appreciated applauded relished"
_HATED = "hated loathed detested disliked regretted despised resented deplored scorned dreaded"

_DOMAINS = (
    Domain(
        name="films",
        item="film movie picture production sequel drama comedy thriller documentary western musical remake",
        aspects="""acting plot ending script score dialogue cast direction villain heroine finale narration chemistry
            performances* scenes* humour screenplay romance""",
        good="moving gripping witty poignant hilarious riveting heartfelt suspenseful luminous subtle tender electrifying",
        bad="wooden dull predictable contrived clichéd overlong incoherent tedious corny shallow lifeless muddled",
        verbs="watched saw rented streamed",
    ),
    Domain(
        name="books",
        item="book novel memoir biography paperback anthology fable story diary sonnet",
        aspects="""prose narrator chapters* plot ending characters* style premise opening translation dialogue imagery
            epilogue argument verses* foreword language""",
        good="lyrical absorbing vivid insightful eloquent haunting lucid engrossing graceful profound thoughtful evocative",
        bad="stilted boring pretentious rambling preachy turgid confusing humourless bloated trite implausible dreary",
        verbs="read borrowed finished reviewed",
    ),
    Domain(
        name="phones",
        item="phone handset tablet laptop device gadget smartphone camcorder printer",
        aspects="""camera screen keyboard speaker charger software display buttons* menus* microphone processor antenna
            touchpad hinge scanner battery""",
        good="responsive reliable sturdy intuitive durable sleek fast powerful elegant dependable efficient versatile",
        bad="sluggish flimsy unreliable defective buggy useless fragile outdated glitchy cumbersome noisy faulty",
        verbs="bought tested used ordered",
    ),
    Domain(
        name="food",
        item="restaurant bistro diner café pizzeria tavern brasserie canteen steakhouse buffet",
        aspects="""food soup pasta dessert steak bread salad sauce noodles* starters* fish curry rice pudding vegetables*
            pizza dumplings* omelette""",
        good="delicious fresh tasty juicy fragrant flavourful savoury appetising crisp creamy wholesome scrumptious",
        bad="bland soggy greasy stale overcooked tasteless inedible burnt rancid watery lukewarm salty",
        verbs="visited tried booked found",
    ),
    Domain(
        name="hotels",
        item="hotel hostel inn resort guesthouse lodge motel chalet",
        aspects="""room lobby breakfast pool bed bathroom balcony garden terrace reception sauna corridors* towels* bar
            lounge parking curtains*""",
        good="spacious spotless comfortable cosy airy tidy inviting immaculate tranquil luxurious bright welcoming",
        bad="dingy cramped filthy shabby mouldy draughty damp gloomy grubby smelly stuffy squalid",
        verbs="visited booked left chose",
    ),
)

_VERY = """very truly really utterly quite absolutely thoroughly simply remarkably genuinely downright positively
    unbelievably incredibly decidedly strikingly consistently completely"""
_NOT = "not never hardly far_from anything_but not_at_all by_no_means not_even_remotely scarcely in_no_way"
_NEVER = "never hardly scarcely rarely"
_WHO = """I my_sister my_brother our_neighbour a_friend my_colleague my_uncle the_critic my_wife my_husband our_teacher
    my_cousin the_reviewer my_flatmate Anna Tom Maria Peter Lucy David Emma Paul Sarah Mark Julia Simon Nina Oscar Clara
    Hugo Alice Martin Eva Felix Laura Victor Irene Daniel Sophie Leo Helen Adam Ruth Max Carla"""
_HEDGES = """to_be_fair I_think in_my_opinion i_suppose all_in_all for_what_it_is_worth to_be_honest frankly as_it_happens
    by_and_large on_the_whole if_you_ask_me in_short taken_together in_the_end as_far_as_I_can_tell looking_back overall
    in_hindsight to_my_mind"""
_WHEN = """yesterday last_night on_Monday on_Tuesday on_Wednesday on_Thursday on_Friday on_Saturday on_Sunday last_week
    last_month in_January in_February in_March in_April in_May in_June in_July in_August in_September in_October
    in_November in_December last_summer last_winter in_spring last_autumn on_holiday over_the_weekend two_days_ago
    three_weeks_ago a_month_ago after_work before_lunch this_morning at_midnight"""
_WHERE = """in_Paris in_London in_Rome at_home at_the_station near_the_harbour in_the_village with_my_parents in_Berlin
    with_two_colleagues on_the_train at_the_airport with_the_children in_Madrid near_the_office with_our_neighbours
    in_Lisbon by_the_river with_some_students in_Vienna in_the_city_centre at_the_festival in_Dublin with_my_class
    in_Prague on_a_long_flight in_Athens across_the_street with_a_large_group in_Oslo"""
_BUT = "but yet"
_ALTHOUGH = "although though while even_though"


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.replace("_", " ") for word in text.split())


# Shares of the constructions. More of them starves a miniature of the easy sentences that it starts from: with 0.26
# contrast some teachers were still at chance after an epoch, and tinybert ended near 79 % instead of 85 to 90 %.
_CONTRAST, _CONCORD = 0.20, 0.16
_NEGATED_MAIN, _NEGATED_OTHER = 0.20, 0.08


class _Writer:
    """Writes one sentence after another; `good` is the verdict asked for."""

    def __init__(self, rng: Random):
        self.rng = rng

    def pick(self, text: str) -> str:
        return self.rng.choice(_words(text))

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def adjective(self, domain: Domain, good: bool) -> str:
        """An adjective of the domain in a third of the cases, else one that suits everything."""
        own = self.chance(0.34)
        if good:
            return self.pick(domain.good if own else _GOOD)
        return self.pick(domain.bad if own else _BAD)

    def predicate(self, domain: Domain, good: bool, negated: bool) -> str:
        if negated:
            return f"{self.pick(_NOT)} {self.adjective(domain, not good)}"
        very = f"{self.pick(_VERY)} " if self.chance(0.25) else ""
        return very + self.adjective(domain, good)

    def clause(self, domain: Domain, aspect: str, good: bool, negated: bool, past: bool) -> str:
        """A clause that says that the aspect is good, or bad; a negated one says it with a word of the other side."""
        plural, name = aspect.endswith("*"), aspect.rstrip("*")
        form, word_is_good = self.rng.random(), good != negated
        if form < 0.70 or (past and form < 0.85):
            verb = ("were" if plural else "was") if past else ("are" if plural else "is")
            return f"the {name} {verb} {self.predicate(domain, good, negated)}"
        if form < 0.85:
            verb = self.pick(_SOARS if word_is_good else _DRAGS)
            if not plural:
                verb += "es" if verb.endswith(("sh", "ss")) else "s"
            return f"the {name} {self.pick(_NEVER)} {verb}" if negated else f"the {name} {verb}"
        if negated:
            return f"nobody would call the {name} {self.adjective(domain, word_is_good)}"
        return f"{self.pick(_WHO)} {self.pick(_LOVED if word_is_good else _HATED)} the {name}"

    def sentence(self, good: bool) -> tuple[str, str]:
        """A text, and the name of its domain."""
        rng = self.rng
        domain = rng.choice(_DOMAINS)
        first, second = rng.sample(_words(domain.aspects), 2)
        past = self.chance(0.5)
        main = self.clause(domain, first, good, self.chance(_NEGATED_MAIN), past)
        form = rng.random()
        if form < _CONTRAST:
            conceded = self.clause(domain, second, not good, self.chance(_NEGATED_OTHER), past)
            shape = rng.random()
            if shape < 0.45:
                text = f"{conceded}, {self.pick(_BUT)} {main}"
            elif shape < 0.75:
                text = f"{self.pick(_ALTHOUGH)} {conceded}, {main}"
            elif shape < 0.90:
                text = f"despite the {self.adjective(domain, not good)} {second.rstrip('*')}, {main}"
            else:
                text = f"{main} despite the {self.adjective(domain, not good)} {second.rstrip('*')}"
        elif form < _CONTRAST + _CONCORD:
            text = f"{main}, and {self.clause(domain, second, good, self.chance(_NEGATED_OTHER), past)}"
        else:
            text = main

        if self.chance(0.30):
            where = self.pick(_WHEN if self.chance(0.6) else _WHERE)
            text = f"{self.pick(_WHO)} {self.pick(domain.verbs)} the {self.pick(domain.item)} {where}: {text}"
        elif self.chance(0.30):
            text = f"{self.pick(_HEDGES)}, {text}"
        return text[0].upper() + text[1:] + ".", domain.name


def generate(count: int, seed: int) -> list[tuple[str, int]]:
    """`examples` without their domains."""
    return [(text, label) for text, label, _ in examples(count, seed)]


def examples(count: int, seed: int) -> list[tuple[str, int, str]]:
    """`count` distinct sentences with label and domain, as many good as bad (one more of either if `count` is odd).

    A longer list from the same seed begins with the shorter one.
    """
    writer, seen, rows = _Writer(Random(seed)), set(), []
    while len(rows) < count:
        # labels are drawn in pairs, so that every even-sized slice from an even start is balanced too
        label = 1 - rows[-1][1] if len(rows) % 2 else writer.rng.randrange(2)
        text, domain = writer.sentence(good=bool(label))
        while text in seen:
            text, domain = writer.sentence(good=bool(label))
        seen.add(text)
        rows.append((text, label, domain))
    return rows


def splits(samples: int) -> dict[str, list[tuple[str, int, str]]]:
    """The four parts as `examples`, no text in two of them; `train` has `samples` samples of `SIZES["train"]` rows, one after another.

    Quiz, validation and test are the same for every number of samples, and so are the samples that come first.
    """
    sizes = {"quiz": SIZES["quiz"], "validation": SIZES["validation"], "test": SIZES["test"]}
    sizes["train"] = samples * SIZES["train"]
    rows, parts, start = examples(sum(sizes.values()), _SEED), {}, 0
    for name, size in sizes.items():
        parts[name] = rows[start : start + size]
        start += size
    return parts
