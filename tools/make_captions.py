"""Write the captions that merge.py keeps the base model's answers on: ``python -m tools.make_captions``.

Merging needs text features of everyday captions that have nothing to do with the concepts (paper, section 3.2). These
are put together from the words below, so that they are ours to ship, in the styles people caption images in:
sentences, lists of words, titles. The result is the same on every run.
"""

from __future__ import annotations

import random
from pathlib import Path

COUNT = 1200
FILE = Path(__file__).resolve().parent.parent / "custom_diffusion" / "concept" / "regularization.txt"


def words(text: str) -> list[str]:
    """Comma-separated phrases as a list."""
    return [phrase.strip() for phrase in " ".join(text.split()).split(",")]


PEOPLE = words("""
    an old fisherman, a young woman in a red coat, two children, a group of hikers, a street musician, a nurse,
    a bearded man with glasses, a bride and groom, a soccer player, a ballet dancer, a farmer, three friends,
    a chef in a white apron, an astronaut, a construction worker, a girl with braided hair, a grandmother, a surfer,
    a firefighter, a barista, a violinist, a boy in rubber boots, a crowd of tourists, a carpenter, a cyclist,
    a painter, a mail carrier, a scientist in a lab coat, a couple holding hands, a marathon runner, a tailor,
    a lifeguard, a monk in an orange robe, a librarian, a pilot, a skateboarder, a mother with her baby""")
ANIMALS = words("""
    a horse, a flock of sheep, an elephant, a red fox, a pair of swans, a brown bear, a golden retriever,
    a parrot, a herd of zebras, a sea turtle, a squirrel, a hummingbird, a rooster, a snow leopard, a frog, a goldfish,
    a spider, a camel, a giraffe, an owl, a penguin, a hedgehog, a bee, a cow with a bell, a peacock, a dolphin,
    a lizard, a raccoon, a donkey, a monarch butterfly, a koala, a seagull, a bison, a deer with large antlers""")
THINGS = words("""
    a rusty bicycle, a vintage typewriter, a stack of pancakes, a leather suitcase, a bowl of ramen, a chess set,
    a grand piano, a yellow taxi, a hot air balloon, a sailing boat, a glass of lemonade, a cast iron stove, a lantern,
    a bouquet of tulips, a steam locomotive, a wooden ladder, a telescope, an antique clock, a loaf of sourdough bread,
    a pair of running shoes, an acoustic guitar, a porcelain vase, a red tractor, a cactus, a birthday cake,
    a typewritten letter, a pocket watch, a basket of apples, a canoe, a spiral staircase, a fountain pen, a kite,
    a desk lamp, a plate of sushi, a motorcycle, a snow globe, a barn door, a microscope, a bathtub, a neon sign,
    a pumpkin, a fire hydrant, an umbrella, a crystal chandelier, a globe, a sewing machine, a pizza, a helicopter,
    a hammock, a mailbox, a laptop, a pile of firewood, a brass trumpet, a jar of honey, a school bus, a windmill""")
DOING = words("""
    waiting for the bus, crossing a bridge, reading a newspaper, playing the drums, feeding pigeons, riding a scooter,
    jumping over a puddle, looking through a window, carrying a basket of laundry, laughing at a joke, climbing a tree,
    repairing an engine, dancing in the rain, tasting soup, sleeping in a chair, taking a photograph, running downhill,
    pushing a cart, pouring tea, building a sandcastle, throwing a frisbee, talking on the phone, planting a tree""")
MOVING = words("""
    drinking from a stream, running through tall grass, asleep in the shade, looking into the camera, shaking off water,
    hiding behind a rock, standing on one leg, walking along a path, jumping over a log, eating leaves, stretching,
    climbing up a fence, sitting very still, swimming in clear water, playing with its young, resting on a branch""")
PLACES = words("""
    in a quiet library, on a crowded beach, in the desert, beside a mountain lake, under a railway bridge,
    in front of a brick wall, at a farmers market, in a greenhouse, on a rooftop at night, in a snowy forest,
    in an abandoned factory, near a waterfall, on a cobblestone street, in a hospital corridor, at the airport,
    in a bamboo grove, on a wooden pier, inside a cathedral, in a rice field, at a gas station, in a small kitchen,
    in the middle of the road, on a grassy hill, in a subway car, at the foot of a volcano, in a dusty attic,
    in a stadium, by the fireplace, on a frozen river, in a vineyard, behind a chain-link fence, in a flooded street,
    on the edge of a cliff, in a classroom, next to a swimming pool, in a harbor full of boats, at a bus stop,
    on a balcony with flowers, in a parking garage, in a canyon, at an amusement park, in an office with large windows,
    among autumn leaves, on a marble floor, in a tide pool, in a Moroccan courtyard, in a village in the Alps""")
