"""Synonyms of COCO's 80 categories, and detection of mentioned objects in a text.

The method, including exceptions such as "baby bird" and "toilet seat", is that of CHAIR (Rohrbach et al. 2018, arXiv
1809.02156). The list of synonyms is shorter, so scores are close to published ones, but not equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SYNONYMS = """
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

# Phrases that contain the name of an object, but don't mention it.
_NOT_OBJECTS = (
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
_IRREGULAR_SINGULARS = {
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


def mentioned_objects(text: str) -> list[str]:
    """The category of every object mentioned in ``text``, in order and with repetitions.

    The longest phrase counts: a "hot dog" is not a dog.
    """
    words = [singular(word) for word in re.findall(r"[^\W\d_]+", text.lower())]
    categories: list[str] = []
    position = 0
    while position < len(words):
        for length in (3, 2, 1):
            phrase = " ".join(words[position : position + length])
            if phrase in PHRASES and position + length <= len(words):
                if (category := PHRASES[phrase]) is not None:
                    categories.append(category)
                position += length
                break
        else:
            position += 1
    return categories


def singular(word: str) -> str:
    """``dogs`` → ``dog``, ``benches`` → ``bench``, ``puppies`` → ``puppy``."""
    if word in _IRREGULAR_SINGULARS:
        return _IRREGULAR_SINGULARS[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us")):
        return word
    if word.endswith("ies"):
        return f"{word[:-3]}y"
    return word[:-2] if word.endswith(("ches", "shes", "sses", "xes", "buses")) else word[:-1]


def _phrases() -> dict[str, str | None]:
    """Categories by phrase in the singular; None for phrases that don't mention an object."""
    phrases: dict[str, str | None] = {
        _singular_phrase(phrase): category
        for category, synonyms in _synonyms_by_category()
        for phrase in (category, *synonyms)
    }
    phrases |= {_singular_phrase(phrase): None for phrase in _NOT_OBJECTS}
    for animal in _ANIMALS:
        names = [phrase for phrase, category in phrases.items() if category == animal]
        phrases |= {f"{age} {name}": animal for age in ("baby", "adult") for name in names}
    phrases |= {f"{sport} player": "person" for sport in ("tennis", "baseball", "football", "soccer")}
    return phrases | {
        "toilet seat": "toilet",
        "truck bed": "truck",
        "passenger train": "train",
        "passenger jet": "airplane",
    }


def _synonyms_by_category() -> list[tuple[str, list[str]]]:
    """(category, synonyms)."""
    lines = re.sub(r"\n +", " ", _SYNONYMS).strip().splitlines()
    return [
        (category, synonyms.split(", ") if synonyms else [])
        for category, _, synonyms in (line.partition(": ") for line in lines)
    ]


def _singular_phrase(phrase: str) -> str:
    return " ".join(singular(word) for word in phrase.split())


PHRASES: Mapping[str, str | None] = _phrases()
CATEGORIES = tuple(category for category, _ in _synonyms_by_category())
