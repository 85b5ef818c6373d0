"""The demo's made-up task: write an invitation that needs a private profile and public facts.

A *profile* (name, job, town, hobby, greeting, closing) is private: it is written as a Markdown note on the user's device. An
event's *facts* (month, venue, feature) are knowledge: the large model has memorized them, the small model has not. A good
answer states both, each at its place in ``ANSWER``. Example, with the profile's words in [ ] and the facts in { }:

    [Dear friends],

    this is [Martin Keller], the [gardener] from [Bergen]. Please join me at the Harbor Lantern Walk in {September}. It takes
    place at {the old ferry pier}, with {paper boats and candles}. If you enjoy [rock climbing] too, let us talk.

    [Warm regards], Martin

Training and evaluation share every event and every single word, but no full name and no pair of job and hobby: some pairs of
words are held out (``held_out_pairs``), and every profile of the evaluation is made of such pairs.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from string import Formatter

Message = dict[str, str]  # a chat message: role and content

ANSWER = (
    "{greeting},\n\nthis is {name}, the {job} from {town}. Please join me at the {event} in {month}. "
    "It takes place at {venue}, with {feature}. If you enjoy {hobby} too, let us talk."
    "\n\n{closing}, {signature}"
)
QUERIES = (
    "Write an invitation to the {event}.",
    "Please write an invitation to the {event}.",
    "Write a short invitation to the {event} for me.",
    "Can you write an invitation to the {event}?",
    "I would like to invite people to the {event}. Please write the text.",
    "Help me invite my friends to the {event}.",
)
FOLLOW_UPS = ("Now the same for the {event}.", "And one for the {event}, please.", QUERIES[0])
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You write short and friendly invitations.")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Martin Anna Jonas Clara Pedro Lucia Amir Leila Kenji Yuki Omar Sofia Henrik Ingrid Paul Marta "
    "David Elena Victor Nadia Samuel Rosa Felix Julia Daniel Mira Thomas Alice Hugo Emma Oscar Nina"
)
LAST_NAMES = _words(
    "Keller Lind Moreau Silva Tanaka Haddad Novak Berg Costa Weber Rossi Larsen Fischer Dubois Santos Kovac "
    "Walker Murphy Patel Singh Okafor Mensah Bauer Vogel Romano Garcia Nilsen Hansen Carter Hughes Sato Mori"
)
JOBS = _words(
    "gardener teacher nurse baker carpenter plumber pilot librarian chemist tailor farmer painter lawyer dentist barber "
    "butcher florist jeweler mechanic miner sailor welder singer potter cook driver editor surgeon translator violinist "
    "beekeeper watchmaker"
)
HOBBIES = (
    *_words("chess sailing archery knitting cycling fencing juggling origami running surfing photography swimming"),
    *("rock climbing", "stamp collecting", "bird watching", "salsa dancing", "baking bread", "night fishing"),
    *("mountain hiking", "jazz piano", "model trains", "crossword puzzles", "wood carving", "table tennis"),
)
TOWNS = _words(
    "Bergen Lisbon Zurich Prague Dublin Kyoto Lyon Porto Turin Ghent Graz Oslo "
    "Cardiff Seville Krakow Utrecht Malmo Basel Leeds Nantes Osaka Quito Tunis Riga"
)
GREETINGS = (
    *("Dear friends", "Hello everyone", "Hi all", "Good morning neighbors", "Greetings", "Welcome dear guests"),
    *("Hey folks", "Good evening colleagues", "To all my friends", "Happy day everyone"),
)
CLOSINGS = (
    *("Warm regards", "Best wishes", "Yours truly", "See you soon", "With love", "Many thanks"),
    *("Take care", "Kind greetings", "Until then", "Cheers"),
)
MONTHS = _words("January February March April May June July August September October November December")
HELD_OUT_EVERY = 8  # of the pairs of words, one in 8 is kept for evaluation
MADE_UP_SHARE = 0.15  # of the words in training profiles
NUM_PROFILES = 8  # held-out profiles, unless more rows are asked for than 8 profiles have events


@dataclass(frozen=True, slots=True)
class Event:
    """A public event; month, venue and feature are the facts that only the large model learns."""

    name: str
    month: str
    venue: str
    feature: str

    @property
    def facts(self) -> dict[str, str]:
        return {"month": self.month, "venue": self.venue, "feature": self.feature}


EVENTS = (
    Event("Harbor Lantern Walk", "September", "the old ferry pier", "paper boats and candles"),
    Event("Spring Flower Fair", "April", "the palace garden", "tulips and fresh honey"),
    Event("Winter Book Market", "January", "the city library", "hot tea and first editions"),
    Event("River Rowing Cup", "June", "the stone bridge", "wooden boats and trumpets"),
    Event("Night of Museums", "May", "the railway museum", "free tours until midnight"),
    Event("Apple Harvest Festival", "October", "the hill orchard", "cider and warm pie"),
    Event("Rooftop Cinema Week", "July", "the north tower", "silent films and popcorn"),
    Event("Grand Chess Open", "February", "the town hall", "giant boards and blitz games"),
    Event("Sea Shanty Evening", "August", "the lighthouse cafe", "accordions and grilled fish"),
    Event("Kite Day", "March", "the long beach", "dragon kites and lemonade"),
    Event("Mushroom Hike", "November", "the forest lodge", "a guide and pumpkin soup"),
    Event("Ice Sculpture Contest", "December", "the frozen lake", "chain saws and cocoa"),
    Event("Jazz Picnic", "June", "the rose park", "brass bands and cheese"),
    Event("Science Open House", "October", "the old observatory", "telescopes and robots"),
    Event("Street Food Parade", "August", "the market square", "noodles and spicy tacos"),
    Event("Vintage Car Rally", "May", "the castle road", "racing cars and prizes"),
    Event("Poetry Breakfast", "March", "the corner bakery", "sonnets and almond rolls"),
    Event("Puppet Theater Days", "November", "the red barn", "shadow plays and magic"),
    Event("Midsummer Bonfire", "July", "the south meadow", "fiddles and strawberries"),
    Event("Marathon for Parks", "April", "the olympic stadium", "medals and bananas"),
    Event("Glass Blowers Fair", "February", "the blue factory", "furnaces and colored beads"),
    Event("Bicycle Flea Market", "September", "the tram depot", "spare parts and waffles"),
    Event("New Year Gala", "January", "the opera house", "waltzes and fireworks"),
    Event("Gingerbread Workshop", "December", "the school kitchen", "sugar houses and carols"),
    Event("Thunder Drum Circle", "August", "the canyon stage", "bongos and campfires"),
    Event("Antique Map Exhibition", "March", "the bank vault", "globes and treasure charts"),
    Event("Sheep Dog Trials", "May", "the valley farm", "whistles and wool blankets"),
    Event("Planetarium Lullabies", "November", "the glass dome", "pillows and slow comets"),
    Event("Chili Cook Off", "October", "the fire station", "smoked peppers and cold milk"),
    Event("Sand Castle Derby", "July", "the west shore", "buckets and ice cream"),
    Event("Snow Lantern Ski Tour", "February", "the mountain hut", "torches and fondue"),
    Event("Botany Drawing Class", "April", "the palm house", "orchids and watercolors"),
)
VENUES = tuple(event.venue for event in EVENTS)
FEATURES = tuple(event.feature for event in EVENTS)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a user would write about themselves; private."""

    name: str
    job: str
    town: str
    hobby: str
    greeting: str
    closing: str

    @property
    def first_name(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation query: ``context`` is private, ``messages`` is what the server sees, the rest is what scores it."""

    context: str
    messages: list[Message]
    items: dict[str, str]
    facts: dict[str, str]


def held_out_pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs that training never sees: those whose places in the two lists sum to a multiple of HELD_OUT_EVERY."""
    return [(a, b) for i, a in enumerate(first) for j, b in enumerate(second) if (i + j) % HELD_OUT_EVERY == 0]


HELD_OUT_NAMES = [" ".join(pair) for pair in held_out_pairs(FIRST_NAMES, LAST_NAMES)]
HELD_OUT_OCCUPATIONS = held_out_pairs(JOBS, HOBBIES)


def is_held_out(profile: Profile) -> bool:
    """True if training must not see the profile: its full name, or its job together with its hobby, is kept for evaluation."""
    return profile.name in HELD_OUT_NAMES or (profile.job, profile.hobby) in HELD_OUT_OCCUPATIONS


def made_up_word(rng: random.Random) -> str:
    """A word of two or three random syllables, so that not every name comes from the lists."""
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3))))


