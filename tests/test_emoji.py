"""The colour set of the demo, from what two packages of Debian hold."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import emoji

FONT, GROUPS = Path(emoji.EmojiArguments.font), Path(emoji.EmojiArguments.groups)
LIST = """\
# group: Smileys & Emotion
1F600                          ; fully-qualified     # \U0001f600 E1.0 grinning face
263A                           ; unqualified         # \u263a E0.6 smiling face
# group: People & Body
1F44B                          ; fully-qualified     # \U0001f44b E0.6 waving hand
1F44B 1F3FB                    ; fully-qualified     # \U0001f44b\U0001f3fb E1.0 waving hand: light skin tone
1F1EB 1F1F7                    ; fully-qualified     # x E2.0 flag: France
"""


def test_the_groups_of_unicode_without_tones_of_the_skin(tmp_path):
    (tmp_path / "list.txt").write_text(LIST, encoding="utf-8")
    assert list(emoji.emoji_of(tmp_path / "list.txt")) == [
        ("smileys", [0x1F600], "grinning face"),
        ("people", [0x1F44B], "waving hand"),
        ("people", [0x1F1EB, 0x1F1F7], "flag: France"),
    ]


def test_a_picture_lies_in_the_middle_of_a_white_square():
    wide = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    pixels = np.asarray(emoji.square(wide, 40))
    assert (pixels[:10] == 255).all()
    assert (pixels[30:] == 255).all()
    assert (pixels[10:30] == (255, 0, 0)).all()


def test_what_is_missing_is_said_with_the_package_that_has_it(tmp_path, capsys):
    (tmp_path / "list.txt").write_text(LIST, encoding="utf-8")
    (tmp_path / "font.ttf").write_bytes(b"no font")
    given = {"--font": tmp_path / "none.ttf", "--groups": tmp_path / "list.txt"}
    for option, file, said in (
        ("--font", "none.ttf", "Debian's package fonts-noto-color-emoji: apt-get install fonts-noto-color-emoji"),
        ("--font", "font.ttf", "font.ttf' is no TrueType font"),
    ):
        words = [*map(str, (word for pair in {**given, option: tmp_path / file}.items() for word in pair))]
        with pytest.raises(SystemExit):
            emoji.main(["--out", str(tmp_path / "out"), *words])
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not (FONT.is_file() and GROUPS.is_file()), reason="fonts-noto-color-emoji and unicode-data")
def test_the_set_of_the_packages(tmp_path, capsys):
    emoji.main(["--out", str(tmp_path / "out"), "--size", "16"])
    assert len(list((tmp_path / "out").glob("*/*.png"))) > 1500
    assert {"smileys", "people", "animals", "food", "flags"} <= {folder.name for folder in (tmp_path / "out").iterdir()}
