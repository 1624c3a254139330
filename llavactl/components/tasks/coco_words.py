"""COCO's 80 categories in the words that people use for them, and finding them in a text.

The idea, and the traps it knows ("baby bird", "toilet seat"), are those of CHAIR (Rohrbach et al. 2018, arXiv
1809.02156); the list is our own and shorter, so scores come near to published ones without being the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORDS = """
person: people, man, woman, boy, girl, child, kid, baby, lady, guy, gentleman, adult, toddler, teenager, player,
    skier, snowboarder, surfer, skateboarder, skater, rider, cyclist, bicyclist, pedestrian, passenger, driver, chef,
    cook, waiter, officer, policeman, soldier, worker, farmer, student, teacher, doctor, tourist, batter, pitcher,
    catcher, umpire, bride, groom, mother, father, son, daughter, husband, wife, cowboy, customer, shopper, fisherman,
    family, crowd
bicycle: bike, cycle
car: automobile, sedan, suv, van, minivan, jeep, taxi, cab, limousine
motorcycle: motorbike, motor bike, motor cycle, scooter, moped
airplane: plane, air plane, aeroplane, aircraft, jet, jetliner, airliner, biplane
bus: minibus
train: locomotive, tram
truck: lorry, pickup, firetruck
boat: ship, sailboat, canoe, kayak, yacht, ferry, rowboat, speedboat, dinghy, gondola
traffic light: traffic signal, stoplight, stop light
fire hydrant: hydrant
stop sign
parking meter
bench
bird: duck, goose, pigeon, seagull, gull, parrot, owl, swan, chicken, hen, rooster, eagle, hawk, crow, pelican,
    heron, flamingo, sparrow
cat: kitten, kitty
dog: puppy, pup, hound, terrier, poodle, retriever, bulldog
horse: pony, foal, mare, stallion
sheep: lamb, ram, ewe
cow: bull, calf, cattle, ox
elephant
bear: polar bear, grizzly
zebra
giraffe
backpack: rucksack, knapsack
umbrella: parasol
handbag: purse
tie: necktie, bow tie
suitcase: luggage, briefcase
frisbee
skis: ski
snowboard
sports ball: ball, baseball, football, basketball, soccer ball, tennis ball
kite
baseball bat: bat
baseball glove: mitt
skateboard
surfboard
tennis racket: racket, racquet, tennis racquet
bottle
wine glass: wineglass
cup: mug
fork
knife
spoon
bowl
banana
apple
sandwich: burger, hamburger, cheeseburger
orange
broccoli
carrot
hot dog: hotdog
pizza
donut: doughnut
cake: cupcake, cheesecake
chair: armchair, stool
couch: sofa, loveseat
potted plant: houseplant
bed
dining table: table, desk
toilet: urinal, commode
tv: television, monitor
laptop: notebook computer, laptop computer, macbook
mouse
remote: remote control
keyboard
cell phone: cellphone, phone, telephone, smartphone, mobile phone
microwave
oven: stove
toaster
sink
refrigerator: fridge, freezer
book
clock
vase
scissors
teddy bear: teddy
hair drier: hairdryer, hair dryer
toothbrush
"""

# What looks like an object and is none, or another one.
_NO_OBJECT = (
    "home plate",
    "train track",
    "train station",
    "bus stop",
    "bus station",
    "hot plate",
    "bed room",
    "orange juice",
    "apple tree",
    "mouse pad",
    "baseball game",
    "baseball field",
    "baseball uniform",
    "football game",
    "soccer field",
    "cell phone tower",
)
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_PLURALS = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "people",
    "mice": "mouse",
    "geese": "goose",
    "oxen": "ox",
    "knives": "knife",
    "calves": "calf",
    "wives": "wife",
    "skis": "skis",
    "scissors": "scissors",
    "bus": "bus",
    "canvas": "canvas",
    "tennis": "tennis",
}


def objects_in(text: str) -> list[str]:
    """The category of every object that ``text`` names, in order, as often as it is named.

    The longest phrase wins: a "hot dog" is no dog.
    """
    words = [singular(word) for word in re.findall(r"[^\W\d_]+", text.lower())]
    found: list[str] = []
    at = 0
    while at < len(words):
        for length in (3, 2, 1):
            phrase = " ".join(words[at : at + length])
            if phrase in PHRASES and at + length <= len(words):
                if (category := PHRASES[phrase]) is not None:
                    found.append(category)
                at += length
                break
        else:
            at += 1
    return found


def singular(word: str) -> str:
    """``dogs`` → ``dog``, ``benches`` → ``bench``, ``puppies`` → ``puppy``."""
    if word in _PLURALS:
        return _PLURALS[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us")):
        return word
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("ches", "shes", "sses", "xes", "buses")) else word[:-1]


def _phrases() -> dict[str, str | None]:
    """Every phrase in the singular, and its category; None for one that is no object."""
    found: dict[str, str | None] = {
        _normal(phrase): category for category, phrases in _named() for phrase in (category, *phrases)
    }
    found |= {_normal(phrase): None for phrase in _NO_OBJECT}
    for animal in _ANIMALS:
        names = [phrase for phrase, category in found.items() if category == animal]
        found |= {f"{young} {name}": animal for young in ("baby", "adult") for name in names}
    found |= {f"{sport} player": "person" for sport in ("tennis", "baseball", "football", "soccer")}
    return found | {
        "toilet seat": "toilet",
        "truck bed": "truck",
        "passenger train": "train",
        "passenger jet": "airplane",
    }


def _named() -> list[tuple[str, list[str]]]:
    """(category, its other names)."""
    lines = re.sub(r"\n +", " ", _WORDS).strip().splitlines()
    return [
        (category, others.split(", ") if others else []) for category, _, others in (x.partition(": ") for x in lines)
    ]


def _normal(phrase: str) -> str:
    return " ".join(singular(word) for word in phrase.split())


PHRASES: Mapping[str, str | None] = _phrases()
CATEGORIES = tuple(category for category, _ in _named())