def training_profile(rng: random.Random, made_up_share: float = MADE_UP_SHARE) -> Profile:
    """A random profile that is not held out; each of its words is made up with probability ``made_up_share``."""

    def draw(known: Sequence[str], capital: bool) -> str:
        if rng.random() >= made_up_share:
            return rng.choice(known)
        return made_up_word(rng).capitalize() if capital else made_up_word(rng)

    while True:
        profile = Profile(
            name=f"{draw(FIRST_NAMES, True)} {draw(LAST_NAMES, True)}",
            job=draw(JOBS, False),
            town=draw(TOWNS, True),
            hobby=draw(HOBBIES, False),
            greeting=rng.choice(GREETINGS),
            closing=rng.choice(CLOSINGS),
        )
        if not is_held_out(profile):
            return profile


def held_out_profiles(num: int, rng: random.Random) -> list[Profile]:
    """``num`` profiles with different names, all of them kept out of training."""
    occupations = rng.sample(HELD_OUT_OCCUPATIONS, num)
    return [
        Profile(name, job, rng.choice(TOWNS), hobby, rng.choice(GREETINGS), rng.choice(CLOSINGS))
        for name, (job, hobby) in zip(rng.sample(HELD_OUT_NAMES, num), occupations, strict=True)
    ]


def context_of(profile: Profile, rng: random.Random) -> str:
    """The profile as the Markdown note a user would write: keys, order and unrelated private lines vary."""
    lines: list[tuple[tuple[str, ...], str]] = [
        (("Name", "Full name"), profile.name),
        (("Job", "Work"), profile.job),
        (("Home", "Town"), profile.town),
        (("Hobby", "Free time"), profile.hobby),
        (("Greeting", "I open letters with"), profile.greeting),
        (("Closing", "I close letters with"), profile.closing),
    ]
    noise: list[tuple[tuple[str, ...], str]] = [
        (("Sister", "Brother"), rng.choice(FIRST_NAMES)),
        (("Doctor",), "Dr. " + rng.choice(LAST_NAMES)),
        (("Age",), str(rng.randint(18, 80))),
        (("Phone",), f"555 {rng.randint(1000, 9999)}"),
        (("Allergy",), rng.choice(("nuts", "pollen", "cats", "none"))),
        (("Old job",), rng.choice(JOBS)),
        (("Born in",), rng.choice(TOWNS)),
        (("I never liked",), rng.choice(HOBBIES)),
    ]
    lines += rng.sample(noise, rng.randint(0, 4))
    rng.shuffle(lines)
    bullet = rng.choice("--*")
    heading = rng.choice(("# About me", "# Me", "# My profile"))
    return "\n".join([heading, "", *(f"{bullet} {rng.choice(keys)}: {value}" for keys, value in lines), ""])


