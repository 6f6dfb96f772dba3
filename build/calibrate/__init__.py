"""Which settings of approximate reuse keep a model near enough to itself: measured, and written into the zoo.

prompts     what is asked: the user's own prompts, or built-in ones
follower    runs of an engine along given answers
yardstick   what bf16 alone changes
search      what is tried, and which is taken
report      a table and a picture
cli         `zoo-calibrate`
"""

from blockzoo.build.calibrate.search import NothingKnownError, calibrate

__all__ = ["NothingKnownError", "calibrate"]
