"""Running steps in tests, and prose in two languages that every quality rule lets through."""

from collections import Counter

from megalite.config.schema_data import CleanStepConfig
from megalite.data_tools.cleaning import build_cleaner


def run(text: str, *steps, language: str = "") -> tuple[str | None, dict[str, int]]:
    """What steps, each a name or (name, options), make of a text, and their counts."""
    configs = [
        CleanStepConfig(step=s) if isinstance(s, str) else CleanStepConfig(step=s[0], options=s[1]) for s in steps
    ]
    counts: Counter[str] = Counter()
    return build_cleaner(configs).clean(text, language, counts), dict(counts)


def reason(text: str, name: str, language: str = "", **options) -> str | None:
    """Why a step drops a text, or None."""
    result, counts = run(text, (name, options), language=language)
    dropped = [key for key in counts if ": dropped (" in key]
    assert (result is None) == bool(dropped)
    return dropped[0].removeprefix(f"{name}: dropped (").removesuffix(")") if dropped else None


ENGLISH = """\
The harbour was quiet when the last of the fishing boats came in, and the men who worked on the quay had already gone
home to their suppers. A thin rain was falling over the roofs of the town. From the window of the inn one could see the
lamps along the sea wall, and beyond them the dark water that never quite stopped moving.

Margaret put down her book and listened. Somebody was walking slowly up the stairs, stopping at every landing as if to
count the doors. She did not expect a visitor at this hour, with the ferry long since tied up for the night! Was it the
doctor again?

It was not the doctor. The man who stood in the passage carried a small wooden box under his arm, and he looked at her
with the tired patience of someone who has come a very long way to deliver bad news.
"""

CHINESE = """\
傍晚的时候，最后一条渔船回到了港口，码头上的工人已经回家吃饭去了。细雨落在小镇的屋顶上，街上没有什么人。
从旅店的窗口望出去，可以看见海堤上一排昏黄的灯，还有灯光外面那片从来没有真正平静过的海水。

玛格丽特放下手里的书，仔细听着外面的动静。有人正慢慢地走上楼梯，每到一层都要停下来，好像在数房门。
渡船早就停了，她想不出这个时候还会有谁来找她！难道又是医生吗？

来的并不是医生。站在走廊里的男人夹着一个小木盒，看着她的眼神疲倦而耐心，像是走了很远的路，只为了送来一个坏消息。
"""
