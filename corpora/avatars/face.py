"""Draws the avatars' faces from an expression and a mouth opening for every frame.

An expression has one weight per emotion, from 0 (not visible) to 1 (full). Brows, lids and mouth move in proportion
to the weights, so blends, weak traces and slow changes are possible.
"""

import numpy as np
from PIL import Image, ImageDraw


SIZE = 96  # width and height in pixels
_ZOOM = 2  # pictures are drawn larger and scaled down, for smooth edges

# How far each emotion moves each part, in the order joy, sadness, anger, surprise.
_MOVES = {
    "corners": (1.0, -1.0, -0.35, 0.0),  # of the mouth, upwards
    "width": (0.8, -0.3, -0.4, -1.0),
    "jaw": (0.15, 0.0, 0.0, 1.0),  # downwards
    "brows": (0.1, 0.15, -0.7, 1.0),  # upwards
    "slant": (0.0, 1.0, -1.0, 0.0),  # inner ends of the brows, upwards
    "lids": (-0.3, -0.5, -0.45, 0.8),  # upwards
}


def random_look(rng: np.random.Generator) -> dict[str, object]:
    """A random identity: colours and proportions."""
    skins = ((255, 219, 190), (241, 194, 150), (224, 172, 120), (176, 122, 82), (124, 80, 52))
    skin = np.array(skins[rng.integers(5)]) + rng.integers(-10, 11, 3)
    return {
        "skin": tuple(np.clip(skin, 0, 255).tolist()),
        "hair": tuple(rng.integers(20, 170, 3).tolist()),
        "shirt": tuple(rng.integers(30, 220, 3).tolist()),
        "iris": tuple(rng.integers(20, 110, 3).tolist()),
        "fringe": float(rng.uniform(0.5, 0.72)),  # where the hair ends, in head heights above the centre
        "width": float(rng.uniform(0.86, 1.02)),
        "height": float(rng.uniform(0.93, 1.05)),
        "eye_distance": float(rng.uniform(0.36, 0.43)),
        "eye_size": float(rng.uniform(0.9, 1.12)),
        "brow_weight": int(rng.integers(5, 8)),
        "nose": float(rng.uniform(0.14, 0.22)),
    }


def random_setting(rng: np.random.Generator, frames: int, undisturbed: range) -> dict[str, object]:
    """The random setting of a clip: background, position, size and motion of the head, and blinks.

    No blink overlaps the `undisturbed` frames.
    """
    background = Image.new("RGB", (SIZE * _ZOOM, SIZE * _ZOOM), tuple(rng.integers(60, 230, 3).tolist()))
    canvas = ImageDraw.Draw(background)
    for _ in range(3):
        x, y, radius = rng.integers(0, SIZE * _ZOOM, 2).tolist() + [int(rng.integers(15, 50))]
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(rng.integers(60, 230, 3).tolist()))
    time = np.arange(frames) / 25
    sway = rng.uniform(0.2, 1.0, (4, 1)) * np.sin(  # (4, T): right, down, turn, roll
        2 * np.pi * (rng.uniform(0.2, 0.7, (4, 1)) * time + rng.uniform(0, 1, (4, 1)))
    )
    blink = np.ones(frames)
    for start in np.cumsum(rng.integers(12, 45, 4)):
        if start < frames and not set(range(start - 1, start + 4)) & set(undisturbed):
            blink[start : start + 3] = (0.35, 0.0, 0.35)[: frames - start]
    offset = rng.uniform(-7, 7, 2)
    return {
        "background": background,
        "x": offset[0] + 5 * sway[0],
        "y": offset[1] + 4 * sway[1],
        "turn": 0.06 * sway[2],  # shift of the facial features, in head widths
        "roll": 0.07 * sway[3],  # radians
        "size": float(rng.uniform(0.92, 1.06)),
        "blink": blink,
    }