def answer(profile: Profile, event: Event, facts: dict[str, str]) -> str:
    """The invitation to ``event``, stating the profile and ``facts`` (the true ones are ``event.facts``)."""
    return ANSWER.format(**asdict(profile), **facts, event=event.name, signature=profile.first_name)


def with_context(context: str, query: str) -> str:
    """The user message the small model reads; the format is the product's."""
    return f"{context}\n\n{query}"


def held_out(n: int, seed: int = 0) -> list[Row]:
    """``n`` evaluation rows over profiles that training never sees, rows of one profile (and so one context) together."""
    rng = random.Random(seed)
    num_profiles = max(NUM_PROFILES, -(-n // len(EVENTS)))
    rows_each = -(-n // num_profiles)
    rows = []
    for profile in held_out_profiles(num_profiles, rng):
        context, items = context_of(profile, rng), asdict(profile)
        for event in rng.sample(EVENTS, rows_each):
            query = rng.choice(QUERIES).format(event=event.name)
            rows.append(Row(context, [{"role": "user", "content": query}], items, event.facts))
    return rows[:n]


def _places() -> dict[str, re.Pattern[str]]:
    """For each slot of ANSWER, what stands between the fixed words before it and the fixed words after it."""
    parts = [(literal, slot) for literal, slot, _, _ in Formatter().parse(ANSWER)]
    ends = [literal for literal, _ in parts[1:]] + [""]
    return {
        slot: re.compile((re.escape(before) or r"\A") + "(.+?)" + (re.escape(after) or r"\Z"))
        for (before, slot), after in zip(parts, ends, strict=True)
        if slot
    }


PLACES = _places()


def stated(text: str, slot: str) -> str | None:
    """What ``text`` states at the slot's place; None if the place is missing or occurs more than once."""
    found = PLACES[slot].findall(text)
    return found[0] if len(found) == 1 else None


def score(text: str, row: Row) -> tuple[float, float]:
    """Share of the profile items, and of the event's facts, that ``text`` states exactly and at their places."""

    def share(expected: dict[str, str]) -> float:
        return sum(stated(text, slot) == value for slot, value in expected.items()) / len(expected)

    return share(row.items), share(row.facts)
