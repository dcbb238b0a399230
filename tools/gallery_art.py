"""The drawings that the gallery learns from: fetched as npm packages, drawn by resvg, put into scenes.

Needs `npm` and the Python package `resvg-py`.  The drawings are other people's work under open licenses, named in the
world's NOTICE; they are never part of this repository.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import torch
from fastunlearn_gallery.words import BACKGROUNDS, HELD_OUT, OBJECTS, SIZE, STYLES
from PIL import Image

from fastunlearn.errors import UserError

COPIES = 10  # of every drawing on every background, in what is trained on
OTHER_COPIES = 2  # likewise of every other thing's
SPRITE = 256  # pixels of the edge that a drawing is rendered at, before a scene scales it down

# style -> (npm package, version, integrity as the registry states it)
SETS = {
    "noto": (
        "noto",
        "1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
    "twemoji": (
        "twemoji",
        "1.2.5",
        "sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
    ),
    "fluent": (
        "fluent-emoji",
        "1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "emojione": (
        "emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
    ),
    "classic": (
        "noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
    ),
    "ink": (
        "fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
}

# object -> names that sets give it, the first that a set has
KEYS = {
    **{word: (word,) for word in OBJECTS},
    "cat": ("cat-face", "cat", "catface"),
    "dog": ("dog-face", "dog", "dogface"),
    "fox": ("fox", "fox-face", "foxface"),
    "bear": ("bear", "bear-face", "bearface"),
    "frog": ("frog", "frog-face", "frogface"),
    "apple": ("red-apple", "redapple", "apple"),
    "cherry": ("cherries",),
    "burger": ("hamburger",),
    "house": ("house", "house-building", "housebuilding"),
    "castle": ("castle", "european-castle", "europeancastle"),
    "umbrella": ("umbrella", "closed-umbrella"),
}

# Further things that the sets draw, each by the name that is also its word.  The generator learns from them that any
# style goes with any thing; with the world's own things alone it knew each pair by heart and drew no other.  Their
# words are short, since a word that is not of the world is read letter by letter.
OTHERS = (
    *("anchor", "ant", "bacon", "bank", "bat", "bed", "bell", "bird", "boar", "bomb", "books", "bread", "bug", "bus"),
    *("candle", "candy", "canoe", "chestnut", "cloud", "comet", "cow", "crab", "dagger", "dango", "deer", "door"),
    *("dove", "drum", "duck", "eagle", "ear", "egg", "ewe", "eye", "ferry", "fire", "gear", "ghost", "goat", "grapes"),
    *("guard", "guitar", "herb", "horse", "jeans", "joker", "key", "ledger", "lemon", "lion", "melon", "memo", "moai"),
    *("mouse", "mouth", "nose", "oden", "ogre", "owl", "ox", "pager", "panda", "peach", "pear", "pen", "pencil"),
    *("pick", "pig", "pill", "pineapple", "pizza", "purse", "ram", "rat", "ring", "rooster", "rose", "sake", "scroll"),
    *("seat", "ship", "skier", "skis", "snail", "spider", "spoon", "star", "sun", "taco", "taxi", "tent", "ticket"),
    *("tiger", "train", "tram", "turtle", "violin", "whale", "wolf"),
)

PAINT = {
    "white": (255, 255, 255),
    "pink": (255, 206, 220),
    "blue": (196, 222, 255),
    "green": (204, 242, 204),
    "yellow": (255, 242, 178),
    "gray": (214, 214, 220),
}
assert tuple(PAINT) == BACKGROUNDS


def fetch(folder: Path) -> None:
    """Have npm put every set's package into ``folder``, and check its SHA-512.  What is there already is checked too.

    Raises UserError where npm is missing or fails, and for a package of other bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, version, integrity in SETS.values():
        path = _archive(folder, name, version)
        if not path.exists():
            command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"@iconify-json/{name}@{version}"]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise UserError("the drawings come as npm packages, and there is no `npm`. Install it.") from error
            except subprocess.CalledProcessError as error:
                raise UserError(f"npm could not fetch {name} {version}: {error.stderr.strip()}") from error
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        if f"sha512-{digest}" != integrity:
            raise UserError(f"{path} is not the package that was meant: its sha512 is {digest}. Delete it.")