def draw(look: dict, setting: dict, weights: np.ndarray, opening: np.ndarray) -> list[Image.Image]:
    """Draw T pictures of `SIZE` x `SIZE` pixels.

    Args:
        look: identity, see `random_look`.
        setting: see `random_setting`.
        weights: expression, (T, 4).
        opening: opening of the mouth by speech, (T,), 0 to 1.
    """
    parts = {part: weights @ np.array(moves) for part, moves in _MOVES.items()}  # (T,) each
    parts["jaw"] = 0.3 * opening + parts["jaw"]
    parts["lids"] = (1 + 0.6 * parts["lids"]).clip(0.3) * setting["blink"]
    return [
        _frame(
            look,
            setting["background"].copy(),
            setting["size"],
            *(float(setting[name][frame]) for name in ("x", "y", "turn", "roll")),
            **{part: float(values[frame]) for part, values in parts.items()},
        )
        for frame in range(len(weights))
    ]


def _frame(look, image, size, x, y, turn, roll, corners, width, jaw, brows, slant, lids) -> Image.Image:
    """Draw one picture; `turn` moves the facial features sideways, `roll` tilts them."""
    canvas = ImageDraw.Draw(image)
    centre_x, centre_y = SIZE + x, SIZE + 6 + y
    half_width, half_height = 60 * size * look["width"], 72 * size * look["height"]
    cosine, sine = np.cos(roll), np.sin(roll)

    def place(right: float, down: float) -> tuple[float, float]:
        """Convert head coordinates (half widths and half heights from the centre) to pixels."""
        right, down = (right + turn) * half_width, down * half_height
        return centre_x + right * cosine - down * sine, centre_y + right * sine + down * cosine

    def disc(right, down, radius_x, radius_y, fill):
        at_x, at_y = place(right, down)
        canvas.ellipse((at_x - radius_x, at_y - radius_y, at_x + radius_x, at_y + radius_y), fill=fill)

    canvas.ellipse((centre_x - 80, centre_y + 52, centre_x + 80, centre_y + 170), fill=look["shirt"])
    head = (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height)
    canvas.ellipse((head[0] - 6, head[1] - 8, head[2] + 6, head[3] - 30), fill=look["hair"])
    canvas.ellipse(head, fill=look["skin"])
    fringe = 180 / np.pi * np.arcsin(look["fringe"])
    canvas.chord(head, 180 + fringe, 360 - fringe, fill=look["hair"])

    radius = 0.17 * half_width * look["eye_size"]
    for side in (-1, 1):
        eye = side * look["eye_distance"]
        height = max(1.5, 0.75 * radius * lids)
        disc(eye, -0.14, radius, height, (250, 250, 250))
        disc(eye, -0.14, 0.55 * radius, min(0.55 * radius, height), look["iris"])
        lift = 0.44 + 0.13 * brows
        inner, outer = place(eye - side * 0.2, -lift - 0.1 * slant), place(eye + side * 0.2, -lift + 0.08 * slant)
        canvas.line((inner, outer), fill=tuple(channel // 2 for channel in look["hair"]), width=look["brow_weight"])
    shade = tuple(channel * 3 // 4 for channel in look["skin"])
    canvas.line((place(0, 0.04), place(0.04, look["nose"]), place(-0.04, look["nose"])), fill=shade, width=3)

    reach, gap = 0.36 + 0.11 * width, 0.02 + 0.17 * max(jaw, 0.0)
    corner, middle = 0.52 - 0.09 * corners, 0.52 + 0.09 * corners
    steps = np.linspace(-1, 1, 9)
    arch = 1 - steps**2
    upper = [place(reach * s, corner + (middle - corner - 0.7 * gap) * a) for s, a in zip(steps, arch, strict=True)]
    lower = [place(reach * s, corner + (middle - corner + 1.3 * gap) * a) for s, a in zip(steps, arch, strict=True)]
    canvas.polygon(upper + lower[::-1], fill=(70, 15, 25))
    canvas.line(upper + lower[::-1] + upper[:1], fill=(175, 60, 70), width=4)
    return image.reduce(_ZOOM)
