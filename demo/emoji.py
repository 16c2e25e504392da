"""Write the emoji of Noto Color Emoji as images in a folder for each group of Unicode: a small colour set of real data.

    python -m demo.emoji --out emoji --size 32

Both files that it reads come with packages of Debian and Ubuntu: apt-get install fonts-noto-color-emoji unicode-data.
The font is under the SIL Open Font License 1.1. Emoji that differ by the tone of the skin only are left out.
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from pydantic import Field

from vca_engine.config.cli import parse, report_errors
from vca_engine.config.reading import FilePath, Strict
from vca_engine.images import on_white

LINE = re.compile(r"([0-9A-F ]+?) *; fully-qualified +# \S+ E[\d.]+ (.+)")  # of emoji-test.txt
PRESENTATION = 0xFE0F  # asks for colour, and has no picture of its own
TONES = range(0x1F3FB, 0x1F400)  # of the skin


@dataclass(frozen=True)
class EmojiArguments(Strict):
    """The set to write.

    Args:
        out: Folder to make.
        size: Side of the square images; those of the font have 136x128 pixels.
        font: Noto Color Emoji with bitmaps, as Debian packages it.
        groups: Unicode's list of emoji by group, emoji-test.txt.
    """

    out: FilePath
    size: Annotated[int, Field(ge=8, le=512)] = 64
    font: FilePath = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    groups: FilePath = "/usr/share/unicode/emoji/emoji-test.txt"


@report_errors("demo.emoji")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv`, by default that of the process."""
    args = parse(EmojiArguments, argv, prog="python -m demo.emoji", description=__doc__)
    for option, package in (("font", "fonts-noto-color-emoji"), ("groups", "unicode-data")):
        if not Path(file := getattr(args, option)).is_file():
            raise FileNotFoundError(
                f"--{option} {file!r} is not there; it comes with Debian's package {package}: apt-get install {package}"
            )
    if find_spec("fontTools") is None:
        raise ValueError("python -m demo.emoji needs the package fonttools; run: pip install fonttools")
    out, font, counts = Path(args.out), BitmapFont(args.font), {}
    if out.exists():
        raise ValueError(f"--out {args.out!r} is there already; name a new folder, or remove it.")
    for group, points, name in emoji_of(Path(args.groups)):
        if (picture := font.picture(points)) is not None:
            folder, counts[group] = out / group, counts.get(group, 0) + 1
            folder.mkdir(parents=True, exist_ok=True)
            words = re.findall(r"\w+", name.lower())
            square(picture, args.size).save(folder / f"{'-'.join([*words, f'{points[0]:x}'])}.png")
    if not counts:
        raise ValueError(f"{args.font!r} has no picture of the emoji in {args.groups!r}; is it Noto Color Emoji?")
    listed = ", ".join(f"{group} {num}" for group, num in counts.items())
    print(f"wrote {sum(counts.values()):,} images of {args.size}x{args.size} pixels to {args.out}: {listed}")


def emoji_of(file: Path) -> Iterator[tuple[str, list[int], str]]:
    """Read emoji-test.txt: the first word of the group, the code points and the name of each emoji of one skin tone."""
    group = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.split()[2].lower()
        elif found := LINE.match(line):
            points = [int(point, 16) for point in found[1].split()]
            if not {*points} & {*TONES}:
                yield group, points, found[2]


class BitmapFont:
    """The coloured bitmaps of a font, which has one glyph for each emoji, also for one of several code points.

    Args:
        path: A TrueType file with a table CBDT.

    Raises:
        ValueError: It has none.
    """

    def __init__(self, path: str) -> None:
        from fontTools.ttLib import TTFont, TTLibError  # an optional package

        try:
            font = TTFont(path)
        except TTLibError as error:
            raise ValueError(f"{path!r} is no TrueType font: {error}.") from None
        if "CBDT" not in font:
            raise ValueError(
                f"{path!r} has no coloured bitmaps (CBDT); take the file of Debian's package fonts-noto-color-emoji."
            )
        self.names: dict[int, str] = font.getBestCmap()
        self.bitmaps: dict[str, Any] = font["CBDT"].strikeData[0]
        self.ligatures: dict[tuple[str, ...], str] = {}
        for lookup in font["GSUB"].table.LookupList.Lookup:
            tables = [getattr(table, "ExtSubTable", table) for table in lookup.SubTable]
            for first, ligatures in ((f, ls) for t in tables for f, ls in getattr(t, "ligatures", {}).items()):
                for ligature in ligatures:
                    self.ligatures[(first, *ligature.Component)] = ligature.LigGlyph

    def picture(self, points: Sequence[int]) -> Image.Image | None:
        """Give the picture of an emoji of these code points, RGBA; None if the font has none."""
        glyphs = tuple(self.names.get(point, "") for point in points if point != PRESENTATION)
        name = glyphs[0] if len(glyphs) == 1 else self.ligatures.get(glyphs, "")
        if name not in self.bitmaps:
            return None
        return Image.open(io.BytesIO(self.bitmaps[name].imageData)).convert("RGBA")


def square(picture: Image.Image, size: int) -> Image.Image:
    """Put a picture into the middle of a white square, of size x size pixels, RGB."""
    side = max(picture.size)
    canvas = Image.new("RGBA", (side, side), "white")
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture)
    return on_white(canvas).resize((size, size), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