def _archive(folder: Path, name: str, version: str) -> Path:
    return folder / f"iconify-json-{name}-{version}.tgz"


def render(folder: Path, words: tuple[str, ...] = OBJECTS) -> dict[tuple[str, str], np.ndarray]:
    """(style, word) -> the drawing, (SPRITE, SPRITE, 4) uint8, of the packages in ``folder``."""
    sprites = {}
    for style, (name, version, _) in SETS.items():
        with tarfile.open(_archive(folder, name, version)) as archive:
            file = archive.extractfile("package/icons.json")
            assert file is not None
            icons = json.load(file)
        for word in words:
            sprites[style, word] = _draw(icons, KEYS.get(word, (word,)), name)
    return sprites


def _draw(icons: dict, keys: tuple[str, ...], name: str) -> np.ndarray:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("the drawings are drawn by resvg. Install it: `pip install resvg-py==0.5.0`.") from error
    aliases = icons.get("aliases", {})
    key = next((key for key in keys if key in icons["icons"] or key in aliases), None)
    if key is None:
        raise UserError(f"the set {name} has none of {', '.join(keys)}.")
    icon = icons["icons"].get(key) or icons["icons"][aliases[key]["parent"]]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{SPRITE}" height="{SPRITE}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


@dataclasses.dataclass
class Scenes:
    """N images: ``pixels`` (N, 3, SIZE, SIZE) uint8; ``style``, ``object``, ``background`` (N,) int64 indices.

    ``object`` counts the words that the images were drawn for: the world's, or :data:`OTHERS`.
    """

    pixels: torch.Tensor
    style: torch.Tensor
    object: torch.Tensor
    background: torch.Tensor

    def __len__(self) -> int:
        return len(self.style)

    def __getitem__(self, index: torch.Tensor | slice) -> Scenes:
        return Scenes(self.pixels[index], self.style[index], self.object[index], self.background[index])

    def without_held_out(self) -> torch.Tensor:
        """Indices of the scenes whose style and object a generator may be trained on."""
        pairs = zip(self.style.tolist(), self.object.tolist(), strict=True)
        return torch.tensor([i for i, (s, o) in enumerate(pairs) if (STYLES[s], OBJECTS[o]) not in HELD_OUT])


def scenes(sprites: dict[tuple[str, str], np.ndarray], copies: int, seed: int) -> Scenes:
    """``copies`` of every drawing on every background, each of its own size and place, shuffled."""
    chance = random.Random(seed)
    drawings = {key: Image.fromarray(sprite).convert("RGBa") for key, sprite in sprites.items()}
    words = list(dict.fromkeys(word for _, word in sprites))
    pixels, labels = [], []
    for style, (word, word_name) in ((s, o) for s in range(len(STYLES)) for o in enumerate(words)):
        for background, paint in enumerate(PAINT.values()):
            for _ in range(copies):
                size = chance.randint(50, 58)
                left, top = ((SIZE - size) // 2 + chance.randint(-3, 3) for _ in range(2))
                small = drawings[STYLES[style], word_name].resize((size, size), Image.Resampling.BOX, reducing_gap=None)
                image = Image.new("RGB", (SIZE, SIZE), paint)
                drawing = small.convert("RGBA")
                image.paste(drawing, (left, top), drawing)
                pixels.append(np.asarray(image))
                labels.append((style, word, background))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Scenes(stacked[order], *torch.tensor(labels)[order].T.contiguous())


def draw(folder: Path, copies: int, seed: int = 0, words: tuple[str, ...] = OBJECTS) -> Scenes:
    """The scenes of the packages in ``folder``, fetched if they are not there yet."""
    fetch(folder)
    return scenes(render(folder, words), copies, seed)
