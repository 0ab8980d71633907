"""What the embedded default is taught to tell apart: coarse classes, their wordings, and fair pairs.

A coarse class merges corpus classes that no small model can be expected to separate from one another
(rain and a river, a violin and a flute). A query is one of its wordings; mixtures are only made, and the
default only claims to work, between two classes that are not neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CoarseClass:
    """A class of the default. `members` maps a corpus class to the wordings that fit only that member."""

    name: str
    wordings: tuple[str, ...]
    members: Mapping[str, tuple[str, ...]] = field(hash=False)


def _class(name: str, wordings: str, **members: str) -> CoarseClass:
    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    return CoarseClass(name, split(wordings), {member: split(text) for member, text in members.items()})


CLASSES: tuple[CoarseClass, ...] = (
    _class(
        "speech",
        "speech, a person speaking, a person talking, someone speaking, someone talking, people talking, "
        "a human voice, voice, spoken words",
        speech="",
        speech_male="a man speaking, a man talking, male speech, a male voice",
        speech_female="a woman speaking, a woman talking, female speech, a female voice",
    ),
    _class(
        "birds",
        "birds, a bird, bird song, birds singing, birds chirping, a bird singing, a bird calling, birdsong, "
        "bird calls, chirping birds",
        birds="birds in a forest",
    ),
    _class(
        "dog",
        "dog, a dog, dog barking, a dog barking, dogs barking, a barking dog, dog bark, barking",
        dog="",
    ),
    _class(
        "rooster",
        "rooster, a rooster, a rooster crowing, rooster crowing, a crowing rooster, a cock crowing",
        rooster="",
    ),
    _class(
        "thunder",
        "thunder, a thunderstorm, thunder rumbling, rolling thunder, a clap of thunder, thunderstorm, "
        "rumbling thunder",
        thunder="",
    ),
    _class(
        "water",
        "water, flowing water, running water, the sound of water, water flowing",
        rain="rain, rain falling, heavy rain, falling rain, steady rain",
        water_stream="a stream, a river, a stream flowing, a river flowing",
        water_tap="water running from a tap, a tap running, a shower, water running into a sink",
        waterfall="a waterfall, waterfall",
        sea_waves="waves, ocean waves, sea waves, waves on a beach, the sea, the ocean",
    ),
    _class(
        "engine",
        "engine, an engine, engine noise, a motor, a motor running, an engine running, motor noise, "
        "a machine running, a vehicle, vehicles",
        engine="a car engine, a car, car engine",
        train="a train, train, a train passing, a subway train",
        truck="a truck, truck",
        helicopter="a helicopter, helicopter, a helicopter flying",
        airplane="an airplane, airplane, a jet, a plane flying",
        chainsaw="a chainsaw, chainsaw",
        city="traffic, city traffic, street traffic",
    ),
    _class(
        "drums",
        "drums, a drum, drumming, drum beat, a drum kit, percussion, drum kit, a drummer playing, "
        "drums playing",
        drums="",
        cymbal="a cymbal, cymbals, a cymbal crash",
        hand_drum="hand drums, a hand drum",
    ),
    _class(
        "bells",
        "bells, a bell, a bell ringing, bells ringing, bell, ringing bells, chimes, the sound of bells",
        bell="",
        chimes="wind chimes",
        church_bells="church bells",
        music_box="a music box, music box",
        glockenspiel="a glockenspiel, glockenspiel",
        vibraphone="a vibraphone, vibraphone",
    ),
    _class(
        "piano and guitar",
        "piano or guitar, plucked strings, piano and guitar",
        piano="piano, a piano, a piano playing, piano music, someone playing the piano",
        guitar_acoustic="guitar, a guitar, acoustic guitar, a guitar playing, an acoustic guitar, "
        "guitar music",
        guitar_nylon="guitar, a guitar, acoustic guitar, a guitar playing, an acoustic guitar, guitar music",
        harp="harp, a harp, a harp playing, harp music",
    ),
    _class(
        "strings and winds",
        "strings and winds, an orchestra instrument, wind or string instrument",
        violin="violin, a violin, a violin playing, violin music, bowed strings",
        cello="cello, a cello, a cello playing, bowed strings",
        contrabass="a double bass, double bass, bowed strings",
        flute="flute, a flute, a flute playing, flute music, a wind instrument",
        oboe="oboe, an oboe, an oboe playing, a wind instrument",
        clarinet="clarinet, a clarinet, a clarinet playing, a wind instrument",
        bassoon="bassoon, a bassoon, a bassoon playing, a wind instrument",
        saxophone="saxophone, a saxophone, a saxophone playing, a wind instrument",
        trumpet="trumpet, a trumpet, a trumpet playing, brass",
        trombone="trombone, a trombone, a trombone playing, brass",
        french_horn="french horn, a french horn, brass",
        tuba="tuba, a tuba, a tuba playing, brass",
        organ="organ, an organ, an organ playing",
        harmonium="accordion, an accordion, an accordion playing, harmonium",
    ),
    _class(
        "footsteps",
        "footsteps, steps, a person walking, someone walking, walking, footsteps walking",
        footsteps="",
    ),
)

NEIGHBOURS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in (
        ("thunder", "water"),
        ("thunder", "engine"),
        ("engine", "water"),
        ("drums", "footsteps"),
        ("bells", "piano and guitar"),
        ("birds", "rooster"),
        ("dog", "rooster"),
    )
)

SAMPLE_CLASSES: Mapping[str, str] = {
    "male speech": "speech_male",
    "female speech": "speech_female",
    "bird singing": "birds",
    "water splashing or flowing": "water_stream",
    "car or truck engine": "engine",
    "train": "train",
    "jet or propeller aircraft": "airplane",
    "helicopter": "helicopter",
    "power saw or jackhammer": "chainsaw",
    "drum kit": "drums",
    "bell": "bell",
    "piano": "piano",
    "acoustic guitar": "guitar_acoustic",
    "harp": "harp",
    "violin or cello": "violin",
    "flute": "flute",
    "trumpet or brass": "trumpet",
    "saxophone or clarinet": "saxophone",
    "organ or accordion": "organ",
    "footsteps": "footsteps",
}
"""Class names of the small shippable corpus in terms of the large one's; what is missing here is not used."""