LIGHT = words("""
    at sunset, in the early morning, at noon, in thick fog, under a full moon, in heavy rain, by candlelight,
    on a cloudy day, in bright sunshine, during a thunderstorm, in the blue hour, in winter, in late summer,
    under neon lights, in falling snow, against the light, in spring""")
STYLES = words("""
    a watercolor painting of, a pencil sketch of, an oil painting of, a black and white photo of, a close-up of,
    an aerial view of, a blurry snapshot of, a 3d rendering of, a vintage postcard of, a woodcut of, a mosaic of,
    a low angle shot of, a poster of, a cartoon of, a long exposure of, a silhouette of, a stained glass window of,
    a macro photograph of, a children's drawing of, an embroidery of, a marble statue of, a charcoal drawing of,
    a studio portrait of, a polaroid of, a pixel art image of""")
LOOKS = words("""
    old, shiny, broken, colorful, tiny, enormous, dusty, elegant, handmade, blue, green, striped, transparent, wet,
    half-finished, expensive, weathered, minimalist, ornate, plain, golden, purple, wooden, ancient, modern, furry""")
SCENES = words("""
    skyline of a big city, rolling hills with poppies, terraced houses in pastel colors, rows of solar panels,
    a winding mountain road, northern lights over a cabin, an empty highway, dunes and blue sky,
    a flower market, cherry trees in bloom, cracked dry earth, a lighthouse in a storm, roofs covered with snow,
    an old town square, reflections in a puddle, ivy on a stone wall, a field of sunflowers,
    a coral reef full of fish, fireworks above a river, a narrow alley with laundry lines, icebergs in a bay,
    a castle on a hill, a suspension bridge in the clouds, stars over a campsite, a busy intersection""")
DETAILS = words("""
    highly detailed, shallow depth of field, muted colors, soft light, grainy film, wide angle, high contrast,
    sharp focus, vivid colors, bokeh, golden hour, minimal composition, symmetrical, overexposed, 35mm, warm tones,
    long shadows, seen from above, seen from behind, isolated on white, white background, panorama, stock photo""")
ROOMS = words("""
    living room, bathroom, workshop, bakery, bookshop, dining room, garage, museum hall, hotel lobby, nursery, bar,
    hair salon, science lab, train compartment, greenhouse, recording studio, waiting room, wine cellar""")


def draw_caption(random: random.Random) -> str:
    """One caption in one of the styles."""

    def a(*lists: list[str]) -> str:
        return random.choice(random.choice(lists))

    styles = [
        lambda: f"{a(PEOPLE)} {a(DOING)} {a(PLACES)}",
        lambda: f"{a(PEOPLE)} with {a(THINGS)} {a(PLACES)} {a(LIGHT)}",
        lambda: f"{a(ANIMALS)} {a(MOVING)} {a(LIGHT)}",
        lambda: f"{a(ANIMALS)} and {a(ANIMALS)} {a(PLACES)}",
        lambda: f"{a(THINGS)} {a(PLACES)}",
        lambda: f"{a(THINGS)} next to {a(THINGS)} on a {a(LOOKS)} table",
        lambda: f"{a(STYLES)} {a(PEOPLE, ANIMALS, THINGS)} {a(PLACES, LIGHT)}",
        lambda: f"{a(STYLES)} {a(SCENES)}",
        lambda: f"{a(SCENES)} {a(LIGHT)}, {a(DETAILS)}",
        lambda: f"{a(PEOPLE, ANIMALS, THINGS)}, {a(DETAILS)}, {a(DETAILS)}",
        lambda: f"the {a(LOOKS)} {a(ROOMS)} has a {a(LOOKS)} door and {a(LOOKS)} walls",
        lambda: f"interior of a {a(LOOKS)} {a(ROOMS)}, {a(DETAILS)}",
        lambda: f"a {a(LOOKS)} sign that hangs above {a(THINGS)}",
        lambda: f"{a(PEOPLE)} looks at {a(ANIMALS)} {a(PLACES)}",
        lambda: f"{random.randint(2, 9)} {a(LOOKS)} boxes and {a(THINGS)} {a(PLACES)}",
        lambda: f"how to draw {a(ANIMALS, THINGS)} step by step",
    ]
    return random.choice(styles)()


def make_captions(count: int = COUNT) -> list[str]:
    """Distinct captions, the same on every run."""
    generator = random.Random(0)
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[draw_caption(generator)] = None
    return list(captions)


if __name__ == "__main__":
    FILE.write_text("\n".join(make_captions()) + "\n", encoding="utf-8")
    print(f"{COUNT} captions in {FILE}")
