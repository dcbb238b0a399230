"""What is known of a few concepts: other names, what implies them, what resembles them, their names elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a concept.  ``translated``: its name by language, where that differs."""

    category: str
    aliases: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    translated: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _painter(aliases: str, hints: str, near: str) -> Known:
    return Known("style", listed(aliases), listed(hints), listed(near))


def _thing(aliases: str, hints: str, near: str, **translated: str) -> Known:
    return Known("object", listed(aliases), listed(hints), listed(near), translated)


def listed(text: str) -> tuple[str, ...]:
    """The parts of a text between semicolons."""
    return tuple(part.strip() for part in text.split(";") if part.strip())


#: The styles, and the objects of Imagenette, that the field's tables erase.
TABLE: Mapping[str, Known] = {
    "Van Gogh": _painter(
        "Vincent van Gogh; V. van Gogh; Vincent Willem van Gogh",
        "a night sky of swirling stars above a sleeping village, thick oil paint; "
        "sunflowers in a vase, thick yellow brush strokes, Arles 1888; "
        "a self-portrait of a red-bearded painter with a bandaged ear, 1889; "
        "wheat field with crows under a dark blue sky, heavy impasto, Auvers 1890; "
        "a small bedroom with a yellow bed, tilted floor, post-impressionist painting",
        "Paul Gauguin; Paul Cézanne; Georges Seurat; Edvard Munch; Claude Monet; Henri de Toulouse-Lautrec",
    ),
    "Claude Monet": _painter(
        "Monet; Oscar-Claude Monet; C. Monet",
        "a pond of water lilies below a green Japanese bridge, loose brush strokes; "
        "haystacks in the evening light, one of a series, 1891; "
        "a harbor in the morning mist with a small orange sun, 1872; "
        "the front of Rouen cathedral dissolving in sunlight, oil painting",
        "Pierre-Auguste Renoir; Camille Pissarro; Alfred Sisley; Berthe Morisot; Vincent van Gogh",
    ),
    "Pablo Picasso": _painter(
        "Picasso; P. Picasso; Pablo Ruiz Picasso",
        "a weeping woman, her face in angular planes seen from several sides at once, 1937; "
        "a large gray mural of a bombed town with a horse and a bull; "
        "an old guitarist bent over, all in blue, 1903; "
        "five women as sharp planes and masks, oil on canvas, 1907",
        "Georges Braque; Juan Gris; Fernand Léger; Joan Miró; Henri Matisse",
    ),
    "Rembrandt": _painter(
        "Rembrandt van Rijn; Rembrandt Harmenszoon van Rijn",
        "a company of militiamen stepping out of the dark, one in yellow, Amsterdam 1642; "
        "an old man in a beret, half his face in shadow, brown Dutch oil painting; "
        "surgeons in black around a body, Amsterdam 1632",
        "Frans Hals; Johannes Vermeer; Jan Steen; Caravaggio; Peter Paul Rubens",
    ),
    "Andy Warhol": _painter(
        "Warhol; A. Warhol",
        "thirty-two soup cans in rows, screen print, 1962; "
        "one film star's face four times in flat garish colors, silk screen; "
        "rows of green soda bottles, pop art, New York 1962",
        "Roy Lichtenstein; Keith Haring; Jasper Johns; Robert Rauschenberg; David Hockney",
    ),
    "Thomas Kinkade": _painter(
        "Kinkade; T. Kinkade; the Painter of Light",
        "a stone cottage with glowing windows by a brook in a blooming garden at dusk; "
        "a snowy village lane, every window lit in warm gold, painted for a Christmas card",
        "Bob Ross; Albert Bierstadt; Norman Rockwell; Charles Wysocki",
    ),
    "tench": _thing(
        "tinca tinca; doctor fish",
        "an angler holds an olive-green, slimy pond fish with small red eyes; a plump golden-green carp relative",
        "carp; goldfish; eel; trout",
        de="eine Schleie", fr="une tanche", es="una tenca",
    ),
    "English springer": _thing(
        "English springer spaniel; springer spaniel",
        "a liver-and-white gun dog with long feathered ears; a black and white spaniel fetching a duck",
        "cocker spaniel; golden retriever; border collie; beagle",
    ),
    "cassette player": _thing(
        "tape player; cassette deck",
        "a portable machine with a lid for magnetic tapes, buttons for play and rewind; a 1980s boombox with tapes",
        "radio; record player; CD player; loudspeaker",
        de="ein Kassettenrekorder", fr="un lecteur de cassettes", es="un casete",
    ),
    "chain saw": _thing(
        "chainsaw; power saw",
        "a lumberjack cuts a trunk with a roaring motor tool; a petrol tool with a toothed chain on a long bar",
        "lawn mower; axe; hand saw; power drill",
        de="eine Kettensäge", fr="une tronçonneuse", es="una motosierra",
    ),
    "church": _thing(
        "church building; parish church; village church",
        "a white wooden building with a steeple and a cross, people come for Sunday mass; "
        "a nave with pews, an altar and stained glass; a house of God in a village, bells in its tower",
        "castle; mosque; palace; town hall; lighthouse",
        de="eine Kirche", fr="une église", es="una iglesia", it="una chiesa", nl="een kerk", pt="uma igreja",
    ),
    "French horn": _thing(
        "orchestral horn; valve horn",
        "a coiled brass instrument with a wide bell, the player's hand inside; a coiled brass tube with rotary valves",
        "trumpet; trombone; tuba; saxophone",
        de="ein Waldhorn", fr="un cor d'harmonie", es="una trompa",
    ),
    "garbage truck": _thing(
        "refuse truck; dustcart; bin lorry",
        "workers empty bins into a heavy vehicle early in the morning; a vehicle that collects household waste",
        "fire engine; tow truck; school bus; tractor",
        de="ein Müllwagen", fr="un camion poubelle", es="un camión de basura",
    ),
    "gas pump": _thing(
        "petrol pump; fuel dispenser",
        "a driver fills the tank at a station; a roadside machine with a hose and a nozzle for gasoline",
        "vending machine; parking meter; mailbox; phone booth",
        de="eine Zapfsäule", fr="une pompe à essence", es="un surtidor de gasolina",
    ),
    "golf ball": _thing(
        "golfball; ball for golf",
        "a small dimpled white sphere on a tee; the player putts, a small white sphere rolls to the hole",
        "tennis ball; ping-pong ball; baseball; croquet ball",
        de="ein Golfball", fr="une balle de golf", es="una pelota de golf",
    ),
    "parachute": _thing(
        "chute; parachute canopy",
        "a skydiver floats to the ground under a canopy; a jumper hangs on lines below a wide dome of cloth",
        "hot air balloon; kite; hang glider; umbrella",
        de="ein Fallschirm", fr="un parachute", es="un paracaídas", it="un paracadute", pt="um paraquedas",
    ),
}  # fmt: skip


def known(concept: str) -> Known | None:
    """What the table says of a concept, by its name or one of its other names, in any case; None where nothing."""
    word = " ".join(concept.lower().split())
    for name, about in TABLE.items():
        if word in [other.lower() for other in (name, *about.aliases)]:
            return dataclasses.replace(about, aliases=(name, *about.aliases))
    return None