CLAIMED: tuple[str, ...] = tuple(coarse.name for coarse in CLASSES if coarse.name != "footsteps")
"""The classes that the shipped bundle claims; the words of the others are refused as unfamiliar."""

BY_NAME: Mapping[str, CoarseClass] = {coarse.name: coarse for coarse in CLASSES}
COARSE_OF: Mapping[str, str] = {member: coarse.name for coarse in CLASSES for member in coarse.members}
FUNCTION_WORDS = (
    "a",
    "an",
    "the",
    "of",
    "and",
    "or",
    "in",
    "on",
    "from",
    "sound",
    "sounds",
    "noise",
    "playing",
)


def fair(one: str, other: str) -> bool:
    """Whether two coarse classes may be opposed in a mixture: different, and not neighbours."""
    return one != other and frozenset((one, other)) not in NEIGHBOURS


def wordings(member: str) -> tuple[str, ...]:
    """Every query text that is true of a recording of corpus class `member`."""
    coarse = BY_NAME[COARSE_OF[member]]
    return coarse.wordings + coarse.members[member]


def words(names: tuple[str, ...] = tuple(BY_NAME)) -> tuple[str, ...]:
    """The sorted words that the wordings of the coarse classes `names` are made of, and function words."""
    found = set(FUNCTION_WORDS)
    for name in names:
        for text in (
            *BY_NAME[name].wordings,
            *(t for texts in BY_NAME[name].members.values() for t in texts),
        ):
            found.update(text.split())
    return tuple(sorted(found))
