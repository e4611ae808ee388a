"""A play's markup, by hand."""

from __future__ import annotations

from fedbw_sweep.data.plays import parse_play

PLAY = """\
# A Play

## ACT I

### SCENE I. A street with
a lamp.

_Enter ANNE and
BOB_

**ANNE**  
Good morrow,  
_[Aside]_  
and good-bye,'\\--says he.

_Exit BOB_

Still here.

**BOB**  
__\\[Within]_  
[To ANNE]_  
Ay. _He sighs_ Me!

**ANNE**  
*[Reads
aloud.]*  

### SCENE II. Elsewhere

Nobody says this.

**First Lord: & c.**  
Last words
"""  # noqa: W291


def test_a_small_play_by_hand() -> None:
    assert parse_play(PLAY) == [
        ("ANNE", "Good morrow,\nand good-bye,'--says he.\nStill here."),
        ("BOB", "Ay.  Me!"),
        ("First Lord: & c.", "Last words"),
    ]
    assert parse_play("") == parse_play("# Title\nprose") == []
